"""The form of one edit: what stands in its fields, what is wrong with them, and what to fill them with."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from core.diffusion.schedule import named_steps
from core.spec import ModelSpec, default_hookpoint
from core.ui.concepts.dictionary import Dictionary
from core.ui.interventions.request import (
    OWN_WINDOW,
    PAINTED,
    STRENGTH_INFO,
    STRENGTHS,
    EditRequest,
    cells_mask,
    check_request,
    default_stage,
    default_strength,
    edit_of,
    offered_stages,
    parse_what,
    region_problem,
    stage_problem,
    strength_problem,
    what_problem,
    window_problem,
)
from core.ui.look.scene import Scene
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.concepts.trace import SaeSite
    from core.edits import Editor

CANVAS = 512
"""Side of the picture that is painted on."""
_PAINT = (240, 176, 142, 255)


class Fields(NamedTuple):
    """What stands in the form, in the order of `InterventionsTab.fields`."""

    kind: str
    what: str | None
    way: str | None
    region: str
    cells: str
    stage: str
    first: Any
    last: Any
    strength: Any

    @property
    def blank(self) -> bool:
        """Whether there is no edit in the form."""
        return not (self.what or "").strip()

    @property
    def request(self) -> EditRequest:
        """The edit in the form."""
        label, concepts = parse_what(self.what)
        hookpoint, _, branch = (self.way or "").partition("|") if concepts else ("", "", "")
        own = self.stage == OWN_WINDOW
        whole = self.kind == "whole"
        return EditRequest(
            self.kind,
            label,
            concepts,
            hookpoint,
            branch,
            region="all" if whole else self.region,
            cells=self.cells if self.region == PAINTED and not whole else "",
            stage="" if own else self.stage,
            steps=(int(self.first) - 1, int(self.last) - 1) if own else None,
            strength=float(self.strength),
        )

    def problems(self, runtime: Runtime, n_steps: int) -> "Fields":
        """What is wrong with each field; None where nothing is."""
        problems: dict[str, str | None] = dict.fromkeys(Fields._fields)
        label, concepts = parse_what(self.what)
        problems["what"] = what_problem(label, concepts) or concepts_problem(runtime, self.kind, self.what, self.way)
        if self.kind != "whole":
            problems["region"] = region_problem(self.region, self.cells)
        if self.stage == OWN_WINDOW:
            problems["first"] = window_problem(self.first, self.last, n_steps, start=1)
        else:
            problems["stage"] = stage_problem(self.stage, runtime.spec, n_steps)
        problems["strength"] = strength_problem(self.strength)
        return Fields(**problems)  # type: ignore[arg-type]


def concepts_problem(runtime: Runtime, kind: str, what: str | None, way: str | None) -> str | None:
    """Why there is nothing to edit of that name, as far as can be told now."""
    editor = runtime.editor
    return None if editor is None else check_request(editor, _anywhere(kind, what, way))


def _anywhere(kind: str, what: str | None, way: str | None) -> EditRequest:
    """An edit by what it is about alone."""
    return Fields(kind, what, way, "all", "", default_stage(kind), 1, 1, 1).request


def n_steps_of(scene: Scene | None, spec: ModelSpec) -> int:
    """Steps of the picture that is shown, or of the next one."""
    return spec.num_inference_steps if scene is None else scene.steps


def span(stage: str, spec: ModelSpec, n_steps: int) -> tuple[Any, Any]:
    """First and last step of a stage, as people count them; nothing new where it has none."""
    steps = range(0) if stage == OWN_WINDOW else named_steps(stage, n_steps, spec.stages)
    return (steps[0] + 1, steps[-1] + 1) if steps else (gr.skip(), gr.skip())


def filled(runtime: Runtime, dictionary: Dictionary, scene: Scene | None, one: EditRequest) -> Fields:
    """Updates that put an edit into the form."""
    from core.ui.concepts.results import way_key  # which imports torch

    spec = runtime.spec
    first, last = (one.steps[0] + 1, one.steps[1] + 1) if one.steps else span(one.stage, spec, n_steps_of(scene, spec))
    way = f"{one.hookpoint}|{one.branch}" if one.concepts else way_key(default_site(dictionary))
    return Fields(
        kind=one.kind,
        what=gr.Dropdown(choices=label_choices(dictionary, scene), value=one.what),
        way=gr.Dropdown(choices=way_choices(dictionary), value=way),
        region=gr.Radio(value=one.region, interactive=one.kind != "whole"),
        cells=one.cells,
        stage=one.stage if one.stage in offered_stages(spec) else OWN_WINDOW,
        first=first,
        last=last,
        strength=strength_slider(one.kind, one.strength),
    )


def refreshed(runtime: Runtime, dictionary: Dictionary, scene: Scene | None, stage: str) -> Fields:
    """Updates for another picture that leave in the form what somebody has put there."""
    fields: dict[str, Any] = {name: gr.skip() for name in Fields._fields}
    fields["what"] = gr.Dropdown(choices=label_choices(dictionary, scene))
    fields["way"] = gr.Dropdown(choices=way_choices(dictionary))
    fields["first"], fields["last"] = span(stage, runtime.spec, n_steps_of(scene, runtime.spec))
    return Fields(**fields)


def strength_slider(kind: str, value: float | None = None) -> Any:
    """The slider for a kind of edit."""
    strength = default_strength(kind) if value is None else value
    top, step = STRENGTHS[kind]
    return gr.Slider(value=strength, maximum=max(top, strength), step=step, info=STRENGTH_INFO[kind])


def brush_updates(scene: Scene | None, region: str, cells: str) -> tuple[Any, Any]:
    """(what is painted on, what holds it): the picture, with what was painted before."""
    if region != PAINTED:
        return gr.skip(), gr.Column(visible=False)
    size = (CANVAS, CANVAS)
    background = Image.new("RGB", size, "#777777") if scene is None else scene.image.convert("RGB").resize(size)
    layer = np.zeros((*size, 4), dtype=np.uint8)
    layer[cells_mask(cells, CANVAS)] = _PAINT
    value = {"background": np.asarray(background), "layers": [layer] if cells else [], "composite": None}
    return gr.ImageEditor(value=value), gr.Column(visible=True)


def suggestion(runtime: Runtime, dictionary: Dictionary, scene: Scene | None) -> EditRequest:
    """Something to begin with: the first thing that the prompt names goes to the other side."""
    word = next(iter(label_choices(dictionary, scene)), "")
    region = "top-left"
    if scene is not None and runtime.segmenter is not None:
        from core.ui.interventions.results import where_it_is  # which imports torch

        table = next(iter(dictionary.tables.values()))
        centre = where_it_is(runtime.segmenter, scene.image, table, word)
        if centre is not None:
            region = f"{'top' if centre[1] < 0.5 else 'bottom'}-{'right' if centre[0] < 0.5 else 'left'}"
    return EditRequest("move", word, region=region, stage=default_stage("move"), strength=default_strength("move"))


def label_choices(dictionary: Dictionary, scene: Scene | None) -> list[str]:
    """All labels: the things that the prompt names first, then things, places and styles, each by name."""
    from core.ui.layout.results import named_classes  # which imports torch

    kinds: dict[str, str] = {}
    for table in dictionary.tables.values():
        kinds |= {label: kind for label, kind in zip(table.frame["label"], table.frame["kind"], strict=True) if label}
    table = next(iter(dictionary.tables.values()))
    senses = named_classes(scene.prompt, table) if scene else []
    named = [name for of_word in senses for name in of_word if kinds.get(name) == "object"]
    order = {"object": 0, "background": 1, "style": 2}
    return list(dict.fromkeys([*named, *sorted(kinds, key=lambda label: (order.get(kinds[label], 3), label))]))


def way_choices(dictionary: Dictionary) -> list[tuple[str, str]]:
    """Blocks and halves: what the page calls them, and their keys."""
    from core.ui.concepts.card import site_words  # which import torch
    from core.ui.concepts.results import way_key

    return [(f"{site.hookpoint} ({site_words(site)})", way_key(site)) for site in dictionary.tables]


def default_site(dictionary: Dictionary) -> "SaeSite":
    """Where concepts are pointed at: the second block with the prompt, on which most edits act."""
    sites = [site for site in dictionary.tables if site.branch == "cond"] or list(dictionary.tables)
    usual = default_hookpoint([*dict.fromkeys(site.hookpoint for site in sites)])
    return next(site for site in sites if site.hookpoint == usual)


def hint_html(editor: "Editor | None", kind: str, what: str | None, way: str | None) -> str:
    """What an edit would act on, in a sentence; for a label that there is none of, the nearest to choose."""
    if editor is None or not (what or "").strip():
        return _hint("")
    request = _anywhere(kind, what, way)
    problem = check_request(editor, request)
    if problem is None:
        return _hint(_concepts_said(editor, request))
    said, _, near = problem.partition(" The nearest: ")
    buttons = " ".join(
        f'<button type="button" class="id-find id-iv-near" data-word="{escape(word)}">{escape(word)}</button>'
        for word in near.rstrip(".").split(", ")
        if near
    )
    return _hint(f"{escape(said)}{f' Did you mean {buttons}' if near else ''}")


def _hint(text: str) -> str:
    return f'<p class="id-hint id-iv-hint" aria-live="polite">{text}</p>'


def _concepts_said(editor: "Editor", request: EditRequest) -> str:
    from core.ui.concepts.card import site_words  # which imports torch

    found = editor.concepts(edit_of(request, editor.model.image_size))
    if request.concepts:
        (site, numbers), *_ = found.items()
        labels = editor.table(site).frame["label"]
        named = ", ".join(f"{n} ({escape(str(labels.iat[n])) or 'no name'})" for n in numbers)
        return f"Concepts (SAE features) {site_words(site)}: {named}."
    n = sum(len(numbers) for numbers in found.values())
    parts = "; ".join(f"{len(numbers)} {site_words(site)}" for site, numbers in found.items())
    return f"{n} concept{'s' * (n > 1)} (SAE features) of “{escape(request.label)}”: {parts}."


def chips_html(requests: Sequence[EditRequest], n_steps: int) -> str:
    """The list of edits that are kept."""
    if not requests:
        return '<div class="id-iv-chips"></div>'
    chips = "".join(
        f'<li class="{one.stage}">{escape(one.told(n_steps))}<button type="button" class="id-iv-drop" '
        f'data-index="{i}" aria-label="Remove this edit">×</button></li>'
        for i, one in enumerate(requests)
    )
    return f'<div class="id-iv-chips"><span>Together with:</span><ul>{chips}</ul></div>'
