"""The events of the further questions: what happens when one is asked, and how its answer grows."""

import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import gradio as gr
from gradio.events import Dependency

from core.ui.backend.errors import sentence
from core.ui.backend.fields import QUIET, asked
from core.ui.backend.inputs import captions_problem, prompt_problem, split_captions, verdicts
from core.ui.backend.jobs import MeasurementProgress, Waiting
from core.ui.backend.runtime import Runtime
from core.ui.look.scene import Scene
from core.ui.look.viewer import seconds_left
from core.ui.questions import jobs
from core.ui.questions.answers import progress_html
from core.ui.questions.counterfactual import counterfactual_html
from core.ui.questions.likelihood import likelihood_html
from core.ui.questions.pair import pair_html
from core.ui.questions.ranking import chance, ranking_html
from core.ui.questions.tab import Question, Questions

_REFRESH_SECONDS = 0.7
"""An unfinished answer is rendered anew this often, its progress twice as often."""
_MIN_REPLICATES = 4
"""Replicates from which an unfinished answer is shown: 95 % intervals of two are thirteen standard errors wide."""
AnswerUpdate = tuple[Any, Any]
"""(panel, status)."""
Listener = Callable[..., Dependency]
"""A component's method that attaches an event handler, such as `button.click`."""


def wire_questions(
    runtime: Runtime,
    questions: Questions,
    scene: gr.State,
    rel_error: gr.Radio,
    stopping: Sequence[Listener],
    unload: Callable[..., object],
) -> None:
    """Connect the questions.

    Args:
        runtime: What they are answered with.
        questions: Their components.
        scene: The image they are about.
        rel_error: The relative error to measure to.
        stopping: Listeners of the page's events that cancel running questions: Cancel, and whatever replaces the image.
        unload: Attaches a handler to the closing of the page.
    """
    events = _QuestionEvents(runtime, questions)
    pair, counterfactual, ranking, likelihood = questions.each

    def begun(question: Question) -> list[Any]:
        return [question.ticket, question.query, question.status]

    def answer(asked: Dependency, question: Question, run: Callable[..., Iterator[AnswerUpdate]], *more: Any) -> None:
        given = [question.ticket, question.query, scene, *more]
        asked.success(run, given, [question.panel, question.status], **QUIET)

    trigger = questions.trigger
    answer(trigger.pair(events.begin_pair, [scene], begun(pair), **QUIET), pair, events.pair, rel_error)
    changed = trigger.counterfactual(
        events.begin_counterfactual,
        [scene, questions.replacement],
        begun(counterfactual),
        validator=events.check_counterfactual,
        **QUIET,
    )
    answer(changed, counterfactual, events.counterfactual)
    compared = questions.compare.click(
        events.begin_captions,
        [scene, questions.captions],
        begun(ranking),
        validator=events.check_captions,
        **QUIET,
    )
    answer(compared, ranking, events.ranking)
    # From a link: the field is filled before its captions are compared.
    filled = [questions.captions, questions.captions_fold, *begun(ranking)]
    restored = trigger.captions(events.restore_captions, [scene], filled, **QUIET)
    answer(restored, ranking, events.ranking)
    measured = trigger.likelihood(events.begin_likelihood, [scene], begun(likelihood), **QUIET)
    answer(measured, likelihood, events.measure_likelihood)

    statuses = [question.status for question in questions.each]
    for listener in (trigger.stop, *stopping):
        listener(events.stop, None, statuses, queue=False, **QUIET)
    unload(events.leave)


