"""What happens on the Interventions tab, and when."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
import numpy as np

from core.ui.attribution.tab import measure_updates
from core.ui.events import MODEL, QUIET
from core.ui.inputs import verdicts
from core.ui.interventions.form import (
    Fields,
    brush_updates,
    chips_html,
    default_site,
    filled,
    hint_html,
    n_steps_of,
    refreshed,
    span,
    strength_slider,
    suggestion,
)
from core.ui.interventions.request import (
    MAX_REQUESTS,
    OWN_WINDOW,
    PAINTED,
    EditRequest,
    default_stage,
    edit_of,
    paint_cells,
    requests_of,
    stage_problem,
)
from core.ui.interventions.tab import empty_html, why_empty_html
from core.ui.jobs import JobError, Redrawing, Waiting, intervene
from core.ui.link import read_link
from core.ui.look.picture import seconds_left, status_html
from core.ui.look.scene import Scene
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.ui.interventions.results import Outcome, Plan
    from core.ui.page import Page

EditRequests = tuple[EditRequest, ...]

_OWN = (
    "A picture of your own cannot be edited: it was not drawn here, so there is no noise from which to draw it again. "
    "Generate one from its caption instead."
)
_STALE = "edits"
"""What of the page is old while this computes, for `status_html`."""
_AT_ONCE: dict[str, Any] = {**QUIET, "queue": False}
_LATEST: dict[str, Any] = {**_AT_ONCE, "trigger_mode": "always_last"}


class EditInputs(NamedTuple):
    """What an address asks for."""

    picture: tuple[str, int, int, float]
    """Prompt, seed, steps and guidance."""
    requests: EditRequests
    compare: bool
    """Whether to compare the stages."""


class RunTrigger(NamedTuple):
    """A run that an address asks for."""

    number: int
    compare: bool


def wire_interventions(runtime: Runtime, page: "Page", pictures: Sequence[Any], loading: Any) -> None:
    """Connect the tab's components; the events are those that `wire` returns."""
    tab, scene = page.interventions, page.scene
    events = _Events(runtime)
    edited = [scene, tab.requests, *tab.fields]

    begun = [tab.ticket, tab.compare, page.status, tab.panel]
    shown = tab.show.click(events.accept, edited, None, validator=events.check, **QUIET)
    compared = tab.each.click(events.accept, edited, None, validator=events.check_each, **QUIET)
    for beginning in (
        shown.success(events.begin_show, scene, begun, **QUIET),
        compared.success(events.begin_each, scene, begun, **QUIET),
        tab.go.change(events.begin_asked, [scene, tab.go], begun, **QUIET),
    ):
        beginning.success(
            events.run,
            [
                tab.ticket,
                tab.compare,
                scene,
                page.tab.given,
                page.tab.rel_error,
                tab.outcome,
                tab.requests,
                *tab.fields,
            ],
            [tab.panel, tab.slider, tab.outcome, page.tab.panel, page.status],
            **MODEL,
            **QUIET,
        )
    tab.panel.choose(events.choose, tab.outcome, tab.slider, **_AT_ONCE)

    listed = [tab.requests, tab.chips]
    tab.keep.click(events.keep, edited, [*listed, tab.what, tab.hint], validator=events.check_cached, **QUIET)
    tab.chips.drop(events.drop, [scene, tab.requests], listed, **_AT_ONCE)

    known = [scene, tab.asked, tab.suggested, tab.go, tab.requests, *tab.fields]
    put = [*tab.fields, tab.hint, tab.painter, tab.brush, *listed, tab.suggested, tab.asked, tab.go]
    restoring = loading.success(events.restore, None, [tab.asked, page.status], **QUIET)
    for one in (restoring, *pictures):
        one.success(events.fill, known, put, **QUIET)

    named = [tab.kind, tab.what, tab.way]
    # Not when they change: what this script puts there changes several at once, and answers would come in any order.
    gr.on([one.input for one in named], events.hint, named, tab.hint, **_LATEST)
    tab.hint.point(events.point, [scene, tab.kind], [tab.what, tab.way, tab.hint], **_AT_ONCE)
    tab.hint.choose(events.near, [tab.kind, tab.way], [tab.what, tab.hint], **_AT_ONCE)
    of_kind = [tab.region, tab.stage, tab.first, tab.last, tab.strength]
    tab.kind.input(events.of_kind, [scene, tab.kind], of_kind, **_AT_ONCE)
    tab.region.input(brush_updates, [scene, tab.region, tab.cells], [tab.painter, tab.brush], **_AT_ONCE)
    painted = [tab.painter.input, tab.painter.change, tab.painter.apply, tab.painter.clear]
    gr.on(painted, events.paint, tab.painter, tab.cells, **_LATEST)
    tab.stage.input(events.of_stage, [scene, tab.stage], [tab.first, tab.last], **_AT_ONCE)
    gr.on([tab.first.input, tab.last.input], lambda: OWN_WINDOW, None, tab.stage, **_AT_ONCE)


