"""API endpoints: `/generate`, `/attribute`, `/concepts`, `/concept`, `/layout`, `/intervene`.

Their inputs are hidden components of their own, because only components check files: a path that a client makes up
never reaches a function.
"""

import json
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from core.information.results import Attribution
from core.spec import default_hookpoint
from core.ui.backend import jobs
from core.ui.backend.dictionary import no_concepts
from core.ui.backend.errors import JobError, refuse
from core.ui.backend.fields import (
    IMAGE_OPTIONS,
    LOOK_UP,
    PROGRESS,
    ChoiceField,
    ImageField,
    NumberField,
    TextField,
    told,
)
from core.ui.backend.inputs import (
    MAX_QUERY,
    concept_number,
    generation_problems,
    image_problem,
    prompt_problem,
    rel_error_problem,
    seed_problem,
    shown,
    step_problem,
)
from core.ui.backend.jobs import EditProgress, Waiting
from core.ui.backend.runtime import MAX_PROMPT, Runtime
from core.ui.interventions.api import intervention
from core.ui.interventions.request import KINDS, REGIONS, offered_stages
from core.ui.look.scene import Scene

if TYPE_CHECKING:
    from core.concepts.table import ConceptTable
    from core.concepts.trace import SaeSite


def build_api(runtime: Runtime) -> None:
    """Add the endpoints to the surrounding `gr.Blocks`."""
    spec = runtime.spec

    def generate(
        prompt: str, seed: float, steps: float, guidance: float, progress: gr.Progress = PROGRESS
    ) -> Iterator[tuple[Any, Any]]:
        """Generate an image of `prompt`. Returns the image and the settings that reproduce it."""
        refuse(*generation_problems(runtime, prompt, seed, steps, guidance))
        text = prompt.strip()
        for item in told(jobs.generate(runtime, None, text, int(seed), int(steps), float(guidance)), progress):
            if isinstance(item, Scene):
                settings = {
                    "model": runtime.name,
                    "prompt": text,
                    "seed": item.seed,
                    "num_inference_steps": item.steps,
                    "guidance_scale": item.guidance,
                }
                yield item.image, settings
            else:
                yield gr.skip(), gr.skip()

    def attribute(
        image: str, prompt: str, words: str, given: str, rel_error: float, seed: float, progress: gr.Progress = PROGRESS
    ) -> Iterator[Any]:
        """Bits that each of `words` (separated by commas; all if empty) of `prompt` contributes to `image`.

        `given` is `rest` (on top of the other words) or `nothing` (on its own). A word named twice counts once; words
        are returned in the prompt's order. Returns totals, maps, timeline, the two error curves, errors and settings.
        """
        refuse(image_problem(image), prompt_problem(runtime, prompt))
        refuse(rel_error_problem(rel_error), seed_problem(seed))
        wanted = [word.strip() for word in (words or "").split(",") if word.strip()] or None
        work = _attribution(runtime, image, prompt.strip(), wanted, given, float(rel_error), int(seed))
        for item in told(work, progress):
            yield json.loads(json.dumps(item.to_dict())) if isinstance(item, Attribution) else gr.skip()

    def layout(
        prompt: str,
        seed: float,
        steps: float,
        guidance: float,
        step: float,
        hookpoint: str,
        branch: str,
        method: str,
        progress: gr.Progress = PROGRESS,
    ) -> Iterator[Any]:
        """Predict the layout of the image of `prompt` from the activations at one denoising step, counted from 0.

        An empty `hookpoint` is the model's second. Returns labels [h][w] (index into classes, -1 for none), the
        classes, and their scores [class][h][w].
        """
        refuse(*generation_problems(runtime, prompt, seed, steps, guidance))
        refuse(step_problem(step, steps), _hookpoint_problem(runtime, hookpoint))
        options = {"step": int(step), "hookpoint": hookpoint.strip() or None, "branch": branch, "method": method}
        run = {"num_inference_steps": int(steps), "guidance_scale": float(guidance)}
        for item in told(jobs.predict_layout(runtime, None, prompt.strip(), int(seed), **options, **run), progress):
            if isinstance(item, Waiting):
                yield gr.skip()
            else:
                scores = item.scores.astype(float).round(4).tolist()
                yield {"labels": item.labels.tolist(), "classes": list(item.classes), "scores": scores}

    def intervene(
        prompt: str,
        seed: float,
        steps: float,
        guidance: float,
        kind: str,
        label: str,
        concepts: str,
        hookpoint: str,
        branch: str,
        region: str,
        stage: str,
        mask: str | None = None,
        first_step: float | None = None,
        last_step: float | None = None,
        strength: float | None = None,
        more_edits: Any = None,
        progress: gr.Progress = PROGRESS,
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Generate the image of `prompt` with and without an edit of the model's concepts.

        `kind` is `move` (to `region`, or add there), `global` (change the whole image) or `remove`. What is edited is
        named by `label`, or by `concepts`: numbers, separated by commas, at one `hookpoint` (empty: the model's second)
        and `branch`. `region` is a part of the image; `mask` replaces it by an image of the same size that is above 0
        inside. The edit lasts from `first_step` to `last_step`, counted from 0, or for a `stage`; without either, for
        the kind's default stage. `more_edits` is a list of objects with these fields. Returns the unedited and the
        edited image, and everything that was measured.
        """
        refuse(*generation_problems(runtime, prompt, seed, steps, guidance))
        named: dict[str, Any] = {"kind": kind, "label": label, "concepts": concepts, "region": region, "stage": stage}
        named |= {"steps": None if first_step is None and last_step is None else [first_step, last_step]}
        named |= {"strength": strength}
        if concepts.strip():
            named |= {"hookpoint": hookpoint, "branch": branch}
        run = (prompt.strip(), int(seed), int(steps), float(guidance))
        if not isinstance(more_edits, list | None):
            raise ValueError("More edits are a list of objects with the fields of an edit.")
        for item in told(intervention(runtime, *run, [named, *(more_edits or [])], mask), progress):
            yield (gr.skip(),) * 3 if isinstance(item, Waiting | EditProgress) else item

    def concepts(query: str) -> Any:
        """Search the concepts of all blocks for a word, best first; if none is found, the nearest labels."""
        from core.ui.concepts.results import search_all  # which imports torch

        hits, nearest = search_all(_tables(runtime), query, runtime.model)
        return {"hits": [{**site._asdict(), **hit._asdict()} for site, hit in hits], "nearest": list(nearest)}

    def concept(hookpoint: str, branch: str, number: float) -> Any:
        """Everything about one concept: label, kind, scores, the images that show it best, its neighbours.

        An empty `hookpoint` is the model's second.
        """
        tables = _tables(runtime)
        names = list(dict.fromkeys(site.hookpoint for site in tables))
        wanted = hookpoint.strip() or default_hookpoint(names)
        table = next((of for site, of in tables.items() if site == (wanted, branch)), None)
        if table is None:
            raise ValueError(f"There are no concepts at “{wanted}”, {branch}; there are at {', '.join(names)}.")
        found = table[concept_number(number)]
        gallery = [{**one.entry._asdict(), "peak": one.peak, "map": one.map.tolist()} for one in found.gallery]
        scores = {**found.scores._asdict(), "runner_ups": [one._asdict() for one in found.scores.runner_ups]}
        neighbours = [one._asdict() for one in table.neighbours(found.number)]
        identity = {
            "hookpoint": wanted,
            "branch": branch,
            "number": found.number,
            "label": found.label,
            "kind": found.kind,
        }
        return {**identity, "scores": scores, "gallery": gallery, "neighbours": neighbours}

    with gr.Group(visible=False):
        prompt = TextField(label="prompt")
        seed = NumberField(value=0, label="seed")
        steps = NumberField(value=spec.num_inference_steps, label="steps")
        guidance = NumberField(value=spec.guidance_scale, label="guidance")
        gr.Button().click(
            generate,
            [prompt, seed, steps, guidance],
            [gr.Image(label="image", format="png"), gr.JSON(label="settings")],
            api_name="generate",
        )
        step = NumberField(value=0, label="step")
        hookpoint = TextField(value="", label="hookpoint", max_length=MAX_QUERY)
        branch = ChoiceField(["cond", "uncond"], value="cond", label="branch")
        method = ChoiceField(["readout", "dictionary"], value="readout", label="method")
        gr.Button().click(
            layout,
            [prompt, seed, steps, guidance, step, hookpoint, branch, method],
            gr.JSON(label="layout"),
            api_name="layout",
        )
        gr.Button().click(
            intervene,
            [
                *(prompt, seed, steps, guidance),
                ChoiceField(list(KINDS), value="move", label="kind"),
                TextField(value="", label="label", max_length=MAX_QUERY),
                TextField(value="", label="concepts", max_length=MAX_PROMPT),
                *(hookpoint, branch),
                ChoiceField(list(REGIONS), value="all", label="region"),
                ChoiceField(["", *offered_stages(spec)], value="", label="stage"),
                ImageField(label="mask", **IMAGE_OPTIONS),
                *(NumberField(label=name) for name in ("first_step", "last_step", "strength")),
                gr.JSON(label="more_edits"),
            ],
            [*(gr.Image(label=name, format="png") for name in ("unedited", "edited")), gr.JSON(label="measured")],
            api_name="intervene",
        )
        query = TextField(label="query", max_length=MAX_QUERY)
        gr.Button().click(concepts, query, gr.JSON(label="concepts"), api_name="concepts", **LOOK_UP)
        number = NumberField(value=0, label="number")
        gr.Button().click(
            concept,
            [hookpoint, branch, number],
            gr.JSON(label="concept"),
            api_name="concept",
            **LOOK_UP,
        )
        image = ImageField(label="image", **IMAGE_OPTIONS)
        words = TextField(value="", label="words", max_length=MAX_PROMPT)
        given = ChoiceField(["rest", "nothing"], value="rest", label="given")
        rel_error = NumberField(value=0.1, label="rel_error")
        gr.Button().click(
            attribute,
            [image, prompt, words, given, rel_error, seed],
            gr.JSON(label="attribution"),
            api_name="attribute",
        )


def _tables(runtime: Runtime) -> "Mapping[SaeSite, ConceptTable]":
    runtime.ready.wait()
    if runtime.error or runtime.dictionary is None:
        raise JobError(runtime.error or no_concepts(runtime.name))
    return runtime.dictionary.tables


def _hookpoint_problem(runtime: Runtime, hookpoint: str) -> str | None:
    """Why the concepts at a block cannot be asked for: whatever else is named would be looked for as a file."""
    names = list(dict.fromkeys(site.hookpoint for site in _tables(runtime)))
    if not hookpoint.strip() or hookpoint.strip() in names:
        return None
    return f"There are no concepts at “{shown(hookpoint)}”; there are at {', '.join(names)}."


def _attribution(
    runtime: Runtime, image: str, prompt: str, words: list[str] | None, given: str, rel_error: float, seed: int
) -> Generator[Any, None, None]:
    for item in jobs.load_user_image(runtime, None, Path(image), prompt, seed):
        if isinstance(item, Waiting):
            yield item
        else:
            scene, _ = item
    yield from jobs.measure(runtime, None, scene, given, rel_error, words)
