"""The page's events that need the server; the scripts in `assets` handle the rest."""

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import gradio as gr

from core.ui.attribution.tab import measure_updates, panel_html
from core.ui.backend import jobs
from core.ui.backend.errors import JobError, sentence
from core.ui.backend.fields import LATEST, QUIET, asked, copied
from core.ui.backend.inputs import MAX_QUERY, generation_problems, prompt_problem, upload_problems, verdicts
from core.ui.backend.jobs import GenerationProgress, Waiting
from core.ui.backend.link import PageLink, read_link
from core.ui.backend.runtime import MAX_PROMPT, Runtime
from core.ui.components import Page
from core.ui.concepts.tab import concepts_html, found_html, opened_html
from core.ui.examples import cache_example
from core.ui.interventions.events import wire_interventions
from core.ui.interventions.tab import why_empty_html
from core.ui.layout.tab import layout_html
from core.ui.look.export import image_query
from core.ui.look.scene import Scene
from core.ui.look.viewer import progress_viewer_html, seconds_left, status_html, viewer_html
from core.ui.look.words import badge_html, hints
from core.ui.questions.events import wire_questions

_REFRESH_SECONDS = 0.15
_READING_WORDS = "Reading the words…"


def wire(runtime: Runtime, page: Page) -> None:
    """Connect the page's components. A job is first begun (checked, given a ticket) and then waits for its turn."""
    events = _PageEvents(runtime, page)
    bar, tab = page.bar, page.attribution
    settings = [bar.prompt, bar.seed, bar.steps, bar.guidance]
    begun = [page.ticket, page.status]
    shown = [page.viewer, page.scene, page.status]

    generated, restored = (
        beginning.success(events.generate_image, [page.ticket, *settings, page.scene], shown, **QUIET)
        for beginning in (
            gr.on(
                [bar.generate.click, bar.prompt.submit],
                events.begin_generate,
                settings,
                begun,
                validator=events.check_generate,
                **QUIET,
            ),
            page.autorun.change(events.begin_restored, settings, begun, **QUIET),
        )
    )

    upload = [bar.image, bar.caption, bar.seed]
    uploaded = bar.analyse.click(
        events.begin_load_user_image, upload, begun, validator=events.check_user_image, **QUIET
    ).success(events.load_user_image, [page.ticket, *upload], shown, **QUIET)

    shown_at_once = [*settings, tab.given, tab.rel_error, page.viewer, page.scene, tab.panel, page.status]
    picked = bar.examples.pick(events.pick, None, shown_at_once, queue=False, **QUIET)
    loaded = page.load(events.load, None, [*shown_at_once, page.autorun], **QUIET)
    # Before the words are measured: the codes of a generated image are there already, and shown at once.
    for event in (generated, restored, uploaded, picked, loaded):
        event.success(
            events.trace,
            [page.scene, page.concepts.query],
            [page.concepts.panel, page.concepts.found, page.layout.panel],
            **QUIET,
        )

    concepts = page.concepts
    concepts.card.open(events.open_concept, [page.scene], concepts.card, queue=False, **QUIET)
    concepts.query.change(
        lambda query: found_html(runtime, query),
        concepts.query,
        concepts.found,
        **LATEST,
    )
    concepts.found.find(events.find_concepts, None, [concepts.query, concepts.found], queue=False, **QUIET)

    changed = gr.on([tab.given.input, tab.rel_error.input], events.begin_measure, [page.scene], begun, **QUIET)

    for event in (generated, restored, uploaded, changed):
        event.success(
            events.measure,
            [page.ticket, page.scene, tab.given, tab.rel_error],
            [tab.panel, page.status],
            **QUIET,
        )

    page.cancel.click(events.cancel, None, page.status, queue=False, **QUIET)
    panels = [page.concepts.panel, page.layout.panel, page.interventions.panel]
    typed, prompt = copied([bar.prompt.change], [bar.prompt])
    typed.then(events.hints, prompt, bar.hints, **LATEST)
    page.clock.tick(events.tick, prompt, [page.badge, page.clock, bar.hints, *panels], **QUIET)
    page.unload(events.leave)
    stopping = [page.cancel.click, bar.generate.click, bar.prompt.submit, bar.analyse.click, bar.examples.pick]
    wire_questions(runtime, page.questions, page.scene, tab.rel_error, stopping, page.unload)
    wire_interventions(
        runtime, page.interventions, tab, page.scene, page.status, [generated, restored, uploaded, picked], loaded
    )


