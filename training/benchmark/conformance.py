"""The main functions at the size of Stable Diffusion v1.4, without its weights: shapes, time and memory.

A pipeline with the published configuration and random weights generates and records images, encodes them with sparse
autoencoders, labels and edits concepts, predicts a layout, attributes an image to its words, and trains an SAE. The
table gives the time, the U-Net evaluations and the peak memory of each step. On CUDA the model runs in float16 with the
usual numbers of steps and evaluations; on a CPU in bfloat16 with as few as show that it works.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import core
from core.activations.hooks import ActivationKey, record
from core.concepts.table import load_concepts
from core.concepts.trace import load_saes
from core.diffusion.diffuser import Diffuser
from core.diffusion.hookpoints import nearest_hookpoints
from core.edits import Editor, GlobalEdit, Target
from core.information.quadrature import Sampler
from core.sae.autoencoder import SaeConfig, SaeId, SparseAutoencoder
from core.sae.collection import write_index
from core.sae.io import save_sae
from core.spec import BUILT_IN
from training.benchmark.benchmark import Benchmark
from training.benchmark.full_size import FULL, SMALL, ConstantPrompt, HalvesSegmenter, Size, save_pipeline
from training.benchmark.speed import unet_seconds
from training.common.report import ROOT, Figure, Table
from training.common.timed_steps import TimedSteps
from training.labels.command import label_collection
from training.labels.labeller import LabelConfig, LabelRun
from training.sae.bank import Moments, SaeBank, TrainerConfig

PROMPT = "a cat on the grass"
EXPANSION, K = 4, 20
SAE_BATCH = 4096
"""Positions per training step, as in Tinaz et al. 2025."""


@dataclass(frozen=True)
class Workload:
    """How much is computed, and the size of the model."""

    dtype: str
    """Name of the model's dtype."""
    n_steps: int
    """Steps of the sampler."""
    n_calls: int
    """Timed U-Net calls per batch size, and timed training steps."""
    batch: int
    """Latents in the largest U-Net call."""
    attribution: Sampler
    """Sampler of the information estimates."""
    words: tuple[str, ...] | None
    """Words to attribute the image to; None: all words of the prompt."""
    max_evals: int | None
    """Limit on the U-Net evaluations of the attribution; None: no limit."""
    analysis_evals: int | None
    """Limit on the U-Net evaluations of each other analysis of an image; None: those analyses are skipped."""
    size: Size = FULL
    """Size of the model."""


CPU = Workload("bfloat16", 2, 3, 2, Sampler(n_points=2, min_replicates=2), ("cat",), 8, None)
CUDA = Workload("float16", 50, 10, 32, Sampler(), None, None, 512)


def measure(device: str | None, *, small: bool = False) -> Table:
    """Measure the benchmark `conformance`; `small` uses a model with the same blocks but few channels.

    Raises:
        ValueError: A shape differs from the published model's, or an update is not finite.
    """
    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    work = CUDA if torch_device.type == "cuda" else CPU
    if small:
        work = replace(work, size=SMALL, analysis_evals=work.analysis_evals or 16)
    with TemporaryDirectory() as folder:
        book = TimedSteps(torch_device)
        with book.timed("write the pipeline"):
            _write(Path(folder) / "model", work.dtype, small)
        model = _load(Path(folder) / "model", torch_device, work, book)
        updates = _generate(model, work, book)
        _encode_and_label(model, updates, Path(folder) / "saes", work, book)
        _edit_and_predict(model, Path(folder) / "saes", work, book)
        _attribute(model, work, book)
        if work.analysis_evals is not None:
            _analyse(model, work, work.analysis_evals, book)
        _train(updates, torch_device, work, book)
    hardware = torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else "the CPU"
    notes = [
        f"Stable Diffusion v1.4 with the published configuration and random weights, {work.dtype}, on {hardware}.",
        "Peak memory, weights included: "
        f"{'tensors on the GPU' if torch_device.type == 'cuda' else 'the whole process, libraries included'}.",
        f"Images of {work.n_steps} steps. With random weights, the images, labels and bits mean nothing.",
    ]
    return Table("conformance", "The main functions at the size of Stable Diffusion v1.4", book.rows, notes)


