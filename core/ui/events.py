"""What happens when: every event of the page, apart from what the browser does by itself."""

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from core.ui.attribution.tab import measure_updates, panel_html
from core.ui.concepts.tab import concepts_html, found_html, opened_html
from core.ui.examples import keep_example
from core.ui.inputs import draw_problems, own_problems, verdicts
from core.ui.interventions.tab import why_empty_html
from core.ui.jobs import Drawing, JobError, Waiting, bring, draw, trace
from core.ui.layout.tab import layout_html
from core.ui.link import Link, read_link
from core.ui.look.picture import drawing_html, seconds_left, stage_html, status_html
from core.ui.look.scene import Scene
from core.ui.look.words import badge_html, hints
from core.ui.questions.events import wire_questions
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.ui.page import Page

MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""Model work: one job at a time."""
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "multiple"}
"""The page tells progress in its own place, and its own events are nobody else's business."""
_REFRESH_SECONDS = 0.15
_DRAWN = "Reading the words…"


def wire(runtime: Runtime, page: "Page") -> tuple[list[Any], Any]:
    """Connect the page's components. Each job is begun (checked, numbered, told) and then waits for its turn.

    Returns the events after which there is another picture, and that after which the page's address was read.
    """
    events = _Events(runtime, page)
    bar, tab = page.bar, page.tab
    asked = [bar.prompt, bar.seed, bar.steps, bar.guidance]
    begun = [page.ticket, page.status]
    pictured = [page.stage, page.scene, page.status]

    drawing = gr.on(
        [bar.generate.click, bar.prompt.submit, page.autorun.change],
        events.begin_draw,
        asked,
        begun,
        validator=events.check_draw,
        **QUIET,
    ).success(events.draw, [page.ticket, *asked, page.scene], pictured, **MODEL, **QUIET)

    brought = [bar.picture, bar.caption, bar.seed]
    bringing = bar.read.click(
        events.begin_load_user_image, brought, begun, validator=events.check_user_image, **QUIET
    ).success(events.bring, [page.ticket, *brought], pictured, **QUIET)

    # Before the words are measured: what was drawn here has its codes already, and they are shown at once.
    shown = [*asked, tab.given, tab.rel_error, page.stage, page.scene, tab.panel, page.status]
    picking = bar.examples.pick(events.pick, None, shown, queue=False, **QUIET)
    loading = page.load(events.load, None, [*shown, page.autorun], **QUIET)
    pictures = [drawing, bringing, picking]
    for ready in (*pictures, loading):
        ready.success(
            events.read,
            [page.scene, page.concepts.query],
            [page.concepts.panel, page.concepts.found, page.layout.panel],
            **QUIET,
        )

    concepts = page.concepts
    concepts.card.open(events.open, [page.scene], concepts.card, queue=False, **QUIET)
    concepts.query.change(
        lambda query: found_html(runtime, query),
        concepts.query,
        concepts.found,
        queue=False,
        **{**QUIET, "trigger_mode": "always_last"},
    )
    concepts.found.find(events.find, None, [concepts.query, concepts.found], queue=False, **QUIET)

    recounting = gr.on([tab.given.input, tab.rel_error.input], events.begin_measure, [page.scene], begun, **QUIET)

    for ready in (drawing, bringing, recounting):
        ready.success(
            events.measure,
            [page.ticket, page.scene, tab.given, tab.rel_error],
            [tab.panel, page.status],
            **MODEL,
            **QUIET,
        )

    page.cancel.click(events.cancel, None, page.status, queue=False, **QUIET)
    panels = [page.concepts.panel, page.layout.panel, page.interventions.panel]
    page.clock.tick(events.tick, [bar.prompt], [page.badge, page.clock, bar.hints, *panels], **QUIET)
    bar.prompt.change(
        lambda prompt: hints(runtime.unknown_words(prompt or ""), runtime.spec.name),
        bar.prompt,
        bar.hints,
        **{**QUIET, "trigger_mode": "always_last"},
    )
    page.unload(events.leave)
    wire_questions(runtime, page, MODEL, QUIET)
    return pictures, loading


