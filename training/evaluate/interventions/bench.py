"""The images of every arm of the interventions, and their outcomes."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from core.arrays import Floats
from core.diffusion.schedule import named_steps
from core.edits import Editor
from core.edits.kinds import ConceptEdit, GlobalEdit, RemoveEdit, SpatialEdit
from training.common.report import Cell
from training.evaluate.common.judges import Judges
from training.evaluate.common.masks import Resampled, resampled
from training.evaluate.common.scenes import held_out_scenes
from training.evaluate.interventions.arms import Arm, Kind, Request, Unedited, draw_arm, labelled_objects, make_requests
from training.evaluate.interventions.outcomes import EditOutcome, Judge, JudgeOutputs
from training.picturebook.world.scenes import caption_of

KINDS: tuple[Kind, ...] = ("moving", "styling", "removing")
EDITS: dict[Kind, type[ConceptEdit]] = {"moving": SpatialEdit, "styling": GlobalEdit, "removing": RemoveEdit}
Split = Literal["sweep", "test"]
_SWEPT = 500
"""First of the seeds on which strengths are chosen."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InterventionSettings:
    """How much is measured."""

    n_objects: int = 10
    """Objects that are moved or removed, and whose images change their style."""
    n_seeds: int = 10
    """Images per object and target, for moving and removing."""
    n_style_seeds: int = 3
    """Images per object and target, for styling."""
    n_sweep_seeds: int = 1
    """Other images per object and target, for sweeps, the choice of strengths, and sliding windows."""
    n_targets: int | None = None
    """Quarters and styles requested; None for all."""
    strengths: tuple[float, ...] = (2.0, 4.0, 8.0)
    """Strengths of moving edits, the same at every stage."""
    style_strengths: tuple[float, ...] = (2.0, 2.5, 3.0, 3.5)
    """Strengths of style edits."""
    removal_strengths: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """Strengths of removing edits."""
    betas: tuple[float, ...] = (0.5, 2.0, 8.0)
    """Betas of Tinaz et al. 2025 for moving: multiples of the norm of a position's code."""
    style_betas: tuple[float, ...] = (64.0, 256.0, 1024.0)
    """Their betas for styling, divided among the positions."""
    removal_betas: tuple[float, ...] = (-0.5, -2.0, -8.0)
    """Their betas for removing, on the scale of those for moving."""
    width: int = 5
    """Steps in the sliding window."""
    stride: int = 4
    """Steps between windows, and between switches of the prompt."""
    num_inference_steps: int | None = None
    """Steps of the sampler; None for the model's default."""
    n_reference: int = 300
    """Unedited images of held-out captions that define the distribution."""
    batch_size: int = 40
    """Images sampled together."""
    n_bootstrap: int = 1000
    """Bootstrap resamples of the objects for each interval."""


QUICK = InterventionSettings(
    n_objects=3,
    n_seeds=1,
    n_style_seeds=1,
    n_targets=2,
    strengths=(4.0,),
    style_strengths=(3.0,),
    betas=(1.0,),
    style_betas=(256.0,),
    removal_strengths=(2.0,),
    removal_betas=(-1.0,),
    stride=6,
    width=6,
    num_inference_steps=12,
    n_reference=40,
)
"""A smoke test; its figures mean little."""

FIGURES = {
    "success": "success rate",
    "low": "change elsewhere, low",
    "high": "change elsewhere, high",
    "layout": "layout IoU elsewhere",
}
"""Columns of tables by field of `EditOutcome`."""


