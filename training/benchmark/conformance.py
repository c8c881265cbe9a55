"""The whole path at the size of Stable Diffusion v1.4, without its weights: shapes, time and memory.

A pipeline of the published configuration with random weights goes through everything that is done with a model: it is
drawn from, recorded, taken apart by sparse autoencoders, labelled, edited, measured, foretold. Each has a line with its
time, its evaluations of the U-Net and the most memory that was held meanwhile. On CUDA in float16 and with the usual
numbers of steps and evaluations; on a CPU in bfloat16 and with as few as show that it works.
"""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import core
from core.activations.hooks import ActivationKey, record
from core.concepts.table import load_concepts
from core.concepts.trace import load_saes
from core.diffusion.diffuser import Diffuser
from core.diffusion.hookpoints import nearest_hookpoints
from core.edits import Editor, GlobalEdit, Target
from core.hardware.memory import GIB, peak, reset_peak
from core.information.quadrature import Sampler
from core.sae.autoencoder import SaeConfig, SaeId, SparseAutoencoder
from core.sae.collection import write_index
from core.sae.io import save_sae
from core.segmentation.semantic import Segmentation
from core.spec import BUILT_IN
from training.benchmark.benchmark import Benchmark
from training.benchmark.full_size import FULL, SMALL, Size
from training.benchmark.speed import unet_seconds
from training.common.report import ROOT, Cell, Figure, Table
from training.labels.command import label_collection
from training.labels.labeller import LabelConfig, LabelRun
from training.sae.bank import Moments, SaeBank, TrainerConfig

log = logging.getLogger(__name__)

PROMPT = "a cat on the grass"
EXPANSION, K = 4, 20
SAE_BATCH = 4096
"""Positions in a training step, as published."""


@dataclass(frozen=True)
class Effort:
    """How much is computed, on how large a model."""

    dtype: str
    """Of the model."""
    n_steps: int
    """Of the sampler."""
    n_calls: int
    """Timed calls of the U-Net, and training steps."""
    batch: int
    """Latents in the largest calls."""
    attribution: Sampler
    """How a picture is measured."""
    words: tuple[str, ...] | None
    """Which of its words; None: all."""
    max_evals: int | None
    """At most."""
    question_evals: int | None
    """Most evaluations of each other question about a picture; None: they are not asked."""
    size: Size = FULL
    """Of the model."""


CPU = Effort("bfloat16", 2, 3, 2, Sampler(n_points=2, min_replicates=2), ("cat",), 8, None)
CUDA = Effort("float16", 50, 10, 32, Sampler(), None, None, 512)


def part(device: str | None, *, small: bool = False) -> Table:
    """The benchmark's part `conformance`; `small` tries it out on a model of the same shape and a few channels.

    Raises:
        ValueError: Something has another shape than the published model's, or is not finite.
    """
    site = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    effort = CUDA if site.type == "cuda" else CPU
    if small:
        effort = replace(effort, size=SMALL, question_evals=effort.question_evals or 16)
    with TemporaryDirectory() as folder:
        book = _Book(site)
        with book.timed("write the pipeline"):
            _write(Path(folder) / "model", effort.dtype, small)
        model = _load(Path(folder) / "model", site, effort, book)
        updates = _draw(model, effort, book)
        _take_apart(model, updates, Path(folder) / "saes", effort, book)
        _edit_and_predict(model, Path(folder) / "saes", effort, book)
        _attribute(model, effort, book)
        if effort.question_evals is not None:
            _ask(model, effort, effort.question_evals, book)
        _train(updates, site, effort, book)
    where = torch.cuda.get_device_name(site) if site.type == "cuda" else "the CPU"
    notes = [
        f"A Stable Diffusion v1.4 of the published configuration and random weights, {effort.dtype}, on {where}.",
        f"Memory is the most held at once while a line was made, weights included: "
        f"{'by tensors on the GPU' if site.type == 'cuda' else 'by the process, libraries and all'}.",
        f"Pictures of {effort.n_steps} steps. Nothing that is drawn, labelled or measured here means anything.",
    ]
    return Table("conformance", "The size of Stable Diffusion v1.4", book.rows, notes)


