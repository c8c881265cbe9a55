"""How well sparse autoencoders (SAEs) reconstruct the residual updates of held-out images: Table 1 of Tinaz et al. 2025
(arXiv 2504.15473) by sampler step, next to PCA with as many components as a code has active latents.

Explained variance is 1 minus squared error over squared distance from the mean, both summed in float64 over all
positions of all images. *k of d_in*: active latents of a code, and channels of the block.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import bootstrap  # type: ignore[import-untyped]
from torch import Tensor

import core
from core.activations.hooks import BRANCHES, ActivationKey, UpdateEdit, edit, record
from core.arrays import Floats
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import Branch
from core.sae.autoencoder import SaeId, SparseAutoencoder
from core.sae.collection import list_saes
from training.common.report import Cell, Table
from training.evaluate.common.evaluation import Evaluation, Subject
from training.evaluate.common.proportions import Z
from training.evaluate.sae.by_k import by_k
from training.evaluate.sae.sums import Basis, ReconstructionMoments, ReconstructionSums, tally
from training.labels.sampling import steps_of

DENSE = 0.1
"""A latent that fires at a larger share of positions counts as dense: it says little about any of them."""

_OTHER_NOISE = 10**6
"""Added to an image's seed for another image of the same prompt."""


@dataclass(frozen=True)
class SaeSettings:
    """How much is measured."""

    n_images: int = 256
    """Held-out prompts."""
    n_fit: int = 128
    """Other held-out prompts, on which PCA is fitted."""
    n_steps_each: int = 5
    """Evenly spaced steps at which an SAE for all times is measured."""
    n_replaced: int = 48
    """Images sampled with the update replaced by its reconstruction."""
    batch_size: int = 16
    """Images sampled together."""
    n_bootstrap: int = 1000
    """Bootstrap resamples of the images for each interval."""


QUICK = SaeSettings(n_images=16, n_fit=16, n_steps_each=2, n_replaced=4)
"""A smoke test; its figures mean little."""


class Slot(NamedTuple):
    """One hookpoint and branch at one sampler step."""

    hookpoint: str
    branch: str
    step: int


Saes = dict[SaeId, SparseAutoencoder]


@dataclass(frozen=True)
class SaeBench:
    """The SAEs of a collection and the prompts of the images they are measured on."""

    model: Diffuser
    saes: Saes
    prompts: Sequence[str]
    """Held-out prompts; the first `n_fit` are for PCA and the means."""
    settings: SaeSettings


