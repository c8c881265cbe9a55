"""The form of one edit: its fields, their checks, and the updates that fill them."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from core.diffusion.schedule import named_steps
from core.spec import ModelSpec, default_hookpoint
from core.ui.backend.dictionary import ConceptDictionary
from core.ui.backend.runtime import Runtime
from core.ui.interventions.request import (
    CUSTOM_STEPS,
    PAINTED,
    STRENGTH_INFO,
    STRENGTHS,
    EditRequest,
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

if TYPE_CHECKING:
    from core.concepts.trace import SaeSite
    from core.edits import Editor


class EditFields(NamedTuple):
    """The values of the form's fields, in the order of `InterventionsTab.fields`."""

    kind: str
    what: str | None
    site: str | None
    region: str
    cells: str
    stage: str
    first: Any
    last: Any
    strength: Any

    @property
    def blank(self) -> bool:
        """Whether the form holds no edit."""
        return not (self.what or "").strip()

    @property
    def request(self) -> EditRequest:
        """The edit in the form."""
        label, concepts = parse_what(self.what)
        hookpoint, _, branch = (self.site or "").partition("|") if concepts else ("", "", "")
        custom = self.stage == CUSTOM_STEPS
        is_global = self.kind == "global"
        return EditRequest(
            self.kind,
            label,
            concepts,
            hookpoint,
            branch,
            region="all" if is_global else self.region,
            cells=self.cells if self.region == PAINTED and not is_global else "",
            stage="" if custom else self.stage,
            steps=(int(self.first) - 1, int(self.last) - 1) if custom else None,
            strength=float(self.strength),
        )

    def problems(self, runtime: Runtime, n_steps: int) -> "EditFields":
        """What is wrong with each field; None for a valid one."""
        problems: dict[str, str | None] = dict.fromkeys(EditFields._fields)
        label, concepts = parse_what(self.what)
        problems["what"] = what_problem(label, concepts) or concepts_problem(runtime, self.kind, self.what, self.site)
        if self.kind != "global":
            problems["region"] = region_problem(self.region, self.cells)
        if self.stage == CUSTOM_STEPS:
            problems["first"] = window_problem(self.first, self.last, n_steps, start=1)
        else:
            problems["stage"] = stage_problem(self.stage, runtime.spec, n_steps)
        problems["strength"] = strength_problem(self.strength)
        return EditFields(**problems)  # type: ignore[arg-type]


def concepts_problem(runtime: Runtime, kind: str, what: str | None, site: str | None) -> str | None:
    """Why no concepts are found for the form's What, as far as is known before the model is loaded."""
    editor = runtime.editor
    return None if editor is None else check_request(editor, _request_everywhere(kind, what, site))


def _request_everywhere(kind: str, what: str | None, site: str | None) -> EditRequest:
    """A request with the given concepts and default region and steps."""
    return EditFields(kind, what, site, "all", "", default_stage(kind), 1, 1, 1).request


def n_steps_of(scene: Scene | None, spec: ModelSpec) -> int:
    """Steps of the image that is shown, or of the next one."""
    return spec.num_inference_steps if scene is None else scene.steps


def step_span(stage: str, spec: ModelSpec, n_steps: int) -> tuple[Any, Any]:
    """First and last step of a stage, counted from 1; skips the update if it has none."""
    steps = range(0) if stage == CUSTOM_STEPS else named_steps(stage, n_steps, spec.stages)
    return (steps[0] + 1, steps[-1] + 1) if steps else (gr.skip(), gr.skip())


def fill_form(runtime: Runtime, dictionary: ConceptDictionary, scene: Scene | None, one: EditRequest) -> EditFields:
    """Updates that put an edit into the form."""
    from core.ui.concepts.results import site_key  # which imports torch

    spec = runtime.spec
    first, last = (
        (one.steps[0] + 1, one.steps[1] + 1) if one.steps else step_span(one.stage, spec, n_steps_of(scene, spec))
    )
    site = f"{one.hookpoint}|{one.branch}" if one.concepts else site_key(default_site(dictionary))
    updates: dict[str, Any] = {
        "kind": one.kind,
        "what": gr.Dropdown(choices=label_choices(dictionary, scene), value=one.what),
        "site": gr.Dropdown(choices=site_choices(dictionary), value=site),
        "region": gr.Radio(value=one.region, interactive=one.kind != "global"),
        "cells": one.cells,
        "stage": one.stage if one.stage in offered_stages(spec) else CUSTOM_STEPS,
        "first": first,
        "last": last,
        "strength": strength_slider(one.kind, one.strength),
    }
    return EditFields(**updates)


def refresh_form(runtime: Runtime, dictionary: ConceptDictionary, scene: Scene | None, stage: str) -> EditFields:
    """Updates for another image that keep what was entered in the form."""
    updates: dict[str, Any] = {name: gr.skip() for name in EditFields._fields}
    updates["what"] = gr.Dropdown(choices=label_choices(dictionary, scene))
    updates["site"] = gr.Dropdown(choices=site_choices(dictionary))
    updates["first"], updates["last"] = step_span(stage, runtime.spec, n_steps_of(scene, runtime.spec))
    return EditFields(**updates)


