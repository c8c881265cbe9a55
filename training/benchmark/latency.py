"""Latency of small U-Net calls of Stable Diffusion v1.4: replayed from CUDA graphs, without graphs, and in diffusers.

The pipeline has v1.4's published configuration and random weights, which cost as much as trained ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from core.activations.hooks import edit, record
from core.diffusion.diffuser import Diffuser
from core.spec import BUILT_IN
from training.benchmark.benchmark import Benchmark
from training.benchmark.full_size import FULL, SMALL, Size, make_pipeline
from training.benchmark.speed import PROMPT, unet_seconds
from training.common.report import Cell, Figure, Table, timed

CALL_TARGET_MS = 27.5
"""Target for a call of two latents on an H200: half the time it took without graphs."""
N_STEPS = 50


def measure(device: str, *, quick: bool = False) -> Table:
    """Measure the benchmark `latency`; `quick` uses a small model and few steps."""
    size, n_steps, n = (SMALL, 4, 2) if quick else (FULL, N_STEPS, 3)
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    pipeline = make_pipeline(size, dtype=dtype, device=device)
    model = make_diffuser(pipeline, size, n_steps)
    rows = [_call_row(model, batch_size, 4 * n) for batch_size in (1, 2, 8, 32)]
    rows += _image_rows(model, pipeline, n_steps, n)
    weights = sum(weight.numel() for weight in model.unet.parameters()) / 1e6
    hardware = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "the CPU (no graphs)"
    notes = [
        f"A U-Net with {weights:.0f} million random weights in {str(dtype).removeprefix('torch.')} on {hardware}; "
        f"images of {n_steps} steps with guidance, without previews, in turn after a warm-up that records the graphs. "
        "`replayed`: median with CUDA graphs; `worst`: the slowest of these; `launched anew`: median without graphs. "
        f"{model.graphs.n_captured} graphs were recorded"
        + (" and kept until the end." if model.graphs.enabled else ".")
    ]
    return Table("latency", "Small U-Net calls at the size of Stable Diffusion v1.4", rows, notes)


def make_diffuser(pipeline: StableDiffusionPipeline, size: Size, n_steps: int) -> Diffuser:
    """The pipeline as a `Diffuser` with the spec of v1.4, as `core.load_model` would make it."""
    published = BUILT_IN["sd-v1-4"]
    return Diffuser(
        pipeline,
        replace(published, name="full-size", num_inference_steps=n_steps, image_size=8 * size.latent_side),
    )


def _call_row(model: Diffuser, batch_size: int, n: int) -> dict[str, Cell]:
    seconds = unet_seconds(model, batch_size, n)
    with _without_graphs(model):
        eager = unet_seconds(model, batch_size, n)
    target = CALL_TARGET_MS if batch_size == 2 else None
    return _row(f"U-Net call of {batch_size}, ms", [1000 * s for s in seconds], [1000 * s for s in eager], None, target)


def _image_rows(model: Diffuser, pipeline: StableDiffusionPipeline, n_steps: int, n: int) -> list[dict[str, Cell]]:
    scheduler_settings: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **scheduler_settings)
    pipeline.set_progress_bar_config(disable=True)
    side = model.image_size

    def ours(*contexts: Any) -> None:
        model.generate(PROMPT, seed=0, previews=False, contexts=contexts)

    def theirs() -> None:
        settings = {"num_inference_steps": n_steps, "guidance_scale": model.spec.guidance_scale}
        pipeline(PROMPT, height=side, width=side, generator=torch.Generator().manual_seed(0), **settings)

    tasks: dict[str, Callable[[], None]] = {
        "image, s": ours,
        "image, every residual update recorded, s": lambda: ours(record(model)),
        "image, edited at three blocks, s": lambda: ours(edit(model, lambda _, update: 0.5 * update)),
    }
    peer: list[float] = []
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in tasks}
    for task in (*tasks.values(), theirs):
        task()
    for _ in range(n):
        for name, task in tasks.items():
            seconds[name][0].extend(timed(task, 1))
            with _without_graphs(model):
                seconds[name][1].extend(timed(task, 1))
        peer += timed(theirs, 1)
    target = Figure("diffusers", peer).median
    return [
        _row(name, *both, peer if number == 0 else None, target if number == 0 else None)
        for number, (name, both) in enumerate(seconds.items())
    ]


def _row(
    what: str, replayed: list[float], eager: list[float], peer: list[float] | None, target: float | None
) -> dict[str, Cell]:
    worst = max(replayed)
    return {
        "what": what,
        "replayed": Figure("", replayed).median,
        "worst": worst,
        "launched anew": Figure("", eager).median,
        "diffusers": Figure("", peer).median if peer else None,
        "target": target,
        "met": None if target is None else worst <= target,
    }


@contextmanager
def _without_graphs(model: Diffuser) -> Iterator[None]:
    """Turn CUDA graphs off inside the block."""
    before, model.graphs.enabled = model.graphs.enabled, False
    try:
        yield
    finally:
        model.graphs.enabled = before


BENCHMARK = Benchmark(
    title="Latency of small U-Net calls at full size",
    description=__doc__,
    settings=False,
    quick=True,
    measure=lambda run, quick: [measure(run.resolved_device, quick=quick)],
)