class InterventionBench:
    """The images of every arm, sampled and judged on first use."""

    def __init__(self, editor: Editor, judges: Judges, package: Path, settings: InterventionSettings) -> None:
        """`package` is where the judges' weights are."""
        self.editor, self.settings = editor, settings
        spec = editor.model.spec
        n_steps = settings.num_inference_steps
        self.n_steps = spec.num_inference_steps if n_steps is None else n_steps
        names = [stage.name for stage in spec.stages]
        self.stages = {kind: self._stages(dict.fromkeys([*names, EDITS[kind].default_stage])) for kind in KINDS}
        """First and last step of each stage at which requests of a kind are tried."""
        self._judges, self._package = judges, package
        self._unedited = Unedited(editor.model, self.n_steps, settings.batch_size)
        self._outputs: dict[tuple[str, int], JudgeOutputs] = {}
        self._outcomes: dict[tuple[Kind, Split, Arm], list[EditOutcome]] = {}

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """The objects that requests are about."""
        return labelled_objects(self.editor, self.settings.n_objects)

    def requests(self, kind: Kind, split: Split) -> list[Request]:
        """The requests of a kind, grouped by object."""
        settings = self.settings
        seeds = range(self.n_seeds(kind)) if split == "test" else range(_SWEPT, _SWEPT + settings.n_sweep_seeds)
        return make_requests(kind, self.objects, seeds, settings.n_targets)

    def n_seeds(self, kind: Kind) -> int:
        """Images per object and target."""
        return self.settings.n_style_seeds if kind == "styling" else self.settings.n_seeds

    @cached_property
    def judge(self) -> Judge:
        """The judges, fitted on unedited images."""
        judge = Judge(self._judges, self._package)
        captions = [caption_of(scene).text for scene in held_out_scenes(self.settings.n_reference)]
        images: list[Image.Image] = []
        for start in range(0, len(captions), self.settings.batch_size):
            part = captions[start : start + self.settings.batch_size]
            seeds = range(10**6 + start, 10**6 + start + len(part))
            *_, last = self.editor.model.sample(part, seeds=seeds, num_inference_steps=self.n_steps)
            images += self.editor.model.decode(last.x)
        judge.fit(images)
        log.info("judges fitted on %d unedited images", len(images))
        return judge

    def outcomes(self, kind: Kind, split: Split, arm: Arm) -> list[EditOutcome]:
        """The outcomes of an arm's images."""
        if (kind, split, arm) not in self._outcomes:
            requests = self.requests(kind, split)
            old = self._look_unedited(requests)
            new = old if arm.method == "no edit" else self.judge.look(self._draw(arm, requests))
            self._outcomes[kind, split, arm] = self.judge.judge(requests, new, old)
            proportion = np.mean([one.success for one in self._outcomes[kind, split, arm]])
            log.info("%s, %s: %s, success rate %.2f", kind, split, arm, proportion)
        return self._outcomes[kind, split, arm]

    def _stages(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        windows = {name: named_steps(name, self.n_steps, self.editor.model.spec.stages) for name in names}
        return {name: (steps[0], steps[-1]) for name, steps in windows.items()}

    def _draw(self, arm: Arm, requests: Sequence[Request]) -> list[Image.Image]:
        return list(draw_arm(self.editor, arm, requests, self._unedited))

    def _look_unedited(self, requests: Sequence[Request]) -> JudgeOutputs:
        """Outputs for the unedited images, computed once per object and seed."""
        by_image = {(one.object_name, one.seed): one for one in requests}
        new = [one for key, one in by_image.items() if key not in self._outputs]
        if new:
            outputs = self.judge.look(self._draw(Arm("no edit"), new))
            self._outputs |= {(one.object_name, one.seed): outputs.rows([i]) for i, one in enumerate(new)}
        return JudgeOutputs.joined([self._outputs[one.object_name, one.seed] for one in requests])

    def mean(self, kind: Kind, split: Split, arm: Arm, name: str) -> Resampled:
        """Mean of a field of `EditOutcome` over all images, resampled by object."""
        values = np.array([getattr(one, name) for one in self.outcomes(kind, split, arm)], dtype=np.float64)
        by_object: Floats = values.reshape(self.settings.n_objects, -1)
        return resampled(by_object, self.settings.n_bootstrap)

    def chosen(self, kind: Kind, method: str, stage: str) -> Arm:
        """The arm of a method and stage with the strength of the highest success rate in the sweep, the smallest of
        ties.

        Edits have one strength for all stages, the best at their default stage; Tinaz et al. 2025 has the best of each.
        """
        at = EDITS[kind].default_stage if method == "edit" else stage
        arms = [arm for arm in self.swept(kind) if arm.method == method and arm.stage == at]
        best = max(arms, key=lambda arm: (self.mean(kind, "sweep", arm, "success").value, -abs(arm.strength or 0)))
        return best._replace(steps=self.stages[kind][stage], stage=stage)

    def swept(self, kind: Kind) -> list[Arm]:
        """Tinaz et al. 2025 and edits, at every stage and strength."""
        settings = self.settings
        betas, strengths = {
            "moving": (settings.betas, settings.strengths),
            "styling": (settings.style_betas, settings.style_strengths),
            "removing": (settings.removal_betas, settings.removal_strengths),
        }[kind]
        arms = []
        for stage, steps in self.stages[kind].items():
            arms += [Arm("Tinaz et al. 2025", steps, beta, stage) for beta in betas]
            arms += [Arm("edit", steps, strength, stage) for strength in strengths]
        return arms

    def row(self, kind: Kind, split: Split, arm: Arm) -> dict[str, Cell]:
        """The table row of an arm."""
        row: dict[str, Cell] = {
            "method": arm.method,
            "stage": arm.stage,
            "strength": None if arm.strength is None else format(arm.strength, "g"),
        }
        row |= {title: str(self.mean(kind, split, arm, name).estimate) for name, title in FIGURES.items()}
        if kind == "removing":
            row |= {"background restored": str(self.mean(kind, split, arm, "cleared").estimate)}
        name = "out_of_distribution"
        edited, plain = (self.mean(kind, split, one, name) for one in (arm, Arm("no edit")))
        return row | {"out-of-distribution rate, minus unedited": str(edited.minus(plain))}

    @property
    def notes(self) -> tuple[str, ...]:
        """How it was measured."""
        settings = self.settings
        return (
            f"{settings.n_objects} objects, {self.n_steps} steps. 95 % intervals over objects.",
            "Success: the centre of the object's mask is in the quarter (an absent object is a failure), or the style "
            "classifier sees the style, or the object is gone. Concepts were labelled with the first segmenter, images "
            "are judged with the second.",
            "Change: root mean square difference from the unedited image of the same seed, as a share of the value "
            "range; low: of means over 8 x 8 pixels, high: of the rest. Elsewhere: neither in the quarter nor where "
            "the object was; for a style, everywhere.",
            f"Out-of-distribution rate: share of images further from {settings.n_reference} unedited images of "
            "held-out captions, in features of the first segmenter's encoder, than 99 % of those are from the others; "
            "minus the share of unedited images of the same captions.",
        )