class _Book:
    """What was done, and what it took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.model: Diffuser | None = None
        self.rows: list[dict[str, Cell]] = []

    @contextmanager
    def timed(self, what: str) -> Iterator["_Line"]:
        """A line for what is done inside."""
        line = _Line()
        reset_peak(self._device)
        before, started = self._n_evals(), perf_counter()
        yield line
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = perf_counter() - started if line.seconds is None else line.seconds
        held, n_evals = peak(self._device), self._n_evals() - before
        self.rows.append(
            {
                "what": what,
                "seconds": seconds,
                "U-Net evaluations": n_evals or None,
                "peak GiB": None if held is None else held / GIB,
                "found": "; ".join(line.found),
            }
        )
        log.info("%s", self.rows[-1])

    def _n_evals(self) -> int:
        return 0 if self.model is None else self.model.n_unet_rows


class _Line:
    """What a line says besides."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.seconds: float | None = None
        """What to tell in the place of the whole time."""


def _write(folder: Path, dtype: str, small: bool) -> None:
    # In a process of its own: drawing the weights in float32 takes more memory than anything that is measured here.
    code = (
        "import pathlib, sys, torch; from training.benchmark import full_size as f; "
        f"f.save_pipeline(pathlib.Path(sys.argv[1]), torch.{dtype}, f.{'SMALL' if small else 'FULL'})"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)


def _load(folder: Path, device: torch.device, effort: Effort, book: _Book) -> Diffuser:
    published = BUILT_IN["sd-v1-4"]
    spec = replace(
        published,
        name="full-size",
        source=str(folder),
        revision=None,
        num_inference_steps=effort.n_steps,
        image_size=8 * effort.size.latent_side,
    )
    with book.timed("load it") as line:
        model = core.load_model(spec, device=device, dtype=None if device.type == "cuda" else effort.dtype)
        line.found.append(f"{sum(p.numel() for p in model.unet.parameters()) / 1e6:.0f} million weights in the U-Net")
    _expect("hookpoints nearest the bottleneck", nearest_hookpoints(model.unet), published.hookpoints)
    _expect("dtype", model.dtype, getattr(torch, effort.dtype))
    _expect("latents", model.latent_shape, _latents(effort))
    book.model = model
    for n in dict.fromkeys((1, 2, effort.batch)):
        with book.timed(f"U-Net calls of {n}") as line:
            seconds = unet_seconds(model, n, effort.n_calls)
            line.seconds = Figure("", seconds).median
            line.found.append(f"{line.seconds / n:.3g} s a latent; slowest call {max(seconds):.3g} s")
    return model


def _draw(model: Diffuser, effort: Effort, book: _Book) -> dict[ActivationKey, Tensor]:
    """The updates of a picture, all of them."""
    with book.timed("draw a picture and record it") as line, record(model) as recording:
        image = model.generate(PROMPT, seed=0, previews=False).image
        shapes = tuple(tuple(recording[ActivationKey(name, "cond", 0)].shape[1:]) for name in model.hookpoints)
        line.found.append(", ".join(f"{h} x {w} x {c}" for c, h, w in shapes))
    _expect("updates", shapes, effort.size.updates)
    _expect("recorded updates", len(recording), 3 * 2 * effort.n_steps)
    _expect("size of a picture", image.size, (8 * effort.size.latent_side,) * 2)
    with book.timed("encode a picture"):
        _expect("encoded picture", tuple(model.encode(image).shape), (1, *_latents(effort)))
    updates = dict(recording.items())
    if not all(update.isfinite().all() for update in updates.values()):
        raise ValueError("Some updates are not finite.")
    return updates