class _QuestionEvents:
    """The handlers. Each question has a ticket of its own, so that one does not cancel another."""

    def __init__(self, runtime: Runtime, questions: Questions) -> None:
        self.runtime, self.questions = runtime, questions

    def check_counterfactual(self, scene: Scene | None, replacement: str) -> list[Any]:
        del scene
        # An empty replacement removes the word.
        return verdicts([None, prompt_problem(self.runtime, replacement) if (replacement or "").strip() else None])

    def check_captions(self, scene: Scene | None, captions: str) -> list[Any]:
        del scene
        return verdicts([None, captions_problem(self.runtime, captions)])

    def begin_pair(self, scene: Scene | None, event: gr.EventData, request: gr.Request) -> tuple[int, str, str]:
        data = asked(event)
        return self._begin(
            "pair", scene, request, {key: str(data.get(key, "")) for key in ("first", "second", "given")}
        )

    def begin_counterfactual(
        self, scene: Scene | None, replacement: str, event: gr.EventData, request: gr.Request
    ) -> tuple[int, str, str]:
        data = asked(event)
        query = {"word": str(data.get("word", "")), "to": str(data.get("to") or replacement or "").strip()}
        return self._begin("counterfactual", scene, request, query)

    def begin_captions(self, scene: Scene | None, captions: str, request: gr.Request) -> tuple[int, str, str]:
        return self._begin("captions", scene, request, {"captions": split_captions(captions)})

    def begin_likelihood(self, scene: Scene | None, request: gr.Request) -> tuple[int, str, str]:
        return self._begin("likelihood", scene, request, {})

    def restore_captions(self, scene: Scene | None, event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        text = str(asked(event).get("captions", ""))
        problem = captions_problem(self.runtime, text)
        if problem:
            return text, gr.Accordion(open=True), 0, "", progress_html(problem, kind="error")
        return text, gr.Accordion(open=True), *self.begin_captions(scene, text, request)

    def _begin(
        self, name: str, scene: Scene | None, request: gr.Request, query: dict[str, Any]
    ) -> tuple[int, str, str]:
        if scene is None:
            return 0, "", progress_html("Generate a picture first, or choose an example.", kind="error")
        ticket = self.runtime.tickets.issue(_ticket_owner(request, name))
        state, text = self.runtime.badge()
        waiting = f"Waiting: {text}" if state == "loading" else "Waiting for the model to be free…"
        return ticket, json.dumps(query), progress_html(waiting, 0.0)

    def pair(
        self, ticket: float, query: str, scene: Scene | None, rel_error: float, request: gr.Request
    ) -> Iterator[AnswerUpdate]:
        """Yields (panel, status)."""
        if (asked := self._claim(ticket, query, scene)) is None or scene is None:
            yield gr.skip(), gr.skip()
            return
        words = [asked["first"], asked["second"]]
        work = jobs.decompose(self.runtime, int(ticket), scene, words, asked["given"], float(rel_error))
        yield from self._updates(
            "pair", ticket, request, work, pair_html, scene, lambda item: _pair_status(item, rel_error)
        )

    def counterfactual(
        self, ticket: float, query: str, scene: Scene | None, request: gr.Request
    ) -> Iterator[AnswerUpdate]:
        """Yields (panel, status)."""
        if (asked := self._claim(ticket, query, scene)) is None or scene is None:
            yield gr.skip(), gr.skip()
            return
        work = jobs.measure_counterfactual(self.runtime, int(ticket), scene, asked["word"], asked["to"] or None)
        yield from self._updates(
            "counterfactual", ticket, request, work, counterfactual_html, scene, _counterfactual_status
        )

    def ranking(self, ticket: float, query: str, scene: Scene | None, request: gr.Request) -> Iterator[AnswerUpdate]:
        """Yields (panel, status)."""
        if (asked := self._claim(ticket, query, scene)) is None or scene is None:
            yield gr.skip(), gr.skip()
            return
        work = jobs.rank_captions(self.runtime, int(ticket), scene, asked["captions"])
        yield from self._updates("captions", ticket, request, work, ranking_html, scene, _ranking_status)

    def measure_likelihood(
        self, ticket: float, query: str, scene: Scene | None, request: gr.Request
    ) -> Iterator[AnswerUpdate]:
        """Yields (panel, status)."""
        if self._claim(ticket, query, scene) is None or scene is None:
            yield gr.skip(), gr.skip()
            return
        work = jobs.likelihood(self.runtime, int(ticket), scene)
        yield from self._updates("likelihood", ticket, request, work, likelihood_html, scene, _likelihood_status)

    def _claim(self, ticket: float, query: str, scene: Scene | None) -> dict[str, Any] | None:
        """What was asked, if this request is the one to answer it."""
        if scene is None or not query or not self.runtime.tickets.claim(int(ticket), "answer"):
            return None
        asked: dict[str, Any] = json.loads(query)
        return asked

    def _updates(
        self,
        name: str,
        ticket: float,
        request: gr.Request,
        work: Generator[Any, None, None],
        render: Callable[..., str],
        scene: Scene,
        describe: Callable[[MeasurementProgress], str],
    ) -> Iterator[AnswerUpdate]:
        """The panel and the status as the work goes on."""
        runtime = self.runtime
        shown, shown_at, reported_at, share = None, 0.0, 0.0, 0.0
        try:
            with closing(work):
                for item in work:
                    now = time.monotonic()
                    share = getattr(item, "share", share)
                    if isinstance(item, Waiting):
                        yield gr.skip(), progress_html(item.text, share)
                    elif not isinstance(item, MeasurementProgress):
                        runtime.tickets.drop(int(ticket))
                        yield render(runtime, scene, item), progress_html()
                        return
                    elif _worth_showing(item.partial, shown) and now - shown_at > _REFRESH_SECONDS:
                        shown, shown_at, reported_at = item.partial, now, now
                        yield render(runtime, scene, shown, running=True), progress_html(describe(item), item.share)
                    elif now - reported_at > _REFRESH_SECONDS / 2:
                        reported_at = now
                        yield gr.skip(), progress_html(describe(item), item.share)
        except Exception as error:
            runtime.tickets.drop(int(ticket))
            yield gr.skip(), progress_html(sentence(error), kind="error")
            return
        newer = runtime.tickets.is_replaced(int(ticket), _ticket_owner(request, name))
        yield (
            gr.skip() if shown is None else render(runtime, scene, shown),
            gr.skip() if newer else progress_html("Stopped."),
        )

    def stop(self, request: gr.Request) -> tuple[Any, ...]:
        """Stop all running questions; each job notices within one U-Net call and reports it itself."""
        tickets = self.runtime.tickets
        held = [tickets.newest(_ticket_owner(request, question.name)) for question in self.questions.each]
        running = [tickets.live(ticket) for ticket in held]
        self.leave(request)
        return tuple(progress_html("Stopped.") if runs else gr.skip() for runs in running)

    def leave(self, request: gr.Request) -> None:
        """The page was closed: cancel its questions."""
        for question in self.questions.each:
            self.runtime.tickets.cancel(_ticket_owner(request, question.name))


def _worth_showing(partial: Any, shown: Any) -> bool:
    """Whether an unfinished result is new and has enough replicates for a meaningful error."""
    enough = getattr(partial, "n_replicates", _MIN_REPLICATES) >= _MIN_REPLICATES
    return partial is not None and partial is not shown and enough


def _ticket_owner(request: gr.Request, name: str) -> str:
    """The session that a question's tickets are issued to."""
    return f"{request.session_hash} {name}"


def _pair_status(item: MeasurementProgress, rel_error: float) -> str:
    done = (
        f"error {item.error:.0%}, target {rel_error:.0%}" if item.error is not None else f"{item.n_evals} evaluations"
    )
    return f"Measuring the two words: {done}{seconds_left(item.seconds_left)}"


def _ranking_status(item: MeasurementProgress) -> str:
    if item.partial is None:
        return f"Comparing the captions: {item.n_evals} evaluations{seconds_left(item.seconds_left)}"
    wanted = item.partial.settings["certainty"]
    sure = f"certainty {chance(item.partial.p_order)}, target {wanted:.0%}"
    return f"Comparing the captions: {sure}{seconds_left(item.seconds_left)}"


def _likelihood_status(item: MeasurementProgress) -> str:
    done = f"{item.n_evals} evaluations"
    if item.partial is not None:
        done = f"error {item.error:.3f} bits per dimension, target {item.partial.settings['error']:g}"
    return f"Measuring the picture: {done}{seconds_left(item.seconds_left)}"


def _counterfactual_status(item: MeasurementProgress) -> str:
    step = "Back to the noise and forwards again" if item.partial is None else "Measuring the word’s bits"
    return f"{step}{seconds_left(item.seconds_left)}"