def _write(folder: Path, dtype: str, small: bool) -> None:
    if small:
        save_pipeline(folder, getattr(torch, dtype), SMALL)
        return
    # In its own process, because initialising the weights in float32 takes more memory than any measured step.
    code = (
        "import pathlib, sys, torch; from training.benchmark import full_size as f; "
        f"f.save_pipeline(pathlib.Path(sys.argv[1]), torch.{dtype}, f.FULL)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)


def _load(folder: Path, device: torch.device, work: Workload, book: TimedSteps) -> Diffuser:
    published = BUILT_IN["sd-v1-4"]
    spec = replace(
        published,
        name="full-size",
        source=str(folder),
        revision=None,
        num_inference_steps=work.n_steps,
        image_size=8 * work.size.latent_side,
    )
    with book.timed("load the pipeline") as row:
        model = core.load_model(spec, device=device, dtype=None if device.type == "cuda" else work.dtype)
        row.details.append(
            f"{sum(p.numel() for p in model.unet.parameters()) / 1e6:.0f} million parameters in the U-Net"
        )
    _expect("hookpoints nearest the bottleneck", nearest_hookpoints(model.unet), published.hookpoints)
    _expect("dtype", model.dtype, getattr(torch, work.dtype))
    _expect("latents", model.latent_shape, _latents(work))
    book.model = model
    for n in dict.fromkeys((1, 2, work.batch)):
        with book.timed(f"U-Net call of {n}") as row:
            seconds = unet_seconds(model, n, work.n_calls)
            row.seconds = Figure("", seconds).median
            row.details.append(f"{row.seconds / n:.3g} s per latent; slowest call {max(seconds):.3g} s")
    return model


def _generate(model: Diffuser, work: Workload, book: TimedSteps) -> dict[ActivationKey, Tensor]:
    """All residual updates of one generated image."""
    with book.timed("generate and record an image") as row, record(model) as recording:
        image = model.generate(PROMPT, seed=0, previews=False).image
        shapes = tuple(tuple(recording[ActivationKey(name, "cond", 0)].shape[1:]) for name in model.hookpoints)
        row.details.append(", ".join(f"{h} x {w} x {c}" for c, h, w in shapes))
    _expect("updates", shapes, work.size.updates)
    _expect("recorded updates", len(recording), 3 * 2 * work.n_steps)
    _expect("image size", image.size, (8 * work.size.latent_side,) * 2)
    with book.timed("encode an image"):
        _expect("encoded image", tuple(model.encode(image).shape), (1, *_latents(work)))
    updates = dict(recording.items())
    if not all(update.isfinite().all() for update in updates.values()):
        raise ValueError("Some residual updates are not finite.")
    return updates


def _latents(work: Workload) -> tuple[int, int, int]:
    return 4, work.size.latent_side, work.size.latent_side


def _encode_and_label(
    model: Diffuser, updates: dict[ActivationKey, Tensor], root: Path, work: Workload, book: TimedSteps
) -> None:
    """Write a collection of SAEs with random weights, encode with it, and label its concepts."""
    d_in = work.size.channels[-1]
    d_sae = EXPANSION * d_in
    ids = [SaeId(name, "cond", "all") for name in model.hookpoints]
    for sae_id in ids:
        generator = torch.Generator().manual_seed(len(sae_id.hookpoint))
        sae = SparseAutoencoder(SaeConfig(d_in, d_sae, K), generator=generator)
        save_sae(sae, root / sae_id.path, {"model": model.spec.name}, torch.float16)
    write_index(root, ids, model=model.spec.name)
    saes = load_saes(root, model)
    with book.timed("encode the updates of one step") as row:
        codes = {}
        for site, sae in saes.items():
            x = updates[ActivationKey(site.hookpoint, site.branch, 0)][0].flatten(1).T
            codes[site] = sae.encode(x.to(sae.b_dec.device, torch.float32))
        row.details.append(", ".join(f"{len(code.indices)} x {K} of {d_sae}" for code in codes.values()))
    positions = [height * width for _, height, width in work.size.updates]
    _expect("codes", [tuple(code.indices.shape) for code in codes.values()], [(n, K) for n in positions])
    config = LabelConfig(images=4, batch=4, permutations=3, gallery=1, backgrounds=(), styles=(), words={})
    with book.timed("generate, segment and label 4 images") as row:
        run = LabelRun(root.parent / "labels")
        label_collection(config, root, model, HalvesSegmenter(), ConstantPrompt(PROMPT), run)
        tables = [load_concepts(root, *site) for site in saes]
        row.details.append(f"{sum(len(table.frame) for table in tables)} concepts")
    _expect("concepts", [len(table.frame) for table in tables], [d_sae] * len(ids))


def _edit_and_predict(model: Diffuser, root: Path, work: Workload, book: TimedSteps) -> None:
    saes = load_saes(root, model)
    editor = Editor(model, saes, lambda site: load_concepts(root, *site))
    site = next(iter(saes))
    means = editor.table(site).frame["mean"].to_numpy()
    concept = Target(site, int(np.nanargmax(means)))
    edit = GlobalEdit(concepts=[concept], branches=[site.branch], steps=(0, 0), strength=8.0)

    def edited_latents(strength: float) -> Tensor:
        contexts = [editor.editing([replace(edit, strength=strength)])]
        return model.generate(PROMPT, seed=0, previews=False, contexts=contexts).latents

    with book.timed("generate an edited image"):
        edited = edited_latents(8.0)
    unedited, zero = model.generate(PROMPT, seed=0, previews=False).latents, edited_latents(0.0)
    _expect("largest change by an edit of strength 0", float((unedited - zero).abs().max()), 0.0)
    if not (edited - unedited).abs().max() > 0:
        raise ValueError("An edit of strength 8 changed nothing.")
    with book.timed("predict the layout from the first step") as row:
        layout = core.predict_layout(model, PROMPT, seed=0, step=0, source=root)
        row.details.append(f"{' x '.join(map(str, layout.labels.shape))} positions")
    _expect("layout", layout.labels.shape, work.size.updates[1][1:])


def _attribute(model: Diffuser, work: Workload, book: TimedSteps) -> None:
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    with book.timed("attribute an image to its words") as row:
        a = core.attribute(model, latents, PROMPT, words=work.words, sampler=work.attribution, max_evals=work.max_evals)
        row.details += [
            f"{len(a.words)} words, {a.n_evals} evaluations, {a.stopped}",
            f"{a.settings['dtype']}; half precision alone would have been off by up to "
            f"{100 * a.settings['rounding']:.2g} % of a word's bits",
        ]
    _expect("map", a.maps.shape[1:], _latents(work)[1:])
    np.testing.assert_allclose(a.maps.sum((1, 2)), a.bits, rtol=1e-6)


def _analyse(model: Diffuser, work: Workload, max_evals: int, book: TimedSteps) -> None:
    """Partial information decomposition, caption ranking, likelihood and counterfactual word removal."""
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"sampler": work.attribution, "max_evals": max_evals}
    with book.timed("decompose the bits of two words") as row:
        d = core.decompose(model, latents, PROMPT, "cat", "grass", **options)
        row.details.append(f"{d.n_evals} evaluations in {d.settings['dtype']}, {d.stopped}")
    _expect("map of the redundancy", d.redundancy.map.shape, _latents(work)[1:])
    with book.timed("rank two captions") as row:
        r = core.rank_captions(model, latents, [PROMPT, "a dog in the snow"], **options)
        row.details.append(f"{r.n_evals} evaluations in {r.settings['dtype']}, {r.stopped}")
    with book.timed("likelihood of an image") as row:
        result = core.likelihood(model, latents, PROMPT, **options)
        row.details.append(f"{result.n_evals} evaluations in {result.settings['dtype']}, {result.stopped}")
    with book.timed("remove a word from an image") as row:
        c = core.change_word(model, latents, PROMPT, "cat")
        row.details.append(f"inverted and generated again in {work.n_steps} steps")
    _expect("map of the change", c.change.shape, _latents(work)[1:])


def _train(updates: dict[ActivationKey, Tensor], device: torch.device, work: Workload, book: TimedSteps) -> None:
    """Time a training step of one SAE on a batch of `SAE_BATCH` positions, taken from the recorded updates."""
    rows = torch.cat([update[0].flatten(1).T for update in updates.values()])
    x = rows.repeat(-(-SAE_BATCH // len(rows)), 1)[:SAE_BATCH].to(device, torch.float32)
    sae_id, n = SaeId("any", "cond", "all"), work.n_calls
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

    with book.timed(f"SAE training step of {SAE_BATCH} positions") as row:
        row.seconds = Figure("", [_seconds(step) for _ in range(n + 1)][1:]).median


def _seconds(step: Callable[[], object]) -> float:
    started = perf_counter()
    step()
    return perf_counter() - started


def _expect(what: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise ValueError(f"Unexpected {what}: {actual} instead of {expected}.")


BENCHMARK = Benchmark(
    title="Conformance at full size",
    description=__doc__,
    settings=False,
    quick=True,
    measure=lambda run, small: [measure(run.device, small=small)],
)
