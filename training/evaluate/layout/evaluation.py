"""How well, and how early, concepts foretell where the things of a prompt will be, and whether anything simpler does.

On held-out prompts, drawn once: every method sees the same evaluations of the U-Net, and is scored by intersection over
union with the masks of the final picture, over the things that its prompt names and that are there; places are left
out. (The one figure of Tinaz et al. 2025, arXiv 2504.15473, section 4: 0.26 at the first step of the middle block.)
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from core.arrays import Floats
from core.diffusion.diffuser import Diffuser
from core.diffusion.schedule import step_at, step_times
from core.segmentation.semantic import Segmenter
from training.common.report import Cell, Table
from training.evaluate.common.masks import Resampled, grid_iou, pixel_iou, resampled
from training.evaluate.layout.images import LayoutImages, joined, watch
from training.evaluate.layout.methods import Baseline, Read, baselines
from training.picturebook.world.captions import Caption

SETTLED = 0.9
"""A layout is settled from the step on at which a method has this share of the most that it ever reaches."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_images: int = 512
    """Held-out prompts on which the methods are scored."""
    n_fit: int = 256
    """Other held-out prompts, to which priors, probes and thresholds are fitted."""
    n_steps_each: int = 5
    """Steps, evenly spread from the first to the last; that of t = 0.5 comes with them."""
    num_inference_steps: int | None = None
    """Steps of the sampler; None: the model's own."""
    batch_size: int = 16
    """Pictures drawn together."""
    n_bootstrap: int = 1000
    """Resamples of the pictures for each interval."""


QUICK = Settings(n_images=32, n_fit=32, n_steps_each=3, num_inference_steps=10)
"""Shows that it works; its figures mean little."""


class Scored(NamedTuple):
    """What a method reached, [pictures, steps, things a caption]; not a number where there was nothing to foretell."""

    grid: Floats
    """Intersection over union on the hookpoint's grid."""
    pixels: Floats
    """The same in pixels, the grid's cells as they lie in the picture."""


class Measured(NamedTuple):
    """What came out."""

    scored: Mapping[Baseline, Scored]
    """By method."""
    n_named: int
    """Things that the prompts name."""
    n_missing: int
    """Those of them that are not in the final pictures."""


class Bench:
    """The pictures and what every method made of them: measured once, when it is first asked for."""

    def __init__(
        self,
        model: Diffuser,
        segmenters: Sequence[Segmenter],
        captions: Sequence[Caption],
        read: Read,
        settings: Settings,
    ) -> None:
        """The first of the two segmenters tells the truth; the first `n_fit` captions are for fitting."""
        self._model, self._segmenters, self._read = model, segmenters, read
        self.settings, self.captions = settings, captions[: settings.n_fit + settings.n_images]
        n_steps = settings.num_inference_steps
        self.n_steps = model.spec.num_inference_steps if n_steps is None else n_steps
        spread = np.linspace(0, self.n_steps - 1, settings.n_steps_each).round().astype(int).tolist()
        self.middle = step_at(0.5, self.n_steps)
        self.steps = tuple(sorted({*spread, self.middle}))

    @cached_property
    def measured(self) -> Measured:
        """Every method's scores."""
        n_fit, n_named, n_there = self.settings.n_fit, 0, 0
        fit = joined(list(self._watch(self.captions[:n_fit], 0)))
        log.info("%d pictures to fit to are drawn", n_fit)
        methods = list(baselines(fit, self._read, self.steps))
        parts: dict[Baseline, list[tuple[Floats, Floats]]] = {method: [] for method in methods}
        for images in self._watch(self.captions[n_fit:], n_fit):
            n_named += sum(len(caption.story.nouns) for caption in images.captions)
            n_there += int((images.targets >= 0).sum())
            for method in methods:
                truth = images.truth[method.hookpoint]
                masks = [method.masks(images, step) for step in self.steps]
                grid, pixels = (
                    np.stack([score(of, truth).numpy() for of in masks], axis=1) for score in (grid_iou, pixel_iou)
                )
                parts[method].append((grid, pixels))
        scored = {method: Scored(*map(np.concatenate, zip(*of, strict=True))) for method, of in parts.items()}
        return Measured(scored, n_named, n_named - n_there)

    @property
    def scored(self) -> Mapping[Baseline, Scored]:
        """Every method's scores."""
        return self.measured.scored

    def _watch(self, captions: Sequence[Caption], first_seed: int) -> Iterator[LayoutImages]:
        settings = self.settings
        return watch(
            self._model,
            self._segmenters,
            captions,
            first_seed,
            self.steps,
            settings.batch_size,
            settings.num_inference_steps,
        )

    def mean(self, method: Baseline, step: int, pixels: bool = False) -> Resampled:
        """Mean IoU at a step."""
        values = self.scored[method].pixels if pixels else self.scored[method].grid
        return resampled(values[:, self.steps.index(step)], self.settings.n_bootstrap)

    def find(self, name: str, of: Baseline) -> Baseline:
        """The method of that name on the same grid, the same branch if it has one, and told the same if both are."""
        there = [m for m in self.scored if m.name == name and m.hookpoint == of.hookpoint]
        return min(there, key=lambda m: (m.branch != of.branch, m.told != of.told))

    def time(self, step: int) -> str:
        """A column's name."""
        return f"t = {step_times(self.n_steps)[step]:.2f}"

    @property
    def notes(self) -> tuple[str, ...]:
        """How it was measured."""
        settings = self.settings
        return (
            f"{len(self.captions[settings.n_fit :])} held-out prompts, {self.measured.n_named} things named in them; "
            f"{self.measured.n_missing} of those are not in the final picture (less than half of the smallest "
            "drawing's area), which leaves nothing to foretell: they are left out. The mean is over things, the "
            "intervals (95 %) over pictures.",
            f"Priors, thresholds and probes are fitted to {settings.n_fit} other held-out prompts, each at its own "
            "step; concepts were counted when they were labelled, over all steps together, on other pictures.",
            "Told: whether the method is told which things the prompt names. Prior of each thing: its mean mask where "
            "a prompt names it; of each role: that of all things that stand in the same relation (left of another, "
            "...), whatever they are.",
        )