def reconstruction(bench: SaeBench) -> Table:
    """Explained variance, cosine, L0 and the shares of dead and dense latents."""
    model, saes, settings, prompts = bench.model, bench.saes, bench.settings, bench.prompts
    n_steps = model.spec.num_inference_steps
    wanted = {sae_id: steps_of(sae_id, n_steps, settings.n_steps_each) for sae_id in saes}
    slots = sorted({Slot(i.hookpoint, i.branch, step) for i, steps in wanted.items() for step in steps})
    moments = {slot: ReconstructionMoments() for slot in slots}
    fit, measured = prompts[: settings.n_fit], prompts[settings.n_fit :][: settings.n_images]

    def learn(slot: Slot, x: Tensor) -> None:
        moments[slot].add(x.flatten(0, 1).double().numpy())

    _visit(model, fit, 0, slots, settings.batch_size, learn)
    tallies = {sae_id: {step: ReconstructionSums() for step in steps} for sae_id, steps in wanted.items()}
    bases: dict[tuple[SaeId, int], Basis] = {}
    pooled: dict[SaeId, Basis] = {}
    for sae_id, sae in saes.items():
        own = [moments[Slot(sae_id.hookpoint, sae_id.branch, step)] for step in wanted[sae_id]]
        pooled[sae_id] = sum(own[1:], start=own[0]).components(sae.cfg.k)
        bases |= {(sae_id, step): m.components(sae.cfg.k) for step, m in zip(wanted[sae_id], own, strict=True)}

    def measure(slot: Slot, x: Tensor) -> None:
        for sae_id, by_step in tallies.items():
            if slot[:2] == sae_id[:2] and slot.step in by_step:
                for image in x:
                    tally(by_step[slot.step], saes[sae_id], image, bases[sae_id, slot.step], pooled[sae_id])

    _visit(model, measured, len(fit), slots, settings.batch_size, measure)
    together = {sae_id: ReconstructionSums.pooled(list(by_step.values())) for sae_id, by_step in tallies.items()}
    rows, figures = [], {}
    for sae_id, by_step in tallies.items():
        by_name = {f"{step + 1} of {n_steps}": result for step, result in by_step.items()}
        if len(by_step) > 1:
            by_name["together"] = together[sae_id]
        rows += [_row(sae_id, saes[sae_id], step, result, settings.n_bootstrap) for step, result in by_name.items()]
        figures[sae_id.path] = summary(saes[sae_id], together[sae_id], settings.n_bootstrap)
    dead = [f"{path} {100 * of['dead_share']:.1f} % of {of['d_sae']}" for path, of in figures.items()]
    notes = (
        f"{len(measured)} held-out images; 95 % intervals over images in brackets. PCA: as many components as a code "
        f"has active latents, fitted at the same step on {len(fit)} other held-out images. Dense: latents that fire at "
        f"more than {100 * DENSE:.0f} % of the positions.",
        "Dead latents, which fire at none of the positions measured: "
        + "; ".join(f"{text} over {of['n_positions']:,}" for text, of in zip(dead, figures.values(), strict=True))
        + ".",
    )
    return Table("reconstruction", "Reconstruction of held-out images", rows, notes, {"figures": figures})


def replacement(bench: SaeBench) -> Table:
    """How far the image moves when an update is replaced by its reconstruction, or removed, at every step.

    Distances are relative to that of two images of one prompt from different noise.
    """
    model, saes, settings, prompts = bench.model, bench.saes, bench.settings, bench.prompts
    chosen = list(prompts[settings.n_fit :][: settings.n_replaced])
    seeds = list(range(settings.n_fit, settings.n_fit + len(chosen)))
    plain = _draw(model, chosen, seeds, settings.batch_size)
    apart = _distances(plain, _draw(model, chosen, [seed + _OTHER_NOISE for seed in seeds], settings.batch_size)).mean()
    rows: list[dict[str, Cell]] = []
    for hookpoint in model.hookpoints:
        shared = {i.branch: sae for i, sae in saes.items() if i.hookpoint == hookpoint and i.t == "all"}
        row: dict[str, Cell] = {"hookpoint": hookpoint}
        for name, change in (("replaced by its reconstruction", _rebuild(shared)), ("removed", _remove)):
            with edit(model, change, [hookpoint], branches=tuple(shared) or BRANCHES):
                distances = _distances(plain, _draw(model, chosen, seeds, settings.batch_size))
            error = Z * distances.std(ddof=1) / math.sqrt(len(distances))
            row[name] = f"{distances.mean() / apart:.3f} ± {error / apart:.3f}"
        rows.append(row)
    notes = (
        f"Root mean square distance of the final latents from those of the unchanged image, mean over {len(chosen)} "
        "held-out prompts, as a share of the distance of two images of one prompt from different noise. Only SAEs for "
        "all times are used; a branch without one is left as it is.",
    )
    return Table("replacement", "Effect of replacing updates by their reconstruction", rows, notes)


def _rebuild(saes: dict[Branch, SparseAutoencoder]) -> UpdateEdit:
    def change(key: ActivationKey, update: Tensor) -> Tensor | None:
        if key.branch not in saes:
            return None
        last = update.movedim(1, -1)
        sae = saes[key.branch]
        rebuilt = sae.decode(sae.encode(last.flatten(0, -2).float())).view(last.shape)
        return rebuilt.movedim(-1, 1).to(update.dtype)

    return change