class _PageEvents:
    """The handlers. Each request belongs to the session of one open page."""

    def __init__(self, runtime: Runtime, page: Page) -> None:
        self.runtime, self.page = runtime, page

    def check_generate(self, prompt: str, seed: float, steps: float, guidance: float) -> list[Any]:
        return verdicts(generation_problems(self.runtime, prompt, seed, steps, guidance))

    def check_user_image(self, image: str | None, caption: str, seed: float) -> list[Any]:
        return verdicts(upload_problems(self.runtime, image, caption, seed))

    def begin_generate(self, prompt: str, seed: float, steps: float, guidance: float, request: gr.Request) -> Any:
        query = image_query(prompt.strip(), int(seed), int(steps), float(guidance))
        return self._begin(request, "image words", query)

    def begin_restored(self, prompt: str, seed: float, steps: float, guidance: float, request: gr.Request) -> Any:
        """The image of the page's address; there is no one at the fields to read a validator's message."""
        problem = next(filter(None, generation_problems(self.runtime, prompt, seed, steps, guidance)), None)
        if problem:
            return 0, status_html(_not_restored(problem), kind="error")
        return self.begin_generate(prompt, seed, steps, guidance, request)

    def begin_load_user_image(self, image: str, caption: str, seed: float, request: gr.Request) -> Any:
        del image, caption, seed
        return self._begin(request, "image words")

    def begin_measure(self, scene: Scene | None, request: gr.Request) -> Any:
        if scene is None:
            return 0, status_html("Generate a picture first, or choose an example.", kind="error")
        return self._begin(request, "words")

    def _begin(self, request: gr.Request, stale: str, asked: str = "") -> tuple[int, str]:
        ticket = self.runtime.tickets.issue(_session(request))
        state, text = self.runtime.badge()
        waiting = f"Waiting: {text}" if state == "loading" else "Waiting for the model to be free…"
        return ticket, status_html(waiting, 0.0, stale, asked=asked)

    def generate_image(
        self,
        ticket: float,
        prompt: str,
        seed: float,
        steps: float,
        guidance: float,
        old: Scene | None,
        request: gr.Request,
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Yields (viewer, scene, status)."""
        runtime, number = self.runtime, int(ticket)
        if not runtime.tickets.claim(number, "generate"):
            yield gr.skip(), gr.skip(), gr.skip()
            return
        prompt, shown_at = prompt.strip(), 0.0
        work = jobs.generate(runtime, number, prompt, int(seed), int(steps), float(guidance))
        try:
            for item in work:
                if isinstance(item, Waiting):
                    yield gr.skip(), gr.skip(), status_html(item.text, 0.0, "image words")
                elif isinstance(item, Scene):
                    yield viewer_html(item, runtime.spec.stages), item, status_html(_READING_WORDS, 0.0, "words")
                    return
                elif time.monotonic() - shown_at > _REFRESH_SECONDS:
                    shown_at = time.monotonic()
                    yield self._preview(item, prompt), gr.skip(), _generation_status(item)
            yield self._viewer(old), gr.skip(), self._cancelled(number, request, shown=old)
        except Exception as error:
            runtime.tickets.drop(number)
            yield self._viewer(old), gr.skip(), status_html(sentence(error), kind="error")
        finally:
            work.close()

    def load_user_image(self, ticket: float, image: str, caption: str, seed: float) -> Iterator[tuple[Any, Any, Any]]:
        """Yields (viewer, scene, status)."""
        runtime, number = self.runtime, int(ticket)
        try:
            for item in jobs.load_user_image(runtime, number, Path(image), caption.strip(), int(seed)):
                if isinstance(item, Waiting):
                    yield gr.skip(), gr.skip(), status_html(item.text, 0.0, "image words")
                else:
                    scene, note = item
                    yield (
                        viewer_html(scene, runtime.spec.stages),
                        scene,
                        status_html(f"{note} {_READING_WORDS}", 0.0, "words"),
                    )
        except Exception as error:
            runtime.tickets.drop(number)
            yield gr.skip(), gr.skip(), status_html(sentence(error), kind="error")

    def trace(self, scene: Scene | None, query: str) -> Iterator[tuple[Any, Any, Any]]:
        """Yields (concepts panel, search panel, layout panel)."""
        runtime = self.runtime
        if scene is None:
            return
        found = None
        # The badge reports a model that could not be loaded.
        with suppress(JobError), closing(jobs.trace(runtime, None, scene)) as items:
            for item in items:
                found = None if isinstance(item, Waiting) else item
                if found is None:
                    yield (gr.skip(),) * 3  # a page that is closed meanwhile ends the job here
        browse = gr.skip() if query or runtime.dictionary is None else found_html(runtime, "")
        yield concepts_html(runtime, scene, found), browse, layout_html(runtime, scene, found)

    def open_concept(self, scene: Scene | None, event: gr.EventData) -> str:
        """The card of a concept."""
        data = asked(event)
        cached = None if scene is None else self.runtime.cached_trace(scene.key)
        return opened_html(self.runtime, str(data.get("site", "")), data.get("number"), cached)

    def find_concepts(self, event: gr.EventData) -> tuple[Any, str]:
        """A suggested label or a kind to browse was chosen: (query, found)."""
        word, kind = (str(asked(event).get(name) or "") for name in ("word", "kind"))
        return gr.skip() if kind else word[:MAX_QUERY], found_html(self.runtime, word, kind)

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
        name = str(asked(event).get("name", ""))
        return self._show_example(name) if name in self.page.examples else [gr.skip()] * 10

    def load(self, request: gr.Request) -> list[Any]:
        """Restore what the page's address asks for: a stored example at once, anything else by generating it again."""
        try:
            link = read_link(dict(request.query_params), self.runtime.spec)
        except ValueError as error:
            return [*[gr.skip()] * 9, status_html(sentence(error), kind="error"), 0]
        if link is None:
            return [gr.skip()] * 11
        for name, example in self.page.examples.items():
            if PageLink(example.prompt, example.seed, example.steps, example.guidance, link.given) == link:
                return [*self._show_example(name, link.given), 0]
        settings = [link.prompt[:MAX_PROMPT], link.seed, link.steps, link.guidance, link.given]
        if problem := prompt_problem(self.runtime, link.prompt):
            return [*settings, *[gr.skip()] * 4, status_html(_not_restored(problem), kind="error"), 0]
        return [
            *settings,
            *[gr.skip()] * 4,
            status_html("Restoring the picture of this link…", 0.0, "image words"),
            1,
        ]

    def _show_example(self, name: str, given: str = "rest") -> list[Any]:
        example = self.page.examples[name]
        a = cache_example(self.runtime, example, given)
        viewer = self._viewer(example.scene)
        settings = [example.prompt, example.seed, example.steps, example.guidance, given, a.settings["rel_error"]]
        return [*settings, viewer, example.scene, panel_html(self.runtime, example.scene, a), status_html()]

    def cancel(self, request: gr.Request) -> str:
        """Cancel the session's job; it stops within one U-Net call."""
        self.runtime.tickets.cancel(_session(request))
        return status_html("Cancelled.")

    def leave(self, request: gr.Request) -> None:
        """The page was closed: cancel its job."""
        self.runtime.tickets.cancel(_session(request))

    def hints(self, prompt: list[str] | None) -> str:
        """The words of the prompt that the model does not know; `prompt` is its copy, one item or None."""
        text = prompt[0] if prompt else ""
        return hints(self.runtime.unknown_words(text or ""), self.runtime.spec.name)

    def tick(self, prompt: list[str] | None) -> list[Any]:
        """Update the badge until the model is loaded: (badge, timer, hints, concepts, layout, interventions)."""
        runtime = self.runtime
        badge, panels = badge_html(*runtime.badge()), [gr.skip()] * 3
        if not runtime.ready.is_set():
            return [badge, gr.skip(), gr.skip(), *panels]
        if runtime.dictionary is None:  # say so before the first image
            panels = [concepts_html(runtime, None, None), layout_html(runtime, None, None), why_empty_html(runtime)]
        return [badge, gr.Timer(active=False), self.hints(prompt), *panels]

    def _viewer(self, scene: Scene | None) -> str:
        return viewer_html(scene, self.runtime.spec.stages, self.runtime.spec.num_inference_steps)

    def _preview(self, item: GenerationProgress, prompt: str) -> str:
        return progress_viewer_html(item.latest, prompt, item.frames, item.n_steps, self.runtime.spec.stages)

    def _cancelled(self, ticket: int, request: gr.Request, stale: str = "", shown: Scene | None = None) -> Any:
        """The status of a cancelled job; skipped if a newer job reports its own."""
        if self.runtime.tickets.is_replaced(ticket, _session(request)):
            return gr.skip()
        words = " The words shown belong to another picture." if stale else ""
        picture = "" if shown is None else f" Still showing “{shown.prompt}”."
        return status_html(f"Cancelled.{words}{picture}", stale=stale)


def _generation_status(item: GenerationProgress) -> str:
    done = len(item.frames)
    return status_html(
        f"Drawing: step {done} of {item.n_steps}{seconds_left(item.seconds_left)}", done / item.n_steps, "words"
    )


def _not_restored(problem: str) -> str:
    return f"This link cannot be restored. {problem}"


def _session(request: gr.Request) -> str:
    return str(request.session_hash)
