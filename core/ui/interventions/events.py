"""The events of the Interventions tab."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.events import Dependency

from core.ui.attribution.tab import AttributionTab, measure_updates
from core.ui.backend.errors import sentence
from core.ui.backend.fields import LATEST, QUIET, asked, copied
from core.ui.backend.inputs import verdicts, whole_in
from core.ui.backend.jobs import EditProgress, Waiting, intervene
from core.ui.backend.runtime import Runtime
from core.ui.interventions.form import (
    EditFields,
    chips_html,
)
from core.ui.interventions.form_events import EditRequests, FormEvents, RunTrigger
from core.ui.interventions.request import (
    CUSTOM_STEPS,
    MAX_REQUESTS,
    edit_of,
    stage_problem,
)
from core.ui.interventions.tab import InterventionsTab, empty_html, why_empty_html
from core.ui.look.scene import Scene
from core.ui.look.viewer import seconds_left, status_html

if TYPE_CHECKING:
    from core.ui.interventions.results import EditComparison, EditPlan

_UPLOADED = (
    "Your own picture cannot be edited: it was not generated here, so the noise to start from is not known. Generate a "
    "picture from its caption instead."
)
_STALE = "edits"
"""What of the page is outdated while a run computes, for `status_html`."""
_AT_ONCE: dict[str, Any] = {**QUIET, "queue": False}


def wire_interventions(
    runtime: Runtime,
    tab: InterventionsTab,
    attribution: AttributionTab,
    scene: gr.State,
    status: gr.HTML,
    images: Sequence[Dependency],
    loaded: Dependency,
) -> None:
    """Connect the tab's components.

    Args:
        runtime: What runs the edits.
        tab: The components.
        attribution: The attribution tab, whose measurement gives way to a run and continues after it.
        scene: The image to edit.
        status: The page's status line.
        images: The page's events after which there is another image.
        loaded: The page's event that reads its address.
    """
    events = _InterventionEvents(runtime)
    edited = [scene, tab.requests, *tab.fields]

    begun = [tab.ticket, tab.compare, status, tab.panel]
    shown = tab.show.click(events.accept, edited, None, validator=events.check, **QUIET)
    compared = tab.compare_stages.click(events.accept, edited, None, validator=events.check_compare, **QUIET)
    for beginning in (
        shown.success(events.begin_show, scene, begun, **QUIET),
        compared.success(events.begin_compare, scene, begun, **QUIET),
        tab.run_trigger.change(events.begin_linked, [scene, tab.run_trigger], begun, **QUIET),
    ):
        beginning.success(
            events.run,
            [
                tab.ticket,
                tab.compare,
                scene,
                attribution.given,
                attribution.rel_error,
                tab.comparison,
                tab.requests,
                *tab.fields,
            ],
            [tab.panel, tab.comparison, attribution.panel, status],
            **QUIET,
        )

    listed = [tab.requests, tab.chips]
    tab.add.click(events.add, edited, [*listed, tab.what, tab.hint], validator=events.check_add, **QUIET)
    tab.chips.drop(events.drop, [scene, tab.requests], listed, **_AT_ONCE)

    known = [scene, tab.linked, tab.suggested, tab.run_trigger, tab.requests, *tab.fields]
    form = [*tab.fields, tab.hint, *listed, tab.suggested, tab.linked, tab.run_trigger]
    restored = loaded.success(events.restore, None, [tab.linked, status], **QUIET)
    for event in (restored, *images):
        event.success(events.fill, known, form, **QUIET)

    # Not on `change`: filling the form changes several fields at once, and the answers would come in any order.
    triggers = [tab.kind.input, tab.what.input, tab.site.input]
    selected, selection = copied(triggers, [tab.kind, tab.what, tab.site])
    selected.then(lambda values: events.hint(*values), selection, tab.hint, **LATEST)
    tab.hint.point(events.point, [scene, tab.kind], [tab.what, tab.site, tab.hint], **_AT_ONCE)
    tab.hint.steer(events.steer, [tab.kind], [tab.what, tab.site, tab.hint], **_AT_ONCE)
    tab.hint.choose(events.choose_label, [tab.kind, tab.site], [tab.what, tab.hint], **_AT_ONCE)
    kind_defaults = [tab.region, tab.stage, tab.first, tab.last, tab.strength]
    tab.kind.input(events.kind_changed, [scene, tab.kind], kind_defaults, **_AT_ONCE)
    # In the queue: outside it, a state that changes triggers nothing.
    tab.hint.drag(events.drag, [scene, tab.run_trigger], [*tab.fields, tab.hint, *listed, tab.run_trigger], **QUIET)
    tab.stage.input(events.stage_changed, [scene, tab.stage], [tab.first, tab.last], **_AT_ONCE)
    gr.on([tab.first.input, tab.last.input], lambda: CUSTOM_STEPS, None, tab.stage, **_AT_ONCE)


class _InterventionEvents(FormEvents):
    """The handlers; `fields` are the values of `EditFields`.

    Gradio evaluates the type hints of handlers that take a request or an event, so these use imported types only.
    """

    # --- checks

    def check(self, scene: Scene | None, requests: EditRequests, *fields: Any) -> list[Any]:
        """The problem of each field; an empty form is fine if the list has edits."""
        entered = EditFields(*fields)
        if requests and entered.blank:
            return verdicts([None] * (2 + len(fields)))
        return verdicts([None, None, *entered.problems(self.runtime, self._steps(scene))])

    def check_compare(self, scene: Scene | None, requests: EditRequests, *fields: Any) -> list[Any]:
        """The same for a comparison of the stages: the chosen stage does not matter, but each must have steps."""
        spec, n_steps = self.runtime.spec, self._steps(scene)
        problems = (stage_problem(stage.name, spec, n_steps) for stage in spec.stages)
        problem = next((text for text in problems if text), None)
        found = self.check(scene, requests, *EditFields(*fields)._replace(stage=spec.stages[0].name))
        found[2 + EditFields._fields.index("stage")] = verdicts([problem])[0]
        return found

    def check_add(self, scene: Scene | None, requests: EditRequests, *fields: Any) -> list[Any]:
        """The same for an edit to be added to the list."""
        problems = EditFields(*fields).problems(self.runtime, self._steps(scene))
        if len(requests) + 1 >= MAX_REQUESTS:
            problems = problems._replace(what=f"At most {MAX_REQUESTS} edits can be combined. Remove one first.")
        return verdicts([None, None, *problems])

    def accept(self, *_: Any) -> None:
        """Does nothing: this event is for its validator."""

    # --- running

    def begin_show(self, request: gr.Request, scene: Scene | None) -> Any:
        """(ticket, compare, status, panel)"""
        return self._begin(request, scene, compare=False)

    def begin_compare(self, request: gr.Request, scene: Scene | None) -> Any:
        """(ticket, compare, status, panel)"""
        return self._begin(request, scene, compare=True)

    def begin_linked(self, request: gr.Request, scene: Scene | None, trigger: RunTrigger | None) -> Any:
        """(ticket, compare, status, panel)"""
        if trigger is None:
            return 0, False, gr.skip(), gr.skip()
        return self._begin(request, scene, trigger.compare)

    def _begin(self, request: gr.Request, scene: Scene | None, compare: bool) -> Any:
        if scene is None:
            status = status_html("Generate a picture first, or choose an example.", kind="error")
            return 0, compare, status, gr.skip()
        if scene.uploaded:
            return 0, compare, status_html(_UPLOADED, kind="error"), empty_html(_UPLOADED)
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
        """Yields (panel, comparison, words, status)."""
        runtime, number = self.runtime, int(ticket)
        if scene is None or not runtime.tickets.claim(number, "edit"):
            yield (gr.skip(),) * 4
            return
        # A measurement of the words gives way to this run and continues after it.
        stale = "words" if runtime.cached_attribution(scene.key, given, rel_error) is None else ""
        try:
            comparison = yield from self._generate(
                number, scene, self._plan(compare, requests, EditFields(*fields)), stale
            )
        except Exception as error:
            runtime.tickets.drop(number)
            status = status_html(sentence(error), kind="error", stale=stale)
            yield self._panel(old), gr.skip(), gr.skip(), status
            return
        if comparison is None:
            newer = runtime.tickets.is_replaced(number, str(request.session_hash))
            status = gr.skip() if newer else status_html("Cancelled.", stale=stale)
            yield self._panel(old), gr.skip(), gr.skip(), status
            return
        yield self._panel(comparison), comparison, gr.skip(), status_html(stale=stale)
        if stale:
            for words, status in measure_updates(runtime, number, scene, given, rel_error):
                yield gr.skip(), gr.skip(), words, status

    def _generate(
        self, ticket: int, scene: Scene, plan: "EditPlan", stale: str
    ) -> "Generator[tuple[Any, ...], None, EditComparison | None]":
        """Yields what `run` does, and returns the comparison, or None if it was cancelled."""
        from core.ui.interventions.panel import edit_progress_html
        from core.ui.interventions.results import measure_edits

        runtime = self.runtime
        edits = [[edit_of(one, scene.image.width) for one in requests] for _, requests in plan.rows]
        names = ["unedited", *(stage or "edited" for stage, _ in plan.rows)]
        with closing(intervene(runtime, ticket, scene, edits)) as work:
            for item in work:
                if isinstance(item, Waiting):
                    yield *(gr.skip(),) * 3, status_html(item.text, 0.0, f"{_STALE} {stale}")
                elif isinstance(item, EditProgress):
                    text = f"Redrawing: step {item.done} of {item.n_steps}{seconds_left(item.seconds_left)}"
                    panel = edit_progress_html(item, names) if item.frames else gr.skip()
                    status = status_html(text, item.done / item.n_steps, f"{_STALE} {stale}")
                    yield panel, gr.skip(), gr.skip(), status
                elif runtime.dictionary is not None:
                    return measure_edits(scene, plan, item, runtime.dictionary, runtime.segmenter)
        return None

    def _plan(self, compare: bool, requests: EditRequests, fields: EditFields) -> "EditPlan":
        from core.ui.interventions.results import EditPlan

        wanted = requests if fields.blank else (*requests, fields.request)
        return EditPlan(wanted, tuple(stage.name for stage in self.runtime.spec.stages) if compare else ())

    def _panel(self, comparison: "EditComparison | None") -> str:
        if comparison is None:
            return why_empty_html(self.runtime)
        from core.ui.interventions.panel import comparison_html

        return comparison_html(self.runtime, comparison)

    # --- the list

    def add(self, scene: Scene | None, requests: EditRequests, *fields: Any) -> tuple[Any, str, str, str]:
        """Add the edit to the list and clear the form: (requests, chips, what, hint)."""
        requests = (*requests, EditFields(*fields).request)
        return requests, chips_html(requests, self._steps(scene)), "", self.hint("move", "", None)

    def drop(self, scene: Scene | None, requests: EditRequests, event: gr.EventData) -> tuple[Any, str]:
        """Remove an edit from the list: (requests, chips)."""
        index = whole_in(asked(event).get("index", -1))
        requests = tuple(one for i, one in enumerate(requests) if i != index)
        return requests, chips_html(requests, self._steps(scene))
