"""How early, and how well, concepts predict where the objects of a prompt will be, and whether anything simpler does.

Every held-out prompt is sampled once, and every method reads the same U-Net evaluations. A method is scored by the
intersection over union (IoU) of its masks with those of the final image, over the objects that the prompt names and
that appear; backgrounds are left out. Methods that use the prompt's classes choose only among the objects the prompt
names; the preview, which shows the image itself, needs no such hint. (Tinaz et al. 2025, arXiv 2504.15473, section 4,
report an IoU of 0.26 at the first step of the middle block.)
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
from training.evaluate.common.evaluation import Evaluation, Subject
from training.evaluate.common.judges import load_judges
from training.evaluate.common.masks import Resampled, grid_iou, pixel_iou, resampled
from training.evaluate.common.scenes import held_out_scenes
from training.evaluate.layout.images import LayoutImages, joined, watch
from training.evaluate.layout.methods import Baseline, Read, baselines, read_collection
from training.picturebook.world.captions import Caption
from training.picturebook.world.scenes import caption_of

SETTLED = 0.9
"""A layout counts as settled once a method reaches this share of its own best IoU."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayoutSettings:
    """How much is measured."""

    n_images: int = 512
    """Held-out prompts on which the methods are scored."""
    n_fit: int = 256
    """Other held-out prompts, on which priors, probes and thresholds are fitted."""
    n_steps_each: int = 5
    """Evenly spaced sampler steps from first to last; the step of t = 0.5 is added."""
    num_inference_steps: int | None = None
    """Steps of the sampler; None for the model's default."""
    batch_size: int = 16
    """Images sampled together."""
    n_bootstrap: int = 1000
    """Bootstrap resamples of the images for each interval."""


QUICK = LayoutSettings(n_images=32, n_fit=32, n_steps_each=3, num_inference_steps=10)
"""A smoke test; its figures mean little."""


class Scored(NamedTuple):
    """IoU of one method, [images, steps, objects per caption]; NaN where there is nothing to predict."""

    grid: Floats
    """On the hookpoint's grid."""
    pixels: Floats
    """In pixels, each grid cell covering its part of the image."""


class Measured(NamedTuple):
    """Scores of all methods."""

    scored: Mapping[Baseline, Scored]
    """By method."""
    n_named: int
    """Objects named in the prompts."""
    n_missing: int
    """Those of them that are not in the final images."""


class LayoutBench:
    """The images and the scores of every method on them; measured once, on first use."""

    def __init__(
        self,
        model: Diffuser,
        segmenters: Sequence[Segmenter],
        captions: Sequence[Caption],
        read: Read,
        settings: LayoutSettings,
    ) -> None:
        """The first segmenter gives the ground truth, the second a reference; the first `n_fit` captions are for
        fitting."""
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
        log.info("sampled %d images to fit on", n_fit)
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
        """The method of that name on the same grid, preferably of the same branch and with the same use of classes."""
        there = [m for m in self.scored if m.name == name and m.hookpoint == of.hookpoint]
        return min(there, key=lambda m: (m.branch != of.branch, m.uses_prompt_classes != of.uses_prompt_classes))

    def time(self, step: int) -> str:
        """Name of a step's column."""
        return f"t = {step_times(self.n_steps)[step]:.2f}"

    @property
    def notes(self) -> tuple[str, ...]:
        """How it was measured."""
        settings = self.settings
        return (
            f"{len(self.captions[settings.n_fit :])} held-out prompts, {self.measured.n_named} objects named in them; "
            f"{self.measured.n_missing} of those are not in the final image (less than half the area of the smallest "
            "drawing) and are left out. Means are over objects, 95 % intervals over images.",
            f"Priors, thresholds and probes are fitted on {settings.n_fit} other held-out prompts, separately for each "
            "step; the concepts' statistics come from labelling, from other images and all steps together.",
            "Prompt's classes: whether the method chooses among the objects that the prompt names. Prior of each "
            "object: its mean mask where a prompt names it; of each role: the mean mask of all objects in the same "
            "relation (such as left of another), whatever they are. Concepts, readout: naive Bayes on the latents' "
            "class counts; concepts, dictionary: the mean label of the active concepts (Tinaz et al. 2025).",
        )


