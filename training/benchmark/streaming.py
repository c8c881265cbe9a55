"""SAE training at the size of Stable Diffusion v1.4: a U-Net with random weights samples the activations, as in
`python -m training sae`. Random weights cost as much as trained ones.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch

from core.diffusion.diffuser import Diffuser
from core.spec import BUILT_IN, ModelSpec
from training.benchmark.benchmark import Benchmark
from training.benchmark.full_size import FULL, SMALL, Size, make_pipeline
from training.common.recipe import read_recipe
from training.common.report import Cell, Table
from training.picturebook.world.tokens import build_tokenizer
from training.prompts.sources import GrammarPrompts
from training.sae.command import RECIPE, SaeRecipe
from training.sae.stream import ActivationStream, StreamBatch, StreamConfig
from training.sae.trainer import SaeRun, make_accelerator, train_saes


@dataclass(frozen=True)
class StreamingSettings:
    """What is trained, and on what."""

    recipe: SaeRecipe = field(default_factory=lambda: read_recipe(SaeRecipe, RECIPE.with_name("sd_v1_4_saes.json")))
    """SAEs, stream and training; only a few of its steps are taken."""
    spec: ModelSpec = BUILT_IN["sd-v1-4"]
    """Hookpoints, steps and guidance."""
    size: Size = FULL
    """Of the model."""
    images: int = 64
    """Images per buffer of the stream, which gives one batch."""
    n_buffers: int = 3
    """Buffers measured, after one to warm up."""


QUICK = StreamingSettings(
    spec=ModelSpec("small", "", num_inference_steps=3, guidance_scale=7.5),
    size=SMALL,
    images=4,
    n_buffers=2,
)
"""A quick check; its results mean nothing."""


def make_diffuser(settings: StreamingSettings, device: str) -> Diffuser:
    """The model with random weights, in the precision in which `core.load_model` would have it on this device."""
    tokenizer = build_tokenizer()  # whole words: byte by byte, the grammar's prompts would be too long
    tokenizer.model_max_length = 77
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    return Diffuser(make_pipeline(settings.size, dtype=dtype, device=device, tokenizer=tokenizer), settings.spec)


class _Timed:
    """A stream that records when each batch was asked for and how long it took."""

    def __init__(self, stream: ActivationStream, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self.made: list[float] = []
        """Seconds that each batch took."""
        self.asked_at: list[float] = []

    def d_in(self, hookpoint: str) -> int:
        """Channels of a hookpoint's update."""
        return self._stream.d_in(hookpoint)

    def batches(self, start: int = 0) -> Iterator[StreamBatch]:
        """The batches."""
        batches = self._stream.batches(start)
        while True:
            self.asked_at.append(self._now())
            batch = next(batches)
            self.made.append(self._now() - self.asked_at[-1])
            yield batch

    def _now(self) -> float:
        """Seconds, after the device has finished its work."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def measure(settings: StreamingSettings, device: str) -> Table:
    """Measure the benchmark `streaming`."""
    model = make_diffuser(settings, device)
    recipe = settings.recipe
    ids = recipe.sae_ids(model)
    # As many samples from an image as the smallest block has positions.
    each = settings.size.updates[1][1] ** 2
    shape = StreamConfig(each * settings.images, settings.images, 1, min(16, settings.images))
    stream = _Timed(ActivationStream(model, GrammarPrompts(model.check_prompt), ids, shape), model.device)
    n_steps = settings.n_buffers + 2  # the first warms up; when the last one ended is unknown
    config = replace(recipe.training, n_steps=n_steps, n_calibration_batches=1, sync_every=n_steps)
    with TemporaryDirectory() as folder:
        run = SaeRun(Path(folder), checkpoint_interval_s=1e9)
        train_saes(stream, ids, config, run, make_accelerator(config, run))
    whole = [after - before for before, after in pairwise(stream.asked_at[1:])]
    rows: list[dict[str, Cell]] = []
    for what, seconds in (("the sampler", stream.made[1:-1]), ("sampler and training", whole)):
        mean = fmean(seconds)
        row: dict[str, Cell] = {"what": what, "samples a second": len(ids) * shape.batch_size / mean}
        row |= {
            "images a second": settings.images / mean,
            "share of the time": f"{100 * mean / fmean(whole):.0f} %",
        }
        rows.append(row)
    n_weights = sum(weight.numel() for weight in model.unet.parameters()) / 1e6
    notes = (
        f"A U-Net of {n_weights:.0f} million random weights in {str(model.dtype).removeprefix('torch.')}, "
        f"{model.spec.num_inference_steps} steps with guidance, streams to {len(ids)} SAEs at "
        f"{', '.join(model.hookpoints)}: {shape.batch_size} samples of each from every {settings.images} images. "
        f"Mean of {len(whole)} such buffers after one to warm up, on {model.device}.",
    )
    return Table("streaming", "Training SAEs while the sampler runs", rows, notes)


BENCHMARK = Benchmark(
    title="SAE training fed by the sampler",
    description=__doc__,
    settings=StreamingSettings(),
    quick=QUICK,
    measure=lambda run, settings: [measure(settings, run.resolved_device)],
)
