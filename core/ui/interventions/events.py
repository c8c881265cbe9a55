"""The events of the Interventions tab."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
from gradio.events import Dependency

from core.ui.attribution.tab import AttributionTab, measure_updates
from core.ui.backend.errors import sentence
from core.ui.backend.fields import LATEST, QUIET, asked, copied
from core.ui.backend.inputs import verdicts, whole_in
from core.ui.backend.jobs import EditProgress, Waiting, intervene
from core.ui.backend.link import read_link
from core.ui.backend.runtime import Runtime
from core.ui.interventions.form import (
    EditFields,
    chips_html,
    default_site,
    fill_form,
    hint_html,
    n_steps_of,
    note_html,
    refresh_form,
    step_span,
    strength_slider,
    suggestion,
)
from core.ui.interventions.request import (
    CUSTOM_STEPS,
    MAX_REQUESTS,
    PAINTED,
    EditRequest,
    default_stage,
    default_strength,
    edit_of,
    requests_of,
    stage_problem,
)
from core.ui.interventions.tab import InterventionsTab, empty_html, why_empty_html
from core.ui.look.scene import Scene
from core.ui.look.viewer import seconds_left, status_html

if TYPE_CHECKING:
    from core.ui.interventions.results import EditComparison, EditPlan

EditRequests = tuple[EditRequest, ...]

_UPLOADED = (
    "Your own picture cannot be edited: it was not generated here, so the noise to start from is not known. Generate a "
    "picture from its caption instead."
)
_STALE = "edits"
"""What of the page is outdated while a run computes, for `status_html`."""
_AT_ONCE: dict[str, Any] = {**QUIET, "queue": False}


class EditLink(NamedTuple):
    """The edits that the page's address asks for."""

    generation: tuple[str, int, int, float]
    """Prompt, seed, steps and guidance."""
    requests: EditRequests
    compare: bool
    """Whether to compare the stages."""


class RunTrigger(NamedTuple):
    """Triggers the run that the page's address asks for."""

    number: int
    compare: bool


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