class _Events:
    """The handlers, as methods of what they share. `fields` are those of `Fields`.

    Gradio reads the hints of those that take a request or an event, so that these name no type that is not imported.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    # --- what was typed

    def check(self, scene: Scene | None, requests: EditRequests, *fields: Any) -> list[Any]:
        """Beside each field what is wrong with it; an empty form is fine where the list has edits."""
        typed = Fields(*fields)
        if requests and typed.blank:
            return verdicts([None] * (2 + len(fields)))
        return verdicts([None, None, *typed.problems(self.runtime, self._steps(scene))])

    def check_each(self, scene: Scene | None, requests: EditRequests, *fields: Any) -> list[Any]:
        """The same, whatever time was chosen; but every stage has to have steps."""
        spec, n_steps = self.runtime.spec, self._steps(scene)
        problems = (stage_problem(stage.name, spec, n_steps) for stage in spec.stages)
        problem = next((text for text in problems if text), None)
        found = self.check(scene, requests, *Fields(*fields)._replace(stage=spec.stages[0].name))
        found[2 + Fields._fields.index("stage")] = verdicts([problem])[0]
        return found

    def check_cached(self, scene: Scene | None, requests: EditRequests, *fields: Any) -> list[Any]:
        """An edit for the list."""
        problems = Fields(*fields).problems(self.runtime, self._steps(scene))
        if len(requests) + 1 >= MAX_REQUESTS:
            problems = problems._replace(what=f"At most {MAX_REQUESTS} edits go together. Remove one first.")
        return verdicts([None, None, *problems])

    def accept(self, *_: Any) -> None:
        """There for its validator."""

    # --- running

    def begin_show(self, request: gr.Request, scene: Scene | None) -> Any:
        """(ticket, compare, status, panel)"""
        return self._begin(request, scene, compare=False)

    def begin_each(self, request: gr.Request, scene: Scene | None) -> Any:
        """(ticket, compare, status, panel)"""
        return self._begin(request, scene, compare=True)

    def begin_asked(self, request: gr.Request, scene: Scene | None, go: RunTrigger | None) -> Any:
        """(ticket, compare, status, panel)"""
        if go is None:
            return 0, False, gr.skip(), gr.skip()
        return self._begin(request, scene, go.compare)

    def _begin(self, request: gr.Request, scene: Scene | None, compare: bool) -> Any:
        if scene is None:
            told = status_html("Generate a picture first, or choose an example.", kind="error")
            return 0, compare, told, gr.skip()
        if scene.own:
            return 0, compare, status_html(_OWN, kind="error"), empty_html(_OWN)
        ticket = self.runtime.tickets.issue(str(request.session_hash))
        return ticket, compare, status_html("Waiting for the model to be free…", 0.0, _STALE), gr.skip()

    def run(
        self,
        request: gr.Request,
        ticket: float,
        compare: bool,
        scene: Scene | None,
        given: str,
        rel_error: float,
        old: Any,
        requests: EditRequests,
        *fields: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Yields (panel, slider, outcome, words, status)."""
        runtime, number = self.runtime, int(ticket)
        if scene is None or not runtime.tickets.claim(number, "edit"):
            yield (gr.skip(),) * 5
            return
        # Words that are still being read give way to this, and have their turn after it.
        stale = "words" if runtime.stored(scene.key, given, rel_error) is None else ""
        try:
            outcome = yield from self._draw(number, scene, self._plan(compare, requests, Fields(*fields)), stale)
        except (JobError, ValueError) as error:
            runtime.tickets.drop(number)
            told = status_html(str(error), kind="error", stale=stale)
            yield self._panel(old), gr.skip(), gr.skip(), gr.skip(), told
            return
        if outcome is None:
            newer = runtime.tickets.newest(str(request.session_hash)) > number
            told = gr.skip() if newer else status_html("Cancelled.", stale=stale)
            yield self._panel(old), gr.skip(), gr.skip(), gr.skip(), told
            return
        from core.ui.interventions.panel import slider_images

        yield self._panel(outcome), slider_images(outcome), outcome, gr.skip(), status_html(stale=stale)
        if stale:
            for words, told in measure_updates(runtime, number, scene, given, rel_error):
                yield gr.skip(), gr.skip(), gr.skip(), words, told

    def _draw(
        self, ticket: int, scene: Scene, plan: "Plan", stale: str
    ) -> "Generator[tuple[Any, ...], None, Outcome | None]":
        """Yields what `run` does, and returns what came of it; None if it was cancelled."""
        from core.ui.interventions.panel import drawing_html
        from core.ui.interventions.results import measure_redrawn

        runtime = self.runtime
        edits = [[edit_of(one, scene.image.width) for one in requests] for _, requests in plan.rows]
        names = ["unedited", *(stage or "edited" for stage, _ in plan.rows)]
        with closing(intervene(runtime, ticket, scene, edits)) as work:
            for item in work:
                if isinstance(item, Waiting):
                    yield *(gr.skip(),) * 4, status_html(item.text, 0.0, f"{_STALE} {stale}")
                elif isinstance(item, Redrawing):
                    text = f"Drawing again: step {item.done} of {item.n_steps}{seconds_left(item.seconds_left)}"
                    panel = drawing_html(item, names) if item.frames else gr.skip()
                    told = status_html(text, item.done / item.n_steps, f"{_STALE} {stale}")
                    yield panel, gr.skip(), gr.skip(), gr.skip(), told
                elif runtime.dictionary is not None:
                    return measure_redrawn(scene, plan, item, runtime.dictionary, runtime.segmenter)
        return None

    def _plan(self, compare: bool, requests: EditRequests, fields: Fields) -> "Plan":
        from core.ui.interventions.results import Plan

        asked = requests if fields.blank else (*requests, fields.request)
        return Plan(asked, tuple(stage.name for stage in self.runtime.spec.stages) if compare else ())

    def _panel(self, outcome: "Outcome | None") -> str:
        if outcome is None:
            return why_empty_html(self.runtime)
        from core.ui.interventions.panel import outcome_html

        return outcome_html(self.runtime, outcome)

    def choose(self, outcome: Any, event: gr.EventData) -> Any:
        """Put one of several results under the slider."""
        from core.ui.interventions.panel import slider_images

        index = int((event._data or {}).get("index", 0))
        return slider_images(outcome, index) if outcome and 0 <= index < len(outcome.results) else gr.skip()

    # --- the list

    def keep(self, scene: Scene | None, requests: EditRequests, *fields: Any) -> tuple[Any, str, str, str]:
        """Put the edit into the list, and make room for another: (wishes, chips, what, hint)."""
        requests = (*requests, Fields(*fields).request)
        return requests, chips_html(requests, self._steps(scene)), "", self.hint("move", "", None)

    def drop(self, scene: Scene | None, requests: EditRequests, event: gr.EventData) -> tuple[Any, str]:
        """Take an edit from the list: (wishes, chips)."""
        index = int((event._data or {}).get("index", -1))
        requests = tuple(one for i, one in enumerate(requests) if i != index)
        return requests, chips_html(requests, self._steps(scene))

    # --- filling the form

    def restore(self, request: gr.Request) -> tuple[Any, Any]:
        """What the page's address asks for: (asked, status)."""
        query = dict(request.query_params)
        if not query.get("edits"):
            return None, gr.skip()
        self.runtime.ready.wait()  # the stages' defaults come with the engine, which the model loads
        try:
            link = read_link(query, self.runtime.spec)
            requests = requests_of(query["edits"], self.runtime.spec, link.steps) if link else ()
        except ValueError as error:
            return None, status_html(f"The edits of this link cannot be restored. {error}", kind="error")
        if link is None or not requests:
            return None, gr.skip()
        return EditInputs(link[:4], requests, query.get("compare") == "stages"), gr.skip()

    def fill(
        self,
        scene: Scene | None,
        asked: EditInputs | None,
        suggested: tuple[str, str],
        go: RunTrigger | None,
        requests: EditRequests,
        *fields: Any,
    ) -> list[Any]:
        """The form for a picture: (fields, hint, painter, brush, wishes, chips, suggested, asked, go).

        What an address asks for is put there, and done once its picture is there. Else a beginning is suggested, unless
        somebody has put something there.
        """
        self.runtime.ready.wait()
        dictionary, typed = self.runtime.dictionary, Fields(*fields)
        if dictionary is None:
            return [gr.skip()] * (len(typed) + 8)
        begun, hint, still = gr.skip(), gr.skip(), gr.skip()
        if asked is not None:
            *kept, one = asked.requests
            here = scene is not None and asked.picture == (scene.prompt, scene.seed, scene.steps, scene.guidance)
            form, hint = filled(self.runtime, dictionary, scene, one), self._hint_of(one)
            requests, region, cells, suggested = tuple(kept), one.region, one.cells, ("", "")
            if here:
                begun, still = RunTrigger(go.number + 1 if go else 1, asked.compare), None
        elif typed.blank or (typed.what, typed.region) == suggested:
            one = suggestion(self.runtime, dictionary, scene)
            form, hint = filled(self.runtime, dictionary, scene, one), self._hint_of(one)
            region, cells, suggested = one.region, "", (one.what, one.region)
        else:
            form = refreshed(self.runtime, dictionary, scene, typed.stage)
            region, cells = typed.region, typed.cells
        chips = chips_html(requests, self._steps(scene))
        brush = brush_updates(scene, region, cells) if PAINTED in (region, typed.region) else (gr.skip(), gr.skip())
        return [*form, hint, *brush, requests, chips, suggested, still, begun]

    def hint(self, kind: str, what: str | None, way: str | None) -> str:
        """What an edit would act on."""
        return hint_html(self.runtime.editor, kind, what, way)

    def _hint_of(self, request: EditRequest) -> str:
        return self.hint(request.kind, request.what, f"{request.hookpoint}|{request.branch}")

    def near(self, kind: str, way: str | None, event: gr.EventData) -> tuple[str, str]:
        """A label that was offered: (what, hint)."""
        word = str((event._data or {}).get("word", ""))
        return word, self.hint(kind, word, way)

    def point(self, scene: Scene | None, kind: str, event: gr.EventData) -> tuple[Any, Any, Any]:
        """The concepts at a point of the picture: (what, way, hint)."""
        dictionary, asked = self.runtime.dictionary, event._data or {}
        trace = None if scene is None else self.runtime.trace(scene.key)
        if dictionary is None or trace is None:
            return (gr.skip(),) * 3
        from core.edits import concepts_at
        from core.ui.concepts.results import way_key

        site, step = default_site(dictionary), asked.get("step")
        try:
            found = concepts_at(
                trace, float(asked["x"]), float(asked["y"]), site, steps=None if step is None else [int(step)]
            )
        except (KeyError, TypeError, ValueError):
            return (gr.skip(),) * 3
        what, way = ", ".join(str(target.number) for target in found), way_key(site)
        return what, way, self.hint(kind, what, way)

    def of_kind(self, scene: Scene | None, kind: str) -> tuple[Any, ...]:
        """What goes with a kind of edit: (region, stage, first, last, strength)."""
        stage = default_stage(kind)
        region = gr.Radio(interactive=False) if kind == "whole" else gr.Radio(interactive=True)
        if kind == "remove":
            region = gr.Radio(value="all", interactive=True)
        return region, stage, *self.of_stage(scene, stage), strength_slider(kind)

    def of_stage(self, scene: Scene | None, stage: str) -> tuple[Any, Any]:
        """The steps of a stage: (first, last)."""
        return span(stage, self.runtime.spec, self._steps(scene))

    def paint(self, painted: dict[str, Any] | None) -> str:
        """What was painted, as cells."""
        layers = (painted or {}).get("layers") or []
        return paint_cells(np.asarray(layers[0])[..., 3]) if layers else ""

    def _steps(self, scene: Scene | None) -> int:
        return n_steps_of(scene, self.runtime.spec)
