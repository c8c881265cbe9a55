"""The Interventions tab: move an object, change the style, remove something, and see what else changes."""

from dataclasses import dataclass
from html import escape

import gradio as gr
from gradio.blocks import Block

from core.ui.backend.dictionary import no_concepts_html
from core.ui.backend.fields import NumberField, TextField, html
from core.ui.backend.runtime import Runtime
from core.ui.interventions.form import chips_html
from core.ui.interventions.request import (
    CUSTOM_STEPS,
    KINDS,
    PAINTED,
    REGIONS,
    STRENGTH_INFO,
    STRENGTHS,
    EditRequest,
    offered_stages,
)

_HINT = (
    "window.idPage.point = (x, y, step) => trigger('point', { x, y, step });"
    " window.idPage.steer = (site, number) => trigger('steer', { site, number });"
    " window.idPage.drag = (x0, y0, x1, y1) => trigger('drag', { x0, y0, x1, y1 });"
    " element.addEventListener('click', (event) => { const button = event.target.closest('.id-iv-near');"
    " if (button) trigger('choose', { word: button.dataset.word }); });"
)
_CHIPS = (
    "element.addEventListener('click', (event) => { const button = event.target.closest('.id-iv-drop');"
    " if (button) trigger('drop', { index: Number(button.dataset.index) }); });"
)
_BRUSH = (
    '<div class="id-iv-brush"><button type="button" class="id-button id-iv-paint" aria-pressed="true">Paint</button>'
    '<label>brush size <input type="range" class="id-iv-size" min="1" max="8" step="0.5" value="3"></label>'
    '<label><input type="checkbox" class="id-iv-erase"> erase</label>'
    '<button type="button" class="id-button id-iv-clear">Clear</button></div>'
)


@dataclass(frozen=True)
class InterventionsTab:
    """The tab's components that the page wires up."""

    kind: gr.Radio
    """The kind of edit: one of `KINDS`."""
    what: gr.Dropdown
    """A label, or concept numbers."""
    hint: gr.HTML
    """What that selects. Its event `point` carries `x`, `y` and `step`, `drag` where a drag began and ended as `x0`,
    `y0`, `x1` and `y1`, `choose` a `word`, and `steer` the `site` and `number` of a concept.
    """
    site: gr.Dropdown
    """The block and branch that concept numbers belong to."""
    region: gr.Radio
    """One of `REGIONS`, or `PAINTED`."""
    cells: gr.Textbox
    """The painted region, which the page's script writes."""
    stage: gr.Radio
    """A stage, or `CUSTOM_STEPS`."""
    first: NumberField
    """First step, counted from 1."""
    last: NumberField
    """Last step, counted from 1."""
    strength: gr.Slider
    """In the unit of the kind of edit."""
    add: gr.Button
    """Adds the edit to the list."""
    chips: gr.HTML
    """The list of edits; its event `drop` carries an `index`."""
    show: gr.Button
    """Generates the image again with the edits."""
    compare_stages: gr.Button
    """Shows the same edit at each stage."""
    panel: gr.HTML
    """The result; the page's script shows its images on the large picture."""
    requests: gr.State
    """The list of edits."""
    comparison: gr.State
    """The `EditComparison` that is shown."""
    suggested: gr.State
    """The last automatic suggestion for `what` and `region`."""
    linked: gr.State
    """The `EditLink` of the page's address, until it has been run."""
    run_trigger: gr.State
    """Changes when the page's address asks for a run."""
    ticket: gr.Number
    """Of the current run, or 0. Separate from the page's ticket, which must not be overwritten."""
    compare: gr.Checkbox
    """Whether the current run compares the stages; like a ticket, it travels with the request."""

    @property
    def fields(self) -> list[Block]:
        """The fields that describe one edit, in the order of `EditFields`."""
        when = [self.stage, self.first, self.last]
        return [self.kind, self.what, self.site, self.region, self.cells, *when, self.strength]