def _latents(effort: Effort) -> tuple[int, int, int]:
    return 4, effort.size.latent_side, effort.size.latent_side


def _take_apart(model: Diffuser, updates: dict[ActivationKey, Tensor], root: Path, effort: Effort, book: _Book) -> None:
    """Make a collection of SAEs, encode with it, and let the labelling pipeline write its tables."""
    d_in = effort.size.channels[-1]
    d_sae = EXPANSION * d_in
    ids = [SaeId(name, "cond", "all") for name in model.hookpoints]
    for sae_id in ids:
        generator = torch.Generator().manual_seed(len(sae_id.hookpoint))
        sae = SparseAutoencoder(SaeConfig(d_in, d_sae, K), generator=generator)
        save_sae(sae, root / sae_id.path, {"model": model.spec.name}, torch.float16)
    write_index(root, ids, model=model.spec.name)
    saes = load_saes(root, model)
    with book.timed("encode the updates of one step") as line:
        codes = {}
        for site, sae in saes.items():
            x = updates[ActivationKey(site.hookpoint, site.branch, 0)][0].flatten(1).T
            codes[site] = sae.encode(x.to(sae.b_dec.device, torch.float32))
        line.found.append(", ".join(f"{len(code.indices)} x {K} of {d_sae}" for code in codes.values()))
    positions = [height * width for _, height, width in effort.size.updates]
    _expect("codes", [tuple(code.indices.shape) for code in codes.values()], [(n, K) for n in positions])
    config = LabelConfig(images=4, batch=4, permutations=3, gallery=1, backgrounds=(), styles=(), words={})
    with book.timed("draw, segment and label 4 pictures") as line:
        label_collection(config, root, model, _Halves(), _Always(), LabelRun(root.parent / "labels"))
        tables = [load_concepts(root, *site) for site in saes]
        line.found.append(f"{sum(len(table.frame) for table in tables)} rows of concepts")
    _expect("rows of concepts", [len(table.frame) for table in tables], [d_sae] * len(ids))


def _edit_and_predict(model: Diffuser, root: Path, effort: Effort, book: _Book) -> None:
    saes = load_saes(root, model)
    editor = Editor(model, saes, lambda site: load_concepts(root, *site))
    site = next(iter(saes))
    means = editor.table(site).frame["mean"].to_numpy()
    concept = Target(site, int(np.nanargmax(means)))
    edit = GlobalEdit(concepts=[concept], branches=[site.branch], steps=(0, 0), strength=8.0)

    def drawn(strength: float) -> Tensor:
        contexts = [editor.editing([replace(edit, strength=strength)])]
        return model.generate(PROMPT, seed=0, previews=False, contexts=contexts).latents

    with book.timed("draw a picture with an edit"):
        edited = drawn(8.0)
    plain, none = model.generate(PROMPT, seed=0, previews=False).latents, drawn(0.0)
    _expect("an edit of strength 0 changes", float((plain - none).abs().max()), 0.0)
    if not (edited - plain).abs().max() > 0:
        raise ValueError("An edit of strength 8 changed nothing.")
    with book.timed("foretell a layout from the first step") as line:
        layout = core.predict_layout(model, PROMPT, seed=0, step=0, source=root)
        line.found.append(f"{' x '.join(map(str, layout.labels.shape))} positions")
    _expect("layout", layout.labels.shape, effort.size.updates[1][1:])


def _attribute(model: Diffuser, effort: Effort, book: _Book) -> None:
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    with book.timed("attribute a picture to its words") as line:
        a = core.attribute(
            model, latents, PROMPT, words=effort.words, sampler=effort.attribution, max_evals=effort.max_evals
        )
        line.found += [
            f"{len(a.words)} words, {a.n_evals} evaluations, {a.stopped}",
            f"rounding up to {100 * a.settings['rounding']:.2g} % of a word's bits, so {a.settings['dtype']} was used",
        ]
    _expect("map", a.maps.shape[1:], _latents(effort)[1:])
    np.testing.assert_allclose(a.maps.sum((1, 2)), a.bits, rtol=1e-6)