class _Events:
    """The handlers, as methods of what they share. Session is whoever has the page open."""

    def __init__(self, runtime: Runtime, page: "Page") -> None:
        self.runtime, self.page = runtime, page

    def check_draw(self, prompt: str, seed: float, steps: float, guidance: float) -> list[Any]:
        return verdicts(draw_problems(self.runtime, prompt, seed, steps, guidance))

    def check_user_image(self, picture: str | None, caption: str, seed: float) -> list[Any]:
        return verdicts(own_problems(self.runtime, picture, caption, seed))

    def begin_draw(self, prompt: str, seed: float, steps: float, guidance: float, request: gr.Request) -> Any:
        del prompt, seed, steps, guidance  # there for the validator, which takes the same
        return self._begin(request, "picture words")

    def begin_load_user_image(self, picture: str, caption: str, seed: float, request: gr.Request) -> Any:
        del picture, caption, seed
        return self._begin(request, "picture words")

    def begin_measure(self, scene: Scene | None, request: gr.Request) -> Any:
        if scene is None:
            return 0, status_html("Generate a picture first, or choose an example.", kind="error")
        return self._begin(request, "words")

    def _begin(self, request: gr.Request, stale: str) -> tuple[int, str]:
        ticket = self.runtime.tickets.issue(_session(request))
        state, text = self.runtime.badge()
        waiting = f"Waiting: {text}" if state == "loading" else "Waiting for the model to be free…"
        return ticket, status_html(waiting, 0.0, stale)

    def draw(
        self,
        ticket: float,
        prompt: str,
        seed: float,
        steps: float,
        guidance: float,
        old: Scene | None,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Yields (stage, scene, status)."""
        runtime, number = self.runtime, int(ticket)
        if not runtime.tickets.claim(number, "draw"):
            yield gr.skip(), gr.skip(), gr.skip()
            return
        prompt, shown_at = prompt.strip(), 0.0
        work = draw(runtime, number, prompt, int(seed), int(steps), float(guidance))
        try:
            for item in work:
                if isinstance(item, Waiting):
                    yield gr.skip(), gr.skip(), status_html(item.text, 0.0, "picture words")
                elif isinstance(item, Scene):
                    yield stage_html(item, runtime.spec.stages), item, status_html(_DRAWN, 0.0, "words")
                    return
                elif time.monotonic() - shown_at > _REFRESH_SECONDS:
                    shown_at = time.monotonic()
                    yield self._drawing(item, prompt), gr.skip(), _drawing_status(item)
            yield self._stage(old), gr.skip(), self._cancelled(number, request)
        except (JobError, ValueError) as error:
            runtime.tickets.drop(number)
            yield self._stage(old), gr.skip(), status_html(str(error), kind="error")
        finally:
            work.close()

    def bring(self, ticket: float, picture: str, caption: str, seed: float) -> Iterator[tuple[Any, Any, Any]]:
        """Yields (stage, scene, status)."""
        runtime, number = self.runtime, int(ticket)
        try:
            for item in bring(runtime, number, Path(picture), caption.strip(), int(seed)):
                if isinstance(item, Waiting):
                    yield gr.skip(), gr.skip(), status_html(item.text, 0.0, "picture words")
                else:
                    scene, note = item
                    yield stage_html(scene, runtime.spec.stages), scene, status_html(f"{note} {_DRAWN}", 0.0, "words")
        except (JobError, ValueError) as error:
            runtime.tickets.drop(number)
            yield gr.skip(), gr.skip(), status_html(str(error), kind="error")

    def read(self, scene: Scene | None, query: str) -> Iterator[tuple[Any, Any, Any]]:
        """Yields (concepts, what can be browsed, layout)."""
        runtime = self.runtime
        if scene is None:
            return
        found = None
        # Of a model that could not be loaded the badge tells.
        with suppress(JobError), closing(trace(runtime, None, scene)) as items:
            for item in items:
                found = None if isinstance(item, Waiting) else item
        browse = gr.skip() if query or runtime.dictionary is None else found_html(runtime, "")
        yield concepts_html(runtime, scene, found), browse, layout_html(runtime, scene, found)

    def open(self, scene: Scene | None, event: gr.EventData) -> str:
        """The card of a concept."""
        asked = event._data or {}
        kept = None if scene is None else self.runtime.trace(scene.key)
        return opened_html(self.runtime, str(asked.get("way", "")), asked.get("number"), kept)

    def find(self, event: gr.EventData) -> tuple[Any, str]:
        """What is chosen where a search found nothing, or to browse: (query, found)."""
        asked = event._data or {}
        word, kind = asked.get("word"), asked.get("kind")
        return gr.skip() if kind else str(word or ""), found_html(self.runtime, str(word or ""), kind)

    def measure(
        self, ticket: float, scene: Scene | None, given: str, rel_error: float, request: gr.Request
    ) -> Iterator[tuple[Any, Any]]:
        """Yields (panel, status)."""
        number = int(ticket)
        if scene is None or not self.runtime.tickets.claim(number, "measure"):
            yield gr.skip(), gr.skip()
            return
        stale = yield from measure_updates(self.runtime, number, scene, given, rel_error)
        if stale is not None:
            yield gr.skip(), self._cancelled(number, request, stale)

    def pick(self, event: gr.EventData, request: gr.Request) -> list[Any]:
        """Show a stored example."""
        self.runtime.tickets.cancel(_session(request))
        name = str((event._data or {}).get("name", ""))
        return self._show_example(name) if name in self.page.examples else [gr.skip()] * 10

    def load(self, request: gr.Request) -> list[Any]:
        """Restore what the page's address asks for; a stored example at once, anything else by drawing it again."""
        try:
            link = read_link(dict(request.query_params), self.runtime.spec)
        except ValueError as error:
            return [*[gr.skip()] * 9, status_html(str(error), kind="error"), 0]
        if link is None:
            return [gr.skip()] * 11
        for name, example in self.page.examples.items():
            if Link(example.prompt, example.seed, example.steps, example.guidance, link.given) == link:
                return [*self._show_example(name, link.given), 0]
        settings = [link.prompt, link.seed, link.steps, link.guidance, link.given]
        return [
            *settings,
            *[gr.skip()] * 4,
            status_html("Restoring the picture of this link…", 0.0, "picture words"),
            1,
        ]

    def _show_example(self, name: str, given: str = "rest") -> list[Any]:
        example = self.page.examples[name]
        a = keep_example(self.runtime, example, given)
        stage = self._stage(example.scene)
        settings = [example.prompt, example.seed, example.steps, example.guidance, given, a.settings["rel_error"]]
        return [*settings, stage, example.scene, panel_html(self.runtime, example.scene, a), status_html()]

    def cancel(self, request: gr.Request) -> str:
        """Stop what this session has asked for; the job itself notices within one U-Net call."""
        self.runtime.tickets.cancel(_session(request))
        return status_html("Cancelled.")

    def leave(self, request: gr.Request) -> None:
        """A closed page wants nothing any more."""
        self.runtime.tickets.cancel(_session(request))

    def tick(self, prompt: str) -> list[Any]:
        """Follow the model's loading until it is over: (badge, clock, hints, concepts, layout, what edits did)."""
        runtime = self.runtime
        badge, panels = badge_html(*runtime.badge()), [gr.skip()] * 3
        if not runtime.ready.is_set():
            return [badge, gr.skip(), gr.skip(), *panels]
        if runtime.dictionary is None:  # said now, before anybody waits for a picture to be read
            panels = [concepts_html(runtime, None, None), layout_html(runtime, None, None), why_empty_html(runtime)]
        unknown = hints(runtime.unknown_words(prompt or ""), runtime.spec.name)
        return [badge, gr.Timer(active=False), unknown, *panels]

    def _stage(self, scene: Scene | None) -> str:
        return stage_html(scene, self.runtime.spec.stages, self.runtime.spec.num_inference_steps)

    def _drawing(self, item: Drawing, prompt: str) -> str:
        return drawing_html(item.latest, prompt, item.frames, item.n_steps, self.runtime.spec.stages)

    def _cancelled(self, ticket: int, request: gr.Request, stale: str = "") -> Any:
        """What to say of a job that stopped: nothing where a newer one has its own things to say."""
        if self.runtime.tickets.newest(_session(request)) > ticket:
            return gr.skip()
        return status_html("Cancelled." + (" The words are not those of this picture." if stale else ""), stale=stale)


def _drawing_status(item: Drawing) -> str:
    done = len(item.frames)
    return status_html(
        f"Drawing: step {done} of {item.n_steps}{seconds_left(item.seconds_left)}", done / item.n_steps, "words"
    )


def _session(request: gr.Request) -> str:
    return str(request.session_hash)
