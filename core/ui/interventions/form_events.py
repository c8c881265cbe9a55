"""The events that fill the form of an edit: from the page's address, a suggestion, the picture, or a concept's card."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import gradio as gr

from core.ui.backend.errors import sentence
from core.ui.backend.fields import asked
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
from core.ui.interventions.request import PAINTED, EditRequest, default_stage, default_strength, requests_of
from core.ui.look.scene import Scene
from core.ui.look.viewer import status_html

EditRequests = tuple[EditRequest, ...]


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


class FormEvents:
    """The handlers; `fields` are the values of `EditFields`.

    Gradio evaluates the type hints of handlers that take a request or an event, so these use imported types only.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

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
