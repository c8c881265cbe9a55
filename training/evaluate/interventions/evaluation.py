"""What edits of concepts do to pictures, and when: moving a thing, changing the style, taking a thing away, and what
else changes with it.

Each arm is a way of getting what is asked (`interventions_arms`), over the same captions and seeds; intervals are over
objects. Edits have the same strengths at every stage; the published formula's betas are on another scale, and it stands
at the best of them.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from core.arrays import Floats
from core.diffusion.schedule import named_steps, step_times
from core.edits import Editor
from core.edits.kinds import ConceptEdit, GlobalEdit, RemoveEdit, SpatialEdit
from training.common.report import Cell, Table
from training.evaluate.common.judges import Judges
from training.evaluate.common.masks import Resampled, resampled
from training.evaluate.interventions.arms import Arm, Kind, Request, Unedited, draw_arm, labelled_objects, requests
from training.evaluate.interventions.outcomes import EditOutcome, Judge, JudgeOutputs
from training.evaluate.picturebook import held_out_scenes
from training.picturebook.world.scenes import caption_of

Split = Literal["sweep", "test"]
_SWEPT = 500
"""First of the seeds on which strengths are chosen."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_objects: int = 10
    """Things that are moved, and whose pictures change their style."""
    n_seeds: int = 10
    """Pictures of each thing and wish, where things are moved or taken away."""
    n_style_seeds: int = 3
    """The same where styles are changed."""
    n_sweep_seeds: int = 1
    """Other pictures of each thing and wish, on which strengths are swept and chosen, and windows slide."""
    n_targets: int | None = None
    """Quarters and styles asked for; None: all."""
    strengths: tuple[float, ...] = (2.0, 4.0, 8.0)
    """Of the edits that move, alike at every stage."""
    style_strengths: tuple[float, ...] = (2.0, 2.5, 3.0, 3.5)
    """Of the edits that change the style."""
    removal_strengths: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """Of the edits that take a thing away."""
    betas: tuple[float, ...] = (0.5, 2.0, 8.0)
    """Of the published formula that moves: multiples of the norm of a position's code."""
    style_betas: tuple[float, ...] = (64.0, 256.0, 1024.0)
    """Of the published formula that changes the style: they are shared out among the positions."""
    removal_betas: tuple[float, ...] = (-0.5, -2.0, -8.0)
    """Of the published formula where it takes away, as those that move."""
    width: int = 5
    """Steps of the window that slides."""
    stride: int = 4
    """Steps from one window to the next, and from one change of the prompt to the next."""
    num_inference_steps: int | None = None
    """Steps of the sampler; None: the model's own."""
    n_reference: int = 300
    """Unedited pictures of held-out captions that tell what is odd."""
    batch_size: int = 40
    """Pictures drawn together."""
    n_bootstrap: int = 1000
    """Resamples of the objects for each interval."""