def grid(bench: LayoutBench) -> Table:
    """Mean IoU at the hookpoints' resolution."""
    note = "The ground truth is each cell's majority class, so the true masks on the grid score 1 by construction."
    return _by_step(bench, "grid", "Layout prediction: mean IoU on the hookpoint's grid", note, pixels=False)


def pixels(bench: LayoutBench) -> Table:
    """Mean IoU of the same masks in pixels; the true masks on the grid give the ceiling."""
    note = "The masks of `grid` at the size of the image, against the masks of the image itself."
    return _by_step(bench, "pixels", "Layout prediction: mean IoU in pixels", note, pixels=True)


def settled(bench: LayoutBench) -> Table:
    """How early the layout is settled: the share of the ceiling reached at each step."""
    rows: list[dict[str, Cell]] = []
    for method in bench.scored:
        if method.name.startswith(("prior", "true", "second")):
            continue  # these do not depend on the step
        ceiling = bench.find("true masks on the grid", method)
        means = [bench.mean(method, step, pixels=True).value for step in bench.steps]
        shares = [
            bench.mean(method, step, pixels=True).over(bench.mean(ceiling, step, pixels=True)) for step in bench.steps
        ]
        early = [step for step, mean in zip(bench.steps, means, strict=True) if mean >= SETTLED * max(means)]
        row = _identity(method) | {bench.time(s): str(of) for s, of in zip(bench.steps, shares, strict=True)}
        rows.append(row | {"settled at": bench.time(early[0]) if early else None})
    notes = (
        "As a share of the mean IoU in pixels of the true masks on the grid. Settled: the first of these steps at "
        f"which a method reaches {100 * SETTLED:.0f} % of its best.",
        *bench.notes,
    )
    return Table("settled", "How early the layout is settled", rows, notes)


def differences(bench: LayoutBench) -> Table:
    """Concepts against the baselines on the same objects, at the first step and in the middle."""
    rows: list[dict[str, Cell]] = []
    for method in bench.scored:
        if not method.name.startswith("concepts"):
            continue
        for step in (bench.steps[0], bench.middle):
            mean = bench.mean(method, step)
            row = _identity(method) | {"step": bench.time(step), "mean IoU": str(mean.estimate)}
            for name in ("prior of each object", "prior of each role", "cross-attention"):
                row[f"minus {name}"] = str(mean.minus(bench.mean(bench.find(name, method), step)))
            row["share of the linear probe's"] = str(mean.over(bench.mean(bench.find("linear probe", method), step)))
            rows.append(row)
    notes = (
        "On the hookpoint's grid; differences and ratios of means over the same objects, with paired intervals. The "
        "priors and cross-attention use the prompt's classes; the probe uses them if the method does.",
        *bench.notes,
    )
    return Table("differences", "Layout by concepts against simpler methods", rows, notes)


def _by_step(bench: LayoutBench, name: str, title: str, note: str, pixels: bool) -> Table:
    rows, figures = [], []
    for method in bench.scored:
        estimates = {step: bench.mean(method, step, pixels).estimate for step in bench.steps}
        rows.append(_identity(method) | {bench.time(step): str(estimate) for step, estimate in estimates.items()})
        by_step = {str(step): list(estimate) for step, estimate in estimates.items()}
        figures.append({**_identity(method), "mean_iou": by_step})
    return Table(name, title, rows, (note, *bench.notes), {"figures": figures, "n_steps": bench.n_steps})


def _identity(method: Baseline) -> dict[str, Cell]:
    # As text: tables print False in bold, as a missed target.
    classes = "yes" if method.uses_prompt_classes else "no"
    return {"hookpoint": method.hookpoint, "branch": method.branch, "method": method.name, "prompt's classes": classes}


def _bench(subject: Subject, settings: LayoutSettings) -> LayoutBench:
    captions = [caption_of(scene) for scene in held_out_scenes(settings.n_fit + settings.n_images)]
    segmenters = tuple(load_judges(subject.package).segmenters.values())
    return LayoutBench(subject.model, segmenters, captions, read_collection(subject.saes), settings)


EVALUATION = Evaluation(
    name="layout",
    title="Layout prediction",
    description=__doc__,
    settings=LayoutSettings(),
    quick=QUICK,
    bench=_bench,
    parts=(grid, pixels, settled, differences),
    per_collection=True,
)