def _remove(_: ActivationKey, update: Tensor) -> Tensor:
    return torch.zeros_like(update)


def _visit(
    model: Diffuser,
    prompts: Sequence[str],
    first_seed: int,
    slots: Sequence[Slot],
    batch_size: int,
    see: Callable[[Slot, Tensor], None],
) -> None:
    """Sample the prompts and pass the updates [B, positions, d_in] at each slot to `see`."""
    hookpoints = list(dict.fromkeys(slot.hookpoint for slot in slots))
    steps = {slot.step for slot in slots}
    wanted = set(slots)

    def sink(key: ActivationKey, update: Tensor) -> None:
        slot = Slot(key.hookpoint, key.branch, -1 if key.step is None else key.step)
        if slot in wanted:
            see(slot, update.flatten(2).transpose(1, 2).float().cpu())

    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        seeds = [first_seed + start + i for i in range(len(part))]
        with record(model, hookpoints, steps=steps, sink=sink, stop=True):
            for _ in model.sample(part, seeds=seeds, last_step=max(steps)):
                pass


def _draw(model: Diffuser, prompts: list[str], seeds: list[int], batch_size: int) -> Tensor:
    """Final latents [N, C, h, w] of the prompts."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        *_, last = model.sample(prompts[rows], seeds=seeds[rows])
        parts.append(last.x.cpu())
    return torch.cat(parts)


def _distances(a: Tensor, b: Tensor) -> Floats:
    distances: Floats = (a - b).double().square().mean((1, 2, 3)).sqrt().numpy()
    return distances


def summary(sae: SparseAutoencoder, result: ReconstructionSums, n_bootstrap: int) -> dict[str, float]:
    """An SAE's figures over all steps together."""
    interval = bootstrap(
        (np.arange(len(result.errors)),),
        result.explained,
        n_resamples=n_bootstrap,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {
        "explained_variance": result.explained(),
        "explained_variance_low": float(interval.low),
        "explained_variance_high": float(interval.high),
        "explained_variance_of_pca": result.explained(pca=True),
        "cosine": float(np.mean(result.cosines)),
        "l0": result.n_active / result.n_positions,
        "dense_share": float((result.fired / result.n_positions > DENSE).mean()),
        "dead_share": float((result.fired == 0).mean()),
        "n_positions": result.n_positions,
        "d_sae": sae.cfg.d_sae,
    }


def _row(
    sae_id: SaeId, sae: SparseAutoencoder, step: str, result: ReconstructionSums, n_bootstrap: int
) -> dict[str, Cell]:
    of = summary(sae, result, n_bootstrap)
    low, high = of["explained_variance_low"], of["explained_variance_high"]
    return {
        "hookpoint": sae_id.hookpoint,
        "branch": sae_id.branch,
        "SAE for t": str(sae_id.t),
        "k of d_in": f"{sae.cfg.k} of {sae.cfg.d_in}",
        "step": step,
        "explained variance": f"{of['explained_variance']:.3f} ({low:.3f} to {high:.3f})",
        "PCA": round(of["explained_variance_of_pca"], 3),
        "cosine": round(of["cosine"], 3),
        "L0": round(of["l0"], 2),
        "dense": f"{100 * of['dense_share']:.1f} %",
    }


def _bench(subject: Subject, settings: SaeSettings) -> SaeBench:
    saes = {sae_id: core.load_sae(subject.saes, *sae_id) for sae_id in list_saes(subject.saes)}
    if not saes:
        raise SystemExit(f"There is no SAE in {subject.saes}. Train some with `python -m training sae`.")
    return SaeBench(subject.model, saes, subject.prompts, settings)


EVALUATION = Evaluation(
    name="sae",
    title="Sparse autoencoders",
    description=__doc__,
    settings=SaeSettings(),
    quick=QUICK,
    bench=_bench,
    parts=(reconstruction, replacement),
    per_collection=True,
    n_prompts=lambda settings: settings.n_fit + settings.n_images,
    compare=by_k,
)