class _InterventionEvents:
    """The handlers; `fields` are the values of `EditFields`.

    Gradio evaluates the type hints of handlers that take a request or an event, so these use imported types only.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

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

    # --- filling the form

    def restore(self, request: gr.Request) -> tuple[Any, Any]:
        """The edits of the page's address: (linked, status)."""
        query = dict(request.query_params)
        if not query.get("edits"):
            return None, gr.skip()
        self.runtime.ready.wait()  # a kind's default stage comes from the engine, which is imported with the model
        try:
            link = read_link(query, self.runtime.spec)
            requests = requests_of(query["edits"], self.runtime.spec, link.steps) if link else ()
        except ValueError as error:
            return None, status_html(f"The edits of this link cannot be restored. {sentence(error)}", kind="error")
        if link is None or not requests:
            return None, gr.skip()
        return EditLink(link[:4], requests, query.get("compare") == "stages"), gr.skip()

    def fill(
        self,
        scene: Scene | None,
        linked: EditLink | None,
        suggested: tuple[str, str],
        trigger: RunTrigger | None,
        requests: EditRequests,
        *fields: Any,
    ) -> list[Any]:
        """The form for an image: (fields, hint, requests, chips, suggested, linked, run_trigger).

        The edits of the page's address are filled in, and run once their image is there. Otherwise an edit is
        suggested, unless something was entered.
        """
        self.runtime.ready.wait()
        dictionary, entered = self.runtime.dictionary, EditFields(*fields)
        if dictionary is None:
            return [gr.skip()] * (len(entered) + 6)
        run, hint, remaining = gr.skip(), gr.skip(), gr.skip()
        if linked is not None:
            *others, one = linked.requests
            here = scene is not None and linked.generation == (scene.prompt, scene.seed, scene.steps, scene.guidance)
            form, hint = fill_form(self.runtime, dictionary, scene, one), self._hint_of(one)
            requests, suggested = tuple(others), ("", "")
            if here:
                run, remaining = RunTrigger(trigger.number + 1 if trigger else 1, linked.compare), None
        elif entered.blank or (entered.what, entered.region) == suggested:
            one = suggestion(self.runtime, dictionary, scene)
            form, hint = fill_form(self.runtime, dictionary, scene, one), self._hint_of(one)
            suggested = (one.what, one.region)
        else:
            form = refresh_form(self.runtime, dictionary, scene, entered.stage)
        chips = chips_html(requests, self._steps(scene))
        return [*form, hint, requests, chips, suggested, remaining, run]

    def hint(self, kind: str, what: str | None, site: str | None) -> str:
        """What an edit would act on."""
        return hint_html(self.runtime.editor, kind, what, site)

    def _hint_of(self, request: EditRequest) -> str:
        return self.hint(request.kind, request.what, f"{request.hookpoint}|{request.branch}")

    def choose_label(self, kind: str, site: str | None, event: gr.EventData) -> tuple[str, str]:
        """A suggested label was chosen: (what, hint)."""
        word = str(asked(event).get("word", ""))
        return word, self.hint(kind, word, site)

    def steer(self, kind: str, event: gr.EventData) -> tuple[Any, Any, Any]:
        """A concept was chosen on its card: (what, site, hint)."""
        data = asked(event)
        what, site = str(data.get("number", "")), str(data.get("site", ""))
        if not what.isdecimal() or self.runtime.dictionary is None:
            return (gr.skip(),) * 3
        return what, site, self.hint(kind, what, site)

    def point(self, scene: Scene | None, kind: str, event: gr.EventData) -> tuple[Any, Any, Any]:
        """What is at a point of the image: (what, site, hint).

        In the final image that is the object or background that the segmenter finds there; at a chosen step, or where
        it finds none with concepts, the concepts that are most active there.
        """
        dictionary, data = self.runtime.dictionary, asked(event)
        trace = None if scene is None else self.runtime.cached_trace(scene.key)
        at, step = _numbers(data, "x", "y"), data.get("step")
        if dictionary is None or trace is None or at is None or scene is None:
            return (gr.skip(),) * 3
        from core.edits import concepts_at
        from core.ui.concepts.results import site_key

        if step is None and self.runtime.segmenter is not None:
            from core.ui.interventions.results import object_at

            found = object_at(self.runtime.segmenter, scene, dictionary, *at)
            if found is not None:
                return found.label, gr.skip(), self.hint(kind, found.label, None)
        site = default_site(dictionary)
        try:
            targets = concepts_at(trace, at[0], at[1], site, steps=None if step is None else [int(step)])
        except (LookupError, OverflowError, TypeError, ValueError):
            return (gr.skip(),) * 3
        what, key = ", ".join(str(target.number) for target in targets), site_key(site)
        return what, key, self.hint(kind, what, key)

    def drag(self, scene: Scene | None, trigger: RunTrigger | None, event: gr.EventData) -> list[Any]:
        """Move the object at one point of the image to another, and run that: (fields, hint, requests, chips, trigger).

        The region is where the object's own mask comes to lie.
        """
        runtime, data = self.runtime, asked(event)
        ends = _numbers(data, "x0", "y0", "x1", "y1")
        nothing: list[Any] = [gr.skip()] * len(EditFields._fields)
        if runtime.dictionary is None or scene is None or ends is None:
            return [*nothing, *[gr.skip()] * 4]
        if runtime.segmenter is None:
            text = "Dragging needs a segmenter, which this model comes without: say below what to move, and where."
            return [*nothing, note_html(text), *[gr.skip()] * 3]
        from core.ui.interventions.results import object_at

        found = object_at(runtime.segmenter, scene, runtime.dictionary, *ends[:2])
        if found is None or found.is_background:
            text = "There is no object where the drag began: begin on one, such as an animal or a house."
            return [*nothing, note_html(text), *[gr.skip()] * 3]
        one = EditRequest(
            "move",
            found.label,
            region=PAINTED,
            cells=found.cells_moved(ends[2] - ends[0], ends[3] - ends[1]),
            stage=default_stage("move"),
            strength=default_strength("move"),
        )
        form = fill_form(runtime, runtime.dictionary, scene, one)
        run = RunTrigger(trigger.number + 1 if trigger else 1, False)
        return [*form, self._hint_of(one), (), chips_html((), self._steps(scene)), run]

    def kind_changed(self, scene: Scene | None, kind: str) -> tuple[Any, ...]:
        """The defaults of a kind of edit: (region, stage, first, last, strength)."""
        stage = default_stage(kind)
        region = gr.Radio(interactive=False) if kind == "global" else gr.Radio(interactive=True)
        if kind == "remove":
            region = gr.Radio(value="all", interactive=True)
        return region, stage, *self.stage_changed(scene, stage), strength_slider(kind)

    def stage_changed(self, scene: Scene | None, stage: str) -> tuple[Any, Any]:
        """The steps of a stage: (first, last)."""
        return step_span(stage, self.runtime.spec, self._steps(scene))

    def _steps(self, scene: Scene | None) -> int:
        return n_steps_of(scene, self.runtime.spec)


def _numbers(data: Mapping[str, Any], *names: str) -> list[float] | None:
    """The values of an event as numbers from 0 to 1; None if one is not."""
    try:
        values = [float(data[name]) for name in names]
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return values if all(0 <= value <= 1 for value in values) else None
