"""What edits of concepts change in the image, and when: moving an object, changing the style, removing an object, and
side effects.

Compared over the same captions and seeds: our edits by stage of sampling (early, middle, late), the edit of Tinaz et
al. 2025 (arXiv 2504.15473), the *prompt-only baseline*, which writes the request into the prompt, and no edit. *Success
rate*: how often the image shows what was requested, by judges that had no part in labelling the concepts.
*Out-of-distribution rate*: how often the image is further from unedited images than 99 % of those are from each other.
"""

from core.diffusion.schedule import step_times
from core.edits import load_editor
from training.common.report import Cell, Table
from training.evaluate.common.evaluation import Evaluation, Subject
from training.evaluate.common.judges import load_judges
from training.evaluate.interventions.arms import Arm, Kind
from training.evaluate.interventions.bench import EDITS, FIGURES, KINDS, QUICK, InterventionBench, InterventionSettings


def moving(bench: InterventionBench) -> Table:
    """Moving objects into quarters of the image."""
    note = (
        "Prompt-only baseline: the request in words, such as `a cat left above on the grass`; the grammar has words "
        "for the sides of another object, but none for positions in the image."
    )
    return _comparison(bench, "moving", "Moving an object into a quarter of the image", note)


def styling(bench: InterventionBench) -> Table:
    """Changing styles."""
    note = "Prompt-only baseline: the style's word in the caption, from the first step."
    return _comparison(bench, "styling", "Changing the style", note)


def removing(bench: InterventionBench) -> Table:
    """Removing objects."""
    note = (
        "Prompt-only baseline: the caption without the object, such as `on the grass`, from the first step. Background "
        "restored: share of the object's former area that shows a background rather than another object."
    )
    return _comparison(bench, "removing", "Removing an object", note)


def sweep(bench: InterventionBench) -> Table:
    """All strengths at all stages, on images of their own."""
    rows: list[dict[str, Cell]] = []
    for kind in KINDS:
        arms = [Arm("no edit"), *bench.swept(kind)]
        rows += [{"request": kind} | bench.row(kind, "sweep", arm) for arm in arms]
    note = f"{bench.settings.n_sweep_seeds} seeds per object and target, none of which is in the other tables."
    return Table("sweep", "Strengths by stage", rows, (note, *bench.notes))


def windows(bench: InterventionBench) -> Table:
    """When edits act, by a sliding window of steps."""
    rows: list[dict[str, Cell]] = []
    settings = bench.settings
    for first in range(0, bench.n_steps - settings.width + 1, settings.stride):
        steps = (first, first + settings.width - 1)
        row: dict[str, Cell] = {"steps": f"{steps[0]} to {steps[1]}", "t": _times(bench, steps)}
        for kind in KINDS:
            arm = Arm("edit", steps, EDITS[kind].strength)
            row[f"{kind}: success rate"] = str(bench.mean(kind, "sweep", arm, "success").estimate)
            row[f"{kind}: change, low"] = str(bench.mean(kind, "sweep", arm, "low").estimate)
        rows.append(row)
    strengths = ", ".join(f"{kind} {EDITS[kind].strength:g}" for kind in KINDS)
    note = f"Default strengths: {strengths}."
    return Table("windows", "When edits act", rows, (note, *bench.notes))


def switching(bench: InterventionBench) -> Table:
    """Until when the prompt decides: the request is written into it from a step on."""
    rows: list[dict[str, Cell]] = []
    for first in range(0, bench.n_steps, bench.settings.stride):
        arm = Arm("prompt switched", (first, bench.n_steps - 1))
        row: dict[str, Cell] = {"from step": float(first), "t": f"{step_times(bench.n_steps)[first]:.2f}"}
        for kind in KINDS:
            row[f"{kind}: success rate"] = str(bench.mean(kind, "sweep", arm, "success").estimate)
            row[f"{kind}: layout IoU elsewhere"] = str(bench.mean(kind, "sweep", arm, "layout").estimate)
        rows.append(row)
    note = "The caption of the unedited image before that step, the caption with the request from that step on."
    return Table("switching", "Switching the prompt during sampling", rows, (note, *bench.notes))


def _comparison(bench: InterventionBench, kind: Kind, title: str, note: str) -> Table:
    """Edits against the baselines and Tinaz et al. 2025, at strengths chosen on other images."""
    arms = [Arm("no edit"), Arm("prompt-only baseline")]
    for method in ("Tinaz et al. 2025", "edit"):
        arms += [bench.chosen(kind, method, stage) for stage in bench.stages[kind]]
    middle, late = (
        next(arm for arm in arms if arm.method == "edit" and arm.stage == stage.name)
        for stage in bench.editor.model.spec.stages[-2:]
    )
    proportion = bench.mean(kind, "test", late, "low").over(bench.mean(kind, "test", middle, "low"))
    notes = (
        f"{bench.n_seeds(kind)} seeds per object and target. Strengths were chosen on other seeds: one for all stages "
        "of our edits, the best at each stage of Tinaz et al. 2025.",
        note,
        f"At low spatial frequencies the change by {late.stage} edits is {proportion} times that by {middle.stage} "
        "edits.",
    )
    names = (*FIGURES, "out_of_distribution", "present", *(["cleared"] if kind == "removing" else []))
    figures = [
        {**arm._asdict(), **{name: list(bench.mean(kind, "test", arm, name).estimate) for name in names}}
        for arm in arms
    ]
    rows = [bench.row(kind, "test", arm) for arm in arms]
    return Table(kind, title, rows, (*notes, *bench.notes), {"figures": figures})


def _times(bench: InterventionBench, steps: tuple[int, int]) -> str:
    times = step_times(bench.n_steps)
    return f"{times[steps[0]]:.2f} to {times[steps[1]]:.2f}"


def _bench(subject: Subject, settings: InterventionSettings) -> InterventionBench:
    editor = load_editor(subject.model, subject.saes)
    return InterventionBench(editor, load_judges(subject.package), subject.package, settings)


EVALUATION = Evaluation(
    name="interventions",
    title="Interventions",
    description=__doc__,
    settings=InterventionSettings(),
    quick=QUICK,
    bench=_bench,
    parts=(windows, switching, sweep, moving, styling, removing),
    per_collection=True,
)