def grid(bench: Bench) -> Table:
    """Mean IoU at the hookpoints' resolution."""
    note = "The truth is the majority of each cell, so that the true masks through the grid have 1 by construction."
    return _by_step(bench, "grid", "Layout foretold: mean IoU on the hookpoint's grid", note, pixels=False)


def pixels(bench: Bench) -> Table:
    """Mean IoU of the same masks in the picture's pixels: what the grid alone costs is the ceiling."""
    note = "In pixels: the masks of `grid` as they lie in the picture, against the masks of the picture itself."
    return _by_step(bench, "pixels", "Layout foretold: mean IoU in the picture's pixels", note, pixels=True)


def settled(bench: Bench) -> Table:
    """How early the layout is settled: what share of the ceiling is reached when."""
    rows: list[dict[str, Cell]] = []
    for method in bench.scored:
        if method.name.startswith(("prior", "true", "second")):
            continue  # these know of no step
        ceiling = bench.find("true masks through the grid", method)
        means = [bench.mean(method, step, pixels=True).value for step in bench.steps]
        shares = [
            bench.mean(method, step, pixels=True).share_of(bench.mean(ceiling, step, pixels=True))
            for step in bench.steps
        ]
        early = [step for step, mean in zip(bench.steps, means, strict=True) if mean >= SETTLED * max(means)]
        row = _identity(method) | {bench.time(s): str(of) for s, of in zip(bench.steps, shares, strict=True)}
        rows.append(row | {"settled at": bench.time(early[0]) if early else None})
    notes = (
        "Shares of the mean IoU that the true masks through the grid have in pixels. Settled: the first of these steps "
        f"at which a method has {100 * SETTLED:.0f} % of the most that it has at any of them.",
        *bench.notes,
    )
    return Table("settled", "How early the layout is settled", rows, notes)


def beside(bench: Bench) -> Table:
    """The concepts against what stands beside them, on the same things, at the first step and in the middle."""
    rows: list[dict[str, Cell]] = []
    for method in bench.scored:
        if not method.name.startswith("concepts"):
            continue
        for step in (bench.steps[0], bench.middle):
            mean = bench.mean(method, step)
            row = _identity(method) | {"step": bench.time(step), "mean IoU": str(mean.estimate)}
            for name in ("prior of each thing", "prior of each role", "cross-attention"):
                row[f"less {name}"] = str(mean.less(bench.mean(bench.find(name, method), step)))
            row["of the linear probe"] = str(mean.share_of(bench.mean(bench.find("linear probe", method), step)))
            rows.append(row)
    notes = (
        "On the hookpoint's grid; differences and shares of means over the same things, with paired intervals. The "
        "priors and cross-attention are told the nouns; the probe is told as much as the method.",
        *bench.notes,
    )
    return Table("beside", "Layout by concepts, beside what is simpler", rows, notes)


PARTS = (grid, pixels, settled, beside)
"""In this order."""


def _by_step(bench: Bench, name: str, title: str, note: str, pixels: bool) -> Table:
    rows, figures = [], []
    for method in bench.scored:
        estimates = {step: bench.mean(method, step, pixels).estimate for step in bench.steps}
        rows.append(_identity(method) | {bench.time(step): str(estimate) for step, estimate in estimates.items()})
        by_step = {str(step): list(estimate) for step, estimate in estimates.items()}
        figures.append({**_identity(method), "mean_iou": by_step})
    return Table(name, title, rows, (note, *bench.notes), {"figures": figures, "n_steps": bench.n_steps})


def _identity(method: Baseline) -> dict[str, Cell]:
    told = "yes" if method.told else "no"  # as text: a table shows what is False as something amiss
    return {"hookpoint": method.hookpoint, "branch": method.branch, "method": method.name, "told": told}
