"""The Interventions tab: move a thing, change the style, take something away, and see what else changes."""

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from core.ui.concepts.dictionary import no_concepts_html
from core.ui.inputs import Number, html
from core.ui.interventions.form import CANVAS, chips_html
from core.ui.interventions.request import (
    KINDS,
    OWN_WINDOW,
    PAINTED,
    REGIONS,
    STRENGTH_INFO,
    STRENGTHS,
    EditRequest,
    offered_stages,
)
from core.ui.runtime import Runtime

_HINT = (
    "window.idPage.point = (x, y, step) => trigger('point', { x, y, step });"
    " element.addEventListener('click', (event) => { const button = event.target.closest('.id-iv-near');"
    " if (button) trigger('choose', { word: button.dataset.word }); });"
)
_CHIPS = (
    "element.addEventListener('click', (event) => { const button = event.target.closest('.id-iv-drop');"
    " if (button) trigger('drop', { index: Number(button.dataset.index) }); });"
)
_CHOOSE = (
    "element.addEventListener('click', (event) => { const button = event.target.closest('.id-iv-choose');"
    " if (button) trigger('choose', { index: Number(button.dataset.index) }); });"
)


@dataclass(frozen=True)
class InterventionsTab:
    """The tab's components that the page wires up."""

    kind: Any
    """What to do: one of `KINDS`."""
    what: Any
    """A label, or numbers of concepts."""
    hint: Any
    """HTML of what that means; its event `point` carries `x`, `y` and `step`, `choose` a `word`."""
    way: Any
    """Block and half of which numbers are meant."""
    region: Any
    """One of `REGIONS`, or `PAINTED`."""
    painter: Any
    """The brush."""
    cells: Any
    """What was painted: an editor hands its picture over only once, so a validator would take it away."""
    brush: Any
    """What holds the brush."""
    stage: Any
    """A stage, or `OWN_WINDOW`."""
    first: Any
    """First step, as people count."""
    last: Any
    """Last step."""
    strength: Any
    """In the unit of the kind."""
    keep: Any
    """Puts the edit into the list."""
    chips: Any
    """HTML of the list; its event `drop` carries an `index`."""
    show: Any
    """Draws the picture again, with the edits."""
    each: Any
    """The same at all stages."""
    slider: Any
    """Both pictures."""
    panel: Any
    """HTML of what came of it; its event `choose` carries the `index` of a result for the slider."""
    requests: Any
    """State: the list of edits."""
    outcome: Any
    """State: what is shown."""
    suggested: Any
    """State: what was last put into `what` and `region` without being asked."""
    asked: Any
    """State: what the page's address asks for, until it has been done."""
    go: Any
    """State: changes when the address asks for a run."""
    ticket: Any
    """Of the present run; 0 for none. That of a picture or its words is not to be overwritten."""
    compare: Any
    """Whether the present run compares the stages. Like a ticket it travels with the request."""

    @property
    def fields(self) -> list[Any]:
        """What describes one edit: the order of `interventions_form.Fields`."""
        when = [self.stage, self.first, self.last]
        return [self.kind, self.what, self.way, self.region, self.cells, *when, self.strength]


