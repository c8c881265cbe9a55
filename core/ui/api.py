"""The functions of the page for programs: `/generate`, `/attribute`, `/concepts`, `/concept`, `/layout`, `/intervene`.

Their inputs are components of their own, out of sight, because only components check files: a path that a client makes
up never reaches a function.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from core.information.results import Attribution
from core.spec import default_hookpoint
from core.ui.concepts.dictionary import no_concepts
from core.ui.events import MODEL
from core.ui.inputs import (
    PICTURE,
    Number,
    Picture,
    concept_number,
    draw_problems,
    image_problem,
    prompt_problem,
    rel_error_problem,
    seed_problem,
    step_problem,
)
from core.ui.interventions.api import intervention
from core.ui.interventions.request import KINDS, REGIONS, offered_stages
from core.ui.jobs import JobError, Waiting, bring, draw, foretell, measure
from core.ui.look.scene import Scene
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.concepts.table import ConceptTable
    from core.concepts.trace import SaeSite


def build_api(runtime: Runtime) -> None:
    """Put the endpoints into the surrounding `gr.Blocks`."""
    spec = runtime.spec

    def generate(prompt: str, seed: float, steps: float, guidance: float) -> Iterator[tuple[Any, Any]]:
        """Draw a picture of `prompt`. Returns the picture and the settings that draw it again."""
        refuse(*draw_problems(runtime, prompt, seed, steps, guidance))
        text = prompt.strip()
        for item in told(draw(runtime, None, text, int(seed), int(steps), float(guidance))):
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

    def attribute(picture: str, prompt: str, words: str, given: str, rel_error: float, seed: float) -> Iterator[Any]:
        """Bits that each of `words` (separated by commas; all if empty) of `prompt` told `picture`.

        A word that is named twice counts once; the result has them in the prompt's order. Returns everything: totals,
        maps, timeline, the two error curves, errors, settings.
        """
        refuse(image_problem(picture), prompt_problem(runtime, prompt))
        refuse(rel_error_problem(rel_error), seed_problem(seed))
        wanted = [word.strip() for word in (words or "").split(",") if word.strip()] or None
        for item in told(_attribution(runtime, picture, prompt.strip(), wanted, given, float(rel_error), int(seed))):
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
    ) -> Iterator[Any]:
        """Foretell what will be where in the picture of `prompt`, from one step (from 0) of its making.

        An empty `hookpoint` is the model's second. Returns labels [h][w] (index into classes, -1 for none), the
        classes, and their scores [class][h][w].
        """
        refuse(*draw_problems(runtime, prompt, seed, steps, guidance))
        refuse(step_problem(step, steps))
        options = {"step": int(step), "hookpoint": hookpoint.strip() or None, "branch": branch, "method": method}
        run = {"num_inference_steps": int(steps), "guidance_scale": float(guidance)}
        for item in told(foretell(runtime, None, prompt.strip(), int(seed), **options, **run)):
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
        runner_ups: Any = None,
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Draw the picture of `prompt` with and without an edit of what the model thinks of.

        `kind` is `move` (to `region`, or draw there), `whole` (change the whole picture) or `remove`. What is edited is
        told by `label`, or by `concepts`: numbers, separated by commas, at one `hookpoint` (empty: the model's second)
        and `branch`. `region` is a part of the picture, or `mask` a picture of its size that is above 0 inside. The
        edit lasts from `first_step` to `last_step` (from 0), or a `stage`; without either, as serves the kind best.
        `further` edits are a list of objects with these names. Returns the unedited and the edited picture, and
        everything that was measured.
        """
        refuse(*draw_problems(runtime, prompt, seed, steps, guidance))
        named: dict[str, Any] = {"kind": kind, "label": label, "concepts": concepts, "region": region, "stage": stage}
        named |= {"steps": None if first_step is None and last_step is None else [first_step, last_step]}
        named |= {"strength": strength}
        if concepts.strip():
            named |= {"hookpoint": hookpoint, "branch": branch}
        run = (prompt.strip(), int(seed), int(steps), float(guidance))
        for item in told(intervention(runtime, *run, [named, *(runner_ups or [])], mask)):
            yield (gr.skip(),) * 3 if item is None else item

    def concepts(query: str) -> Any:
        """The concepts of all blocks that a word finds, best first; where it finds none, the nearest labels."""
        from core.ui.concepts.results import search_all  # which imports torch

        hits, nearest = search_all(_tables(runtime), query, runtime.model)
        return {"hits": [{**site._asdict(), **hit._asdict()} for site, hit in hits], "nearest": list(nearest)}

    def concept(hookpoint: str, branch: str, number: float) -> Any:
        """Everything about one concept: label, kind, scores, the pictures that show it best, its neighbours.

        An empty `hookpoint` is the model's second.
        """
        tables = _tables(runtime)
        names = list(dict.fromkeys(site.hookpoint for site in tables))
        wanted = hookpoint.strip() or default_hookpoint(names)
        table = next((of for site, of in tables.items() if site == (wanted, branch)), None)
        if table is None:
            raise ValueError(f"There are no concepts at {wanted!r}, {branch}: there are some at {', '.join(names)}.")
        found = table[concept_number(number)]
        pictures = [{**one.entry._asdict(), "peak": one.peak, "map": one.map.tolist()} for one in found.gallery]
        scores = {**found.scores._asdict(), "runner_ups": [one._asdict() for one in found.scores.runner_ups]}
        neighbours = [one._asdict() for one in table.neighbours(found.number)]
        plain = {
            "hookpoint": wanted,
            "branch": branch,
            "number": found.number,
            "label": found.label,
            "kind": found.kind,
        }
        return {**plain, "scores": scores, "gallery": pictures, "neighbours": neighbours}

    with gr.Group(visible=False):
        prompt = gr.Textbox(label="prompt")
        seed = Number(value=0, label="seed")
        steps = Number(value=spec.num_inference_steps, label="steps")
        guidance = Number(value=spec.guidance_scale, label="guidance")
        gr.Button().click(
            generate,
            [prompt, seed, steps, guidance],
            [gr.Image(label="picture", format="png"), gr.JSON(label="settings")],
            api_name="generate",
            **MODEL,
        )
        step = Number(value=0, label="step")
        hookpoint = gr.Textbox(value="", label="hookpoint")
        branch = gr.Radio(["cond", "uncond"], value="cond", label="branch")
        method = gr.Radio(["readout", "dictionary"], value="readout", label="method")
        gr.Button().click(
            layout,
            [prompt, seed, steps, guidance, step, hookpoint, branch, method],
            gr.JSON(label="layout"),
            api_name="layout",
            **MODEL,
        )
        gr.Button().click(
            intervene,
            [
                *(prompt, seed, steps, guidance),
                gr.Radio(list(KINDS), value="move", label="kind"),
                gr.Textbox(value="", label="label"),
                gr.Textbox(value="", label="concepts"),
                *(hookpoint, branch),
                gr.Radio(list(REGIONS), value="all", label="region"),
                gr.Radio(["", *offered_stages(spec)], value="", label="stage"),
                Picture(label="mask", **PICTURE),
                *(Number(label=name) for name in ("first_step", "last_step", "strength")),
                gr.JSON(label="runner_ups"),
            ],
            [*(gr.Image(label=name, format="png") for name in ("unedited", "edited")), gr.JSON(label="measured")],
            api_name="intervene",
            **MODEL,
        )
        query = gr.Textbox(label="query")
        gr.Button().click(_answering(concepts), query, gr.JSON(label="concepts"), api_name="concepts", queue=False)
        number = Number(value=0, label="number")
        gr.Button().click(
            _answering(concept),
            [hookpoint, branch, number],
            gr.JSON(label="concept"),
            api_name="concept",
            queue=False,
        )
        picture = Picture(label="picture", **PICTURE)
        words = gr.Textbox(value="", label="words")
        given = gr.Radio(["rest", "nothing"], value="rest", label="given")
        rel_error = Number(value=0.1, label="rel_error")
        gr.Button().click(
            attribute,
            [picture, prompt, words, given, rel_error, seed],
            gr.JSON(label="attribution"),
            api_name="attribute",
            **MODEL,
        )


def _tables(runtime: Runtime) -> "Mapping[SaeSite, ConceptTable]":
    runtime.ready.wait()
    if runtime.error or runtime.dictionary is None:
        raise JobError(runtime.error or no_concepts(runtime.name))
    return runtime.dictionary.tables


def _answering(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose errors a user can act on are the client's errors."""

    @wraps(function)
    def answer(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (IndexError, ValueError, JobError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return answer


def _attribution(
    runtime: Runtime, picture: str, prompt: str, words: list[str] | None, given: str, rel_error: float, seed: int
) -> Iterator[Any]:
    for item in bring(runtime, None, Path(picture), prompt, seed):
        if isinstance(item, Waiting):
            yield item
        else:
            scene, _ = item
    yield from measure(runtime, None, scene, given, rel_error, words)


def refuse(*problems: str | None) -> None:
    """Raise the first problem that there is, as the client's error."""
    for problem in problems:
        if problem:
            raise gr.Error(problem, print_exception=False)


def told(items: Iterator[Any]) -> Iterator[Any]:
    """The items, with errors a user can act on as the client's error. A closed request closes the work."""
    try:
        yield from items
    except (JobError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from error