QUICK = Settings(
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
"""Shows that it works; its figures mean little."""

FIGURES = {
    "fulfilled": "wish fulfilled",
    "low": "change elsewhere, low",
    "high": "change elsewhere, high",
    "layout": "layout IoU elsewhere",
}


class Bench:
    """The pictures of every arm, drawn and judged when they are first asked for."""

    def __init__(self, editor: Editor, judges: Judges, package: Path, settings: Settings) -> None:
        """`package` is where the judges' weights are."""
        self.editor, self.settings = editor, settings
        spec = editor.model.spec
        n_steps = settings.num_inference_steps
        self.n_steps = spec.num_inference_steps if n_steps is None else n_steps
        names = [stage.name for stage in spec.stages]
        self.stages = {kind: self._stages(dict.fromkeys([*names, EDITS[kind].default_stage])) for kind in KINDS}
        """First and last step of each stage at which wishes of a kind are tried."""
        self._judges, self._package = judges, package
        self._unedited = Unedited(editor.model, self.n_steps, settings.batch_size)
        self._looks: dict[tuple[str, int], JudgeOutputs] = {}
        self._seen: dict[tuple[Kind, Split, Arm], list[EditOutcome]] = {}

    def asked(self, kind: Kind, split: Split) -> list[Request]:
        """The changes that are asked for: those of one object stand together."""
        settings = self.settings
        seeds = range(self.n_seeds(kind)) if split == "test" else range(_SWEPT, _SWEPT + settings.n_sweep_seeds)
        return requests(kind, labelled_objects(self.editor, settings.n_objects), seeds, settings.n_targets)

    def n_seeds(self, kind: Kind) -> int:
        """Pictures of each thing and wish."""
        return self.settings.n_style_seeds if kind == "styling" else self.settings.n_seeds

    @cached_property
    def judge(self) -> Judge:
        """The judges, who have seen unedited pictures."""
        judge = Judge(self._judges, self._package)
        captions = [caption_of(scene).text for scene in held_out_scenes(self.settings.n_reference)]
        images: list[Image.Image] = []
        for start in range(0, len(captions), self.settings.batch_size):
            part = captions[start : start + self.settings.batch_size]
            seeds = range(10**6 + start, 10**6 + start + len(part))
            *_, last = self.editor.model.sample(part, seeds=seeds, num_inference_steps=self.n_steps)
            images += self.editor.model.decode(last.x)
        judge.know(images)
        log.info("%d unedited pictures are known", len(images))
        return judge

    def seen(self, kind: Kind, split: Split, arm: Arm) -> list[EditOutcome]:
        """The pictures of an arm."""
        if (kind, split, arm) not in self._seen:
            asked = self.asked(kind, split)
            old = self._look_unedited(asked)
            new = old if arm.method == "no edit" else self.judge.look(self._draw(arm, asked))
            self._seen[kind, split, arm] = self.judge.judge(asked, new, old)
            proportion = np.mean([one.fulfilled for one in self._seen[kind, split, arm]])
            log.info("%s, %s: %s, %.2f fulfilled", kind, split, arm, proportion)
        return self._seen[kind, split, arm]

    def _stages(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        windows = {name: named_steps(name, self.n_steps, self.editor.model.spec.stages) for name in names}
        return {name: (steps[0], steps[-1]) for name, steps in windows.items()}

    def _draw(self, arm: Arm, asked: Sequence[Request]) -> list[Image.Image]:
        return list(draw_arm(self.editor, arm, asked, self._unedited))

    def _look_unedited(self, asked: Sequence[Request]) -> JudgeOutputs:
        """Looked at once for all wishes of a thing and seed."""
        new = list(
            {
                (one.object_name, one.seed): one for one in asked if (one.object_name, one.seed) not in self._looks
            }.values()
        )
        if new:
            look = self.judge.look(self._draw(Arm("no edit"), new))
            self._looks |= {(one.object_name, one.seed): look.rows([i]) for i, one in enumerate(new)}
        return JudgeOutputs.joined([self._looks[one.object_name, one.seed] for one in asked])

    def mean(self, kind: Kind, split: Split, arm: Arm, name: str) -> Resampled:
        """Mean of a field of `Seen` over all pictures, drawn anew by object."""
        values = np.array([getattr(one, name) for one in self.seen(kind, split, arm)], dtype=np.float64)
        by_object: Floats = values.reshape(self.settings.n_objects, -1)
        return resampled(by_object, self.settings.n_bootstrap)

    def chosen(self, kind: Kind, method: str, stage: str) -> Arm:
        """The arm of a method and stage whose strength fulfils most wishes, the smallest of equals, where it is swept.

        Edits have one strength at all stages, the best at the stage that such edits are for; the published formula has
        its best at each.
        """
        at = EDITS[kind].default_stage if method == "edit" else stage
        arms = [arm for arm in self.swept(kind) if arm.method == method and arm.stage == at]
        best = max(arms, key=lambda arm: (self.mean(kind, "sweep", arm, "fulfilled").value, -abs(arm.strength or 0)))
        return best._replace(steps=self.stages[kind][stage], stage=stage)

    def swept(self, kind: Kind) -> list[Arm]:
        """The published formula and edits, at every stage and strength."""
        settings = self.settings
        betas, strengths = {
            "moving": (settings.betas, settings.strengths),
            "styling": (settings.style_betas, settings.style_strengths),
            "removing": (settings.removal_betas, settings.removal_strengths),
        }[kind]
        arms = []
        for stage, steps in self.stages[kind].items():
            arms += [Arm("published formula", steps, beta, stage) for beta in betas]
            arms += [Arm("edit", steps, strength, stage) for strength in strengths]
        return arms

    def row(self, kind: Kind, split: Split, arm: Arm) -> dict[str, Cell]:
        """A table's row."""
        row: dict[str, Cell] = {
            "": arm.method,
            "stage": arm.stage,
            "strength": None if arm.strength is None else format(arm.strength, "g"),
        }
        row |= {title: str(self.mean(kind, split, arm, name).estimate) for name, title in FIGURES.items()}
        if kind == "removing":
            row |= {"a place where it was": str(self.mean(kind, split, arm, "cleared").estimate)}
        odd, plain = self.mean(kind, split, arm, "odd"), self.mean(kind, split, Arm("no edit"), "odd")
        return row | {"artifacts more than unedited": str(odd.less(plain))}

    @property
    def notes(self) -> tuple[str, ...]:
        """How it was measured."""
        settings = self.settings
        return (
            f"{settings.n_objects} things, {self.n_steps} steps. Intervals: 95 %, over things.",
            "Fulfilled: the centre of the thing's mask is in the quarter, an absent thing being a failure; or the "
            "style classifier sees the style; or the thing is gone. Labels come from the first segmenter, masks from "
            "the second.",
            "Change: root mean square difference to the unedited picture of the same seed, in shares of the range of "
            "grey; low: of means over 8 x 8 pixels, high: of the rest. Elsewhere: neither in the quarter nor where the "
            "thing was; for a style, everywhere.",
            f"Artifacts: the share of pictures that are further from {settings.n_reference} unedited ones of held-out "
            "captions, in features of the first segmenter's encoder, than 99 % of those are from the others; less the "
            "share of the unedited pictures of the same captions.",
        )


def moving(bench: Bench) -> Table:
    """Moving things into quarters of the picture."""
    note = (
        "Prompt: the wish in words, such as `a cat left above on the grass`; the grammar has words for sides of "
        "another thing alone, none for places in the picture."
    )
    return _beside(bench, "moving", "Moving a thing into a quarter of the picture", note)


def styling(bench: Bench) -> Table:
    """Changing styles."""
    return _beside(
        bench, "styling", "Changing the style", "Prompt: the style's word in the caption, from the first step."
    )


def removing(bench: Bench) -> Table:
    """Taking things away."""
    note = (
        "Prompt: the caption without the thing, such as `on the grass`, from the first step. A place where it was: how "
        "much of the thing's former area shows a place, rather than another thing."
    )
    return _beside(bench, "removing", "Taking a thing away", note)


def sweep(bench: Bench) -> Table:
    """All strengths at all stages, on pictures of their own."""
    rows: list[dict[str, Cell]] = []
    for kind in KINDS:
        arms = [Arm("no edit"), *bench.swept(kind)]
        rows += [{"asked": kind} | bench.row(kind, "sweep", arm) for arm in arms]
    note = f"{bench.settings.n_sweep_seeds} seeds for each thing and wish, none of which is in the other tables."
    return Table("sweep", "Strengths by stage", rows, (note, *bench.notes))


def windows(bench: Bench) -> Table:
    """When edits act: a window that slides over the steps."""
    rows: list[dict[str, Cell]] = []
    settings = bench.settings
    for first in range(0, bench.n_steps - settings.width + 1, settings.stride):
        steps = (first, first + settings.width - 1)
        row: dict[str, Cell] = {"steps": f"{steps[0]} to {steps[1]}", "t": _times(bench, steps)}
        for kind in KINDS:
            arm = Arm("edit", steps, EDITS[kind].strength)
            row[f"{kind}: fulfilled"] = str(bench.mean(kind, "sweep", arm, "fulfilled").estimate)
            row[f"{kind}: change, low"] = str(bench.mean(kind, "sweep", arm, "low").estimate)
        rows.append(row)
    note = f"Strengths: {', '.join(f'{kind} {EDITS[kind].strength:g}' for kind in KINDS)}, the defaults."
    return Table("windows", "When edits act", rows, (note, *bench.notes))


def switching(bench: Bench) -> Table:
    """When the prompt still decides: the wish is written into it from a step on."""
    rows: list[dict[str, Cell]] = []
    for first in range(0, bench.n_steps, bench.settings.stride):
        arm = Arm("prompt from there on", (first, bench.n_steps - 1))
        row: dict[str, Cell] = {"from step": float(first), "t": f"{step_times(bench.n_steps)[first]:.2f}"}
        for kind in KINDS:
            row[f"{kind}: fulfilled"] = str(bench.mean(kind, "sweep", arm, "fulfilled").estimate)
            row[f"{kind}: layout IoU elsewhere"] = str(bench.mean(kind, "sweep", arm, "layout").estimate)
        rows.append(row)
    note = "The caption of the unedited picture until then, the caption with the wish from then on; nothing is trained."
    return Table("switching", "When a change of the prompt still changes the picture", rows, (note, *bench.notes))


KINDS: tuple[Kind, ...] = ("moving", "styling", "removing")
EDITS: dict[Kind, type[ConceptEdit]] = {"moving": SpatialEdit, "styling": GlobalEdit, "removing": RemoveEdit}
PARTS = (windows, switching, sweep, moving, styling, removing)
"""In this order."""


def _beside(bench: Bench, kind: Kind, title: str, note: str) -> Table:
    """Edits beside the controls and the published formula, at strengths chosen on other pictures."""
    arms = [Arm("no edit"), Arm("prompt")]
    for method in ("published formula", "edit"):
        arms += [bench.chosen(kind, method, stage) for stage in bench.stages[kind]]
    middle, late = (
        next(arm for arm in arms if arm.method == "edit" and arm.stage == stage.name)
        for stage in bench.editor.model.spec.stages[-2:]
    )
    proportion = bench.mean(kind, "test", late, "low").share_of(bench.mean(kind, "test", middle, "low"))
    notes = (
        f"{bench.n_seeds(kind)} seeds for each thing and wish. Strengths were chosen on other seeds: of edits one for "
        "all stages, of the published formula the best at each.",
        note,
        f"At low spatial frequencies {late.stage} edits change {proportion} of what {middle.stage} edits do.",
    )
    names = (*FIGURES, "odd", "there", *(["cleared"] if kind == "removing" else []))
    figures = [
        {**arm._asdict(), **{name: list(bench.mean(kind, "test", arm, name).estimate) for name in names}}
        for arm in arms
    ]
    rows = [bench.row(kind, "test", arm) for arm in arms]
    return Table(kind, title, rows, (*notes, *bench.notes), {"figures": figures})


def _times(bench: Bench, steps: tuple[int, int]) -> str:
    times = step_times(bench.n_steps)
    return f"{times[steps[0]]:.2f} to {times[steps[1]]:.2f}"