def _ask(model: Diffuser, effort: Effort, max_evals: int, book: _Book) -> None:
    """Everything else that can be asked of a picture."""
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(2))
    how: dict[str, Any] = {"sampler": effort.attribution, "max_evals": max_evals}
    with book.timed("decompose what two words tell") as line:
        d = core.decompose(model, latents, PROMPT, "cat", "grass", **how)
        line.found.append(f"{d.n_evals} evaluations in {d.settings['dtype']} after the check for rounding, {d.stopped}")
    _expect("map of a part", d.redundancy.map.shape, _latents(effort)[1:])
    with book.timed("rank two captions") as line:
        r = core.rank_captions(model, latents, [PROMPT, "a dog in the snow"], **how)
        line.found.append(f"{r.n_evals} evaluations in {r.settings['dtype']}, {r.stopped}")
    with book.timed("likelihood of a picture") as line:
        found = core.likelihood(model, latents, PROMPT, **how)
        line.found.append(f"{found.n_evals} evaluations in {found.settings['dtype']}, {found.stopped}")
    with book.timed("draw a picture again without a word") as line:
        c = core.change_word(model, latents, PROMPT, "cat")
        line.found.append(f"there and back again in {effort.n_steps} steps")
    _expect("map of the change", c.change.shape, _latents(effort)[1:])


def _train(updates: dict[ActivationKey, Tensor], device: torch.device, effort: Effort, book: _Book) -> None:
    """Time a step of one SAE's training on a batch of the published size, made of what was recorded."""
    wide = torch.cat([update[0].flatten(1).T for update in updates.values()])
    x = wide.repeat(-(-SAE_BATCH // len(wide)), 1)[:SAE_BATCH].to(device, torch.float32)
    sae_id, n = SaeId("any", "cond", "all"), effort.n_calls
    bank = SaeBank(
        {sae_id: x.shape[1]}, TrainerConfig(n_steps=n + 1, k=K, expansion=EXPANSION, n_calibration_batches=1)
    ).to(device)
    moments = Moments(torch.tensor(len(x), device=device), x.double().sum(0), x.double().square().sum())
    for _, state in bank.items():
        state.start_from(moments, sae_id.path)
    optimizer = torch.optim.Adam(bank.parameters(), lr=3e-4, fused=True)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            loss = bank([x])
        loss.backward()
        bank.before_step()
        optimizer.step()
        optimizer.zero_grad()
        bank.after_step()
        return float(loss.detach())  # waits for the device

    with book.timed(f"SAE training step of {SAE_BATCH} positions") as line:
        line.seconds = Figure("", [_seconds(step) for _ in range(n + 1)][1:]).median


def _seconds(work: Callable[[], object]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


def _expect(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"Of {what} there should be {wanted}, there is {found}.")


class _Always:
    """The same prompt, whatever the number."""

    def prompt(self, number: int) -> str:
        """The prompt."""
        del number
        return PROMPT


class _Halves:
    """In the place of a segmenter: the left half of every picture is one thing, the right half another."""

    def class_names(self) -> tuple[str, ...]:
        """Of the two."""
        return ("left", "right")

    def segment(self, images: Sequence[Image.Image]) -> Segmentation:
        """Their masks."""
        width, height = images[0].size
        left = torch.zeros(height, width, dtype=torch.bool)
        left[:, : width // 2] = True
        return Segmentation(torch.stack([left, ~left]).repeat(len(images), 1, 1, 1), torch.ones(len(images), 2))


BENCHMARK = Benchmark(
    title="Conformance at full size",
    description=__doc__,
    settings=False,
    quick=True,
    measure=lambda run, small: [part(run.device, small=small)],
)