def build_interventions_tab(runtime: Runtime) -> InterventionsTab:
    """Create the tab's components inside the caller's `with` block."""
    html(
        "<h2>What if?</h2>"
        '<p class="id-intro"><b>Drag an object</b> of the picture to where it should go, or say below what to change. '
        "The model draws the picture again from the same noise, with other concepts active. Then try the same edit "
        "late, when the layout is already settled.</p>"
    )
    with gr.Column(elem_id="id-iv-form"):
        with gr.Row():
            what = gr.Dropdown(
                [],
                label="What",
                info="An object, background or style; or click it in the picture.",
                allow_custom_value=True,
                elem_id="id-iv-what",
                min_width=200,
            )
            kinds = [(name, kind) for kind, name in KINDS.items()]
            kind = gr.Radio(kinds, value="move", label="Action", elem_id="id-iv-kind", min_width=300, scale=2)
        hint = html('<p class="id-hint id-iv-hint"></p>', js_on_load=_HINT)
        with gr.Row():
            regions = [*((name, region) for region, name in REGIONS.items()), ("paint with a brush", PAINTED)]
            region = gr.Radio(regions, value="top-left", label="Where", elem_id="id-iv-where", min_width=270)
            with gr.Column(min_width=270):
                stage, first, last, strength = _when_and_how_strong(runtime)
        html(_BRUSH)
        with gr.Accordion("Concept numbers (advanced)", open=False, elem_id="id-iv-site"):
            info = "Concept numbers under What, such as 12, 40, belong to one block and branch."
            site = gr.Dropdown([], label="Concepts of", info=info)
        cells = TextField(value="", label="Painted cells", visible="hidden", elem_id="id-iv-cells")
        chips = html(chips_html((), 1), js_on_load=_CHIPS)
        with gr.Row(elem_id="id-iv-buttons"):
            show = gr.Button("Show what happens", variant="primary", elem_id="id-iv-show", min_width=170)
            compare_stages = gr.Button("The same edit at all three stages", elem_id="id-iv-compare", min_width=230)
            add = gr.Button("Add another edit", elem_id="id-iv-add", min_width=200)
    with gr.Column(elem_id="id-iv-result"):
        panel = html(why_empty_html(runtime), elem_id="id-iv-panel")
    no_requests: tuple[EditRequest, ...] = ()
    return InterventionsTab(
        kind=kind,
        what=what,
        hint=hint,
        site=site,
        region=region,
        cells=cells,
        stage=stage,
        first=first,
        last=last,
        strength=strength,
        add=add,
        chips=chips,
        show=show,
        compare_stages=compare_stages,
        panel=panel,
        requests=gr.State(no_requests),
        comparison=gr.State(None),
        suggested=gr.State(("", "")),
        linked=gr.State(None),
        run_trigger=gr.State(None),
        ticket=gr.Number(visible=False, value=0),
        compare=gr.Checkbox(False, visible=False),
    )


def _when_and_how_strong(runtime: Runtime) -> tuple[gr.Radio, NumberField, NumberField, gr.Slider]:
    choices = [*((name, name) for name in offered_stages(runtime.spec)), ("custom", CUSTOM_STEPS)]
    stage = gr.Radio(choices, value=runtime.spec.stages[0].name, label="When", elem_id="id-iv-when")
    with gr.Row(elem_id="id-iv-window"):
        first = NumberField(value=1, label="From step", min_width=90)
        last = NumberField(value=1, label="to step", min_width=90)
    top, step = STRENGTHS["move"]
    info, label = STRENGTH_INFO["move"], "Strength"
    strength = gr.Slider(0, top, value=1, step=step, label=label, info=info, elem_id="id-iv-strength")
    return stage, first, last, strength


def why_empty_html(runtime: Runtime) -> str:
    """The room that a result will take, and why there is nothing to show."""
    if runtime.ready.is_set() and runtime.dictionary is None and not runtime.error:
        return f'<div class="id-iv empty">{no_concepts_html(runtime.name)}</div>'
    if runtime.error:
        return empty_html("The model could not be loaded, so there is nothing to edit.")
    return empty_html("The large picture will change, and here you will read what changed and how much.")


def empty_html(text: str) -> str:
    """A placeholder of a result's size, with a text."""
    return f'<div class="id-iv empty"><p class="id-empty">{escape(text)}</p></div>'