def strength_slider(kind: str, value: float | None = None) -> Any:
    """The strength slider for a kind of edit."""
    strength = default_strength(kind) if value is None else value
    top, step = STRENGTHS[kind]
    return gr.Slider(value=strength, maximum=max(top, strength), step=step, info=STRENGTH_INFO[kind])


def suggestion(runtime: Runtime, dictionary: ConceptDictionary, scene: Scene | None) -> EditRequest:
    """An edit to start with: the first object in the prompt moves to the opposite side."""
    word = next(iter(label_choices(dictionary, scene)), "")
    region = "top-left"
    if scene is not None and runtime.segmenter is not None:
        from core.ui.interventions.results import where_it_is  # which imports torch

        table = next(iter(dictionary.tables.values()))
        centre = where_it_is(runtime.segmenter, scene.image, table, word)
        if centre is not None:
            region = f"{'top' if centre[1] < 0.5 else 'bottom'}-{'right' if centre[0] < 0.5 else 'left'}"
    return EditRequest("move", word, region=region, stage=default_stage("move"), strength=default_strength("move"))


def label_choices(dictionary: ConceptDictionary, scene: Scene | None) -> list[str]:
    """All labels: first the objects in the prompt, then objects, backgrounds and styles, each alphabetically."""
    from core.ui.layout.results import named_classes  # which imports torch

    kinds: dict[str, str] = {}
    for table in dictionary.tables.values():
        kinds |= {label: kind for label, kind in zip(table.frame["label"], table.frame["kind"], strict=True) if label}
    table = next(iter(dictionary.tables.values()))
    senses = named_classes(scene.prompt, table) if scene else []
    named = [name for of_word in senses for name in of_word if kinds.get(name) == "object"]
    order = {"object": 0, "background": 1, "style": 2}
    return list(dict.fromkeys([*named, *sorted(kinds, key=lambda label: (order.get(kinds[label], 3), label))]))


def site_choices(dictionary: ConceptDictionary) -> list[tuple[str, str]]:
    """(text, key) of each block and branch."""
    from core.ui.concepts.card import site_words  # which import torch
    from core.ui.concepts.results import site_key

    return [(f"{site.hookpoint} ({site_words(site)})", site_key(site)) for site in dictionary.tables]


def default_site(dictionary: ConceptDictionary) -> "SaeSite":
    """The site whose concepts a click on the image selects: conditional, at the hookpoint on which most edits act."""
    sites = [site for site in dictionary.tables if site.branch == "cond"] or list(dictionary.tables)
    usual = default_hookpoint([*dict.fromkeys(site.hookpoint for site in sites)])
    return next(site for site in sites if site.hookpoint == usual)


def hint_html(editor: "Editor | None", kind: str, what: str | None, site: str | None) -> str:
    """What an edit would act on; for an unknown label, the nearest labels to choose from."""
    if editor is None or not (what or "").strip():
        return _hint("")
    request = _request_everywhere(kind, what, site)
    problem = check_request(editor, request)
    if problem is None:
        return _hint(_describe_concepts(editor, request))
    message, _, near = problem.partition(" The nearest: ")
    buttons = " ".join(
        f'<button type="button" class="id-find id-iv-near" data-word="{escape(word)}">{escape(word)}</button>'
        for word in near.rstrip(".").split(", ")
        if near
    )
    return _hint(f"{escape(message)}{f' Did you mean {buttons}' if near else ''}")


def note_html(text: str) -> str:
    """A text in the place of the hint."""
    return _hint(escape(text))


def _hint(text: str) -> str:
    return f'<p class="id-hint id-iv-hint" aria-live="polite">{text}</p>'


def _describe_concepts(editor: "Editor", request: EditRequest) -> str:
    from core.ui.concepts.card import site_words  # which imports torch

    found = editor.concepts(edit_of(request, editor.model.image_size))
    if request.concepts:
        (site, numbers), *_ = found.items()
        labels = editor.table(site).frame["label"]
        named = ", ".join(f"{n} ({escape(str(labels.iat[n])) or 'unnamed'})" for n in numbers)
        return f"Concepts (SAE features; {site_words(site)}): {named}."
    n = sum(len(numbers) for numbers in found.values())
    parts = "; ".join(f"{len(numbers)} ({site_words(site)})" for site, numbers in found.items())
    return f"{n} concept{'s' * (n > 1)} (SAE features) of “{escape(request.label)}”: {parts}."


def chips_html(requests: Sequence[EditRequest], n_steps: int) -> str:
    """The list of edits to combine."""
    if not requests:
        return '<div class="id-iv-chips"></div>'
    chips = "".join(
        f'<li class="{one.stage}">{escape(one.describe(n_steps))}<button type="button" class="id-iv-drop" '
        f'data-index="{i}" aria-label="Remove this edit">×</button></li>'
        for i, one in enumerate(requests)
    )
    return f'<div class="id-iv-chips"><span>Combined with:</span><ul>{chips}</ul></div>'