def build_interventions_tab(runtime: Runtime) -> InterventionsTab:
    """Put the tab's components where the caller's `with` is."""
    html(
        "<h2>What if?</h2>"
        '<p class="id-intro">Change what the model thinks of while it draws, and see the picture that it would have '
        "drawn instead, from the same noise. Press <b>Show what happens</b>; then try the same edit late, when the "
        "layout is long settled.</p>"
    )
    with gr.Column(elem_id="id-iv-form"):
        with gr.Row():
            what = gr.Dropdown(
                [],
                label="What",
                info="A thing, place or style; or click the picture.",
                allow_custom_value=True,
                elem_id="id-iv-what",
                min_width=200,
            )
            kinds = [(name, kind) for kind, name in KINDS.items()]
            kind = gr.Radio(kinds, value="move", label="Do", elem_id="id-iv-kind", min_width=300, scale=2)
        hint = html('<p class="id-hint id-iv-hint"></p>', js_on_load=_HINT)
        with gr.Row():
            regions = [*((name, region) for region, name in REGIONS.items()), ("paint it with a brush", PAINTED)]
            region = gr.Radio(regions, value="top-left", label="Where", elem_id="id-iv-where", min_width=270)
            with gr.Column(min_width=270):
                stage, first, last, strength = _when_and_how_strong(runtime)
        painter, brush = _brush()
        with gr.Accordion("Which concepts do numbers mean?", open=False, elem_id="id-iv-ways"):
            info = "A concept’s number, such as 12 or 12, 40 under What, means something at one block and half alone."
            way = gr.Dropdown([], label="Concepts of", info=info)
        cells = gr.Textbox(value="", visible=False)
        chips = html(chips_html((), 1), js_on_load=_CHIPS)
        with gr.Row(elem_id="id-iv-buttons"):
            show = gr.Button("Show what happens", variant="primary", elem_id="id-iv-show", min_width=170)
            each = gr.Button("The same edit at all three stages", elem_id="id-iv-each", min_width=230)
            keep = gr.Button("Keep this edit, add another", elem_id="id-iv-keep", min_width=200)
    with gr.Column(elem_id="id-iv-result"):
        slider = gr.ImageSlider(
            label="Unedited and edited picture",
            show_label=False,
            type="pil",
            format="png",
            interactive=False,
            max_height=420,
            buttons=["fullscreen"],
            slider_position=12,  # a thing that goes from right to left would be seen on neither side of the middle
            elem_id="id-iv-slider",
        )
        panel = html(why_empty_html(runtime), elem_id="id-iv-panel", js_on_load=_CHOOSE)
    nothing: tuple[EditRequest, ...] = ()
    return InterventionsTab(
        kind=kind,
        what=what,
        hint=hint,
        way=way,
        region=region,
        painter=painter,
        cells=cells,
        brush=brush,
        stage=stage,
        first=first,
        last=last,
        strength=strength,
        keep=keep,
        chips=chips,
        show=show,
        each=each,
        slider=slider,
        panel=panel,
        requests=gr.State(nothing),
        outcome=gr.State(None),
        suggested=gr.State(("", "")),
        asked=gr.State(None),
        go=gr.State(None),
        ticket=gr.Number(visible=False, value=0),
        compare=gr.Checkbox(False, visible=False),
    )


def _when_and_how_strong(runtime: Runtime) -> tuple[Any, Any, Any, Any]:
    names = [*offered_stages(runtime.spec), ("own steps", OWN_WINDOW)]
    stage = gr.Radio(names, value=runtime.spec.stages[0].name, label="When", elem_id="id-iv-when")
    with gr.Row(elem_id="id-iv-window"):
        first = Number(value=1, label="From step", min_width=90)
        last = Number(value=1, label="to step", min_width=90)
    top, step = STRENGTHS["move"]
    info, label = STRENGTH_INFO["move"], "How strong"
    strength = gr.Slider(0, top, value=1, step=step, label=label, info=info, elem_id="id-iv-strength")
    return stage, first, last, strength


def _brush() -> tuple[Any, Any]:
    """The brush, and what shows or hides it."""
    with gr.Column(visible=False, elem_id="id-iv-brush") as brush:
        painter = gr.ImageEditor(
            label="Paint over where it should be",
            type="numpy",
            image_mode="RGBA",
            sources=[],
            transforms=[],
            layers=False,
            brush=gr.Brush(default_size=48, colors=["#f0b08e"], color_mode="fixed"),
            canvas_size=(CANVAS, CANVAS),
            fixed_canvas=True,
        )
    return painter, brush


def why_empty_html(runtime: Runtime) -> str:
    """The room that a result will take, and why there is nothing to show."""
    if runtime.ready.is_set() and runtime.dictionary is None and not runtime.error:
        return f'<div class="id-iv empty">{no_concepts_html(runtime.name)}</div>'
    if runtime.error:
        return empty_html("The model could not be loaded, so there is nothing to edit.")
    return empty_html("Both pictures, what changed and how much will appear here.")


def empty_html(text: str) -> str:
    """The room that a result will take, and why it is empty."""
    return f'<div class="id-iv empty"><p class="id-empty">{escape(text)}</p></div>'
