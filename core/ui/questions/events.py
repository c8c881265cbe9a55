"""What happens when a further question about the picture is asked, and how its answer grows."""

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import gradio as gr

from core.ui.inputs import captions_problem, other_word_problem, split_captions, verdicts
from core.ui.jobs import JobError, Measuring, Waiting
from core.ui.look.picture import seconds_left
from core.ui.look.scene import Scene
from core.ui.questions.answers import asking_html
from core.ui.questions.counterfactual import absence_html
from core.ui.questions.jobs import expect, rank, take_apart, without_word
from core.ui.questions.likelihood import likelihood_html
from core.ui.questions.pair import pair_html
from core.ui.questions.ranking import chance, ranking_html
from core.ui.questions.tab import Question
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.ui.page import Page

_REFRESH_SECONDS = 0.7
"""An unfinished answer is shown anew this often, its progress twice as often."""
_LEAST = 4
"""Repeats from which on an unfinished answer is shown: 95 % intervals of two are as wide as thirteen errors."""
Update = tuple[Any, Any]
"""(panel, status)."""


def wire_questions(runtime: Runtime, page: "Page", model: dict[str, Any], quiet: dict[str, Any]) -> None:
    """Connect the questions. `model` and `quiet` are options of events: of those that use the model, of all."""
    events, all_of = _Events(runtime, page), page.questions
    pair, absence, ranking, likelihood = all_of.each

    def begun(question: Question) -> list[Any]:
        return [question.ticket, question.asked, question.status]

    def answer(asked: Any, question: Question, run: Callable[..., Iterator[Update]], *more: Any) -> None:
        given = [question.ticket, question.asked, page.scene, *more]
        asked.success(run, given, [question.panel, question.status], **model, **quiet)

    asker = all_of.asker
    answer(asker.pair(events.begin_pair, [page.scene], begun(pair), **quiet), pair, events.pair, page.tab.rel_error)
    without = asker.absence(
        events.begin_absence, [page.scene, all_of.other], begun(absence), validator=events.check_absence, **quiet
    )
    answer(without, absence, events.absence)
    compared = all_of.compare.click(
        events.begin_captions,
        [page.scene, all_of.captions],
        begun(ranking),
        validator=events.check_captions,
        **quiet,
    )
    answer(compared, ranking, events.ranking)
    # From a link: the field is filled before its captions are compared.
    filled = [all_of.captions, all_of.fold, *begun(ranking)]
    restored = asker.captions(events.restore_captions, [page.scene], filled, **quiet)
    answer(restored, ranking, events.ranking)
    measured = asker.likelihood(events.begin_likelihood, [page.scene], begun(likelihood), **quiet)
    answer(measured, likelihood, events.expected)

    statuses = [question.status for question in all_of.each]
    for stopping in (asker.stop, page.cancel.click):
        stopping(events.stop, None, statuses, queue=False, **quiet)
    # An answer about a picture that is going is not wanted any more.
    for going in (page.bar.generate.click, page.bar.prompt.submit, page.bar.read.click, page.bar.examples.pick):
        going(events.stop, None, statuses, queue=False, **quiet)
    page.unload(events.leave)


class _Events:
    """The handlers. Each question has a ticket of its own, so that one does not cancel another."""

    def __init__(self, runtime: Runtime, page: "Page") -> None:
        self.runtime, self.page = runtime, page

    def check_absence(self, scene: Scene | None, other: str) -> list[Any]:
        del scene
        return verdicts([None, other_word_problem(self.runtime, other)])

    def check_captions(self, scene: Scene | None, captions: str) -> list[Any]:
        del scene
        return verdicts([None, captions_problem(self.runtime, captions)])

    def begin_pair(self, scene: Scene | None, event: gr.EventData, request: gr.Request) -> tuple[int, str, str]:
        asked = event._data or {}
        wanted = {name: str(asked.get(name, "")) for name in ("first", "second", "given")}
        return self._begin("pair", scene, request, wanted)

    def begin_absence(
        self, scene: Scene | None, other: str, event: gr.EventData, request: gr.Request
    ) -> tuple[int, str, str]:
        asked = event._data or {}
        wanted = {"word": str(asked.get("word", "")), "to": str(asked.get("to") or other or "").strip()}
        return self._begin("absence", scene, request, wanted)

    def begin_captions(self, scene: Scene | None, captions: str, request: gr.Request) -> tuple[int, str, str]:
        return self._begin("captions", scene, request, {"captions": split_captions(captions)})

    def begin_likelihood(self, scene: Scene | None, request: gr.Request) -> tuple[int, str, str]:
        return self._begin("likelihood", scene, request, {})

    def restore_captions(self, scene: Scene | None, event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        text = str((event._data or {}).get("captions", ""))
        problem = captions_problem(self.runtime, text)
        if problem:
            return text, gr.Accordion(open=True), 0, "", asking_html(problem, kind="error")
        return text, gr.Accordion(open=True), *self.begin_captions(scene, text, request)

    def _begin(
        self, name: str, scene: Scene | None, request: gr.Request, wanted: dict[str, Any]
    ) -> tuple[int, str, str]:
        if scene is None:
            return 0, "", asking_html("Generate a picture first, or choose an example.", kind="error")
        ticket = self.runtime.tickets.issue(_holder(request, name))
        state, text = self.runtime.badge()
        waiting = f"Waiting: {text}" if state == "loading" else "Waiting for the model to be free…"
        return ticket, json.dumps(wanted), asking_html(waiting, 0.0)

    def pair(
        self, ticket: float, asked: str, scene: Scene | None, rel_error: float, request: gr.Request
    ) -> Iterator[Update]:
        """Yields (panel, status)."""
        if (wanted := self._wanted(ticket, asked, scene)) is None or scene is None:
            yield gr.skip(), gr.skip()
            return
        words = [wanted["first"], wanted["second"]]
        work = take_apart(self.runtime, int(ticket), scene, words, wanted["given"], float(rel_error))
        yield from self._updates("pair", ticket, request, work, pair_html, scene, lambda item: _error(item, rel_error))

    def absence(self, ticket: float, asked: str, scene: Scene | None, request: gr.Request) -> Iterator[Update]:
        """Yields (panel, status)."""
        if (wanted := self._wanted(ticket, asked, scene)) is None or scene is None:
            yield gr.skip(), gr.skip()
            return
        work = without_word(self.runtime, int(ticket), scene, wanted["word"], wanted["to"] or None)
        yield from self._updates("absence", ticket, request, work, absence_html, scene, _way)

    def ranking(self, ticket: float, asked: str, scene: Scene | None, request: gr.Request) -> Iterator[Update]:
        """Yields (panel, status)."""
        if (wanted := self._wanted(ticket, asked, scene)) is None or scene is None:
            yield gr.skip(), gr.skip()
            return
        work = rank(self.runtime, int(ticket), scene, wanted["captions"])
        yield from self._updates("captions", ticket, request, work, ranking_html, scene, _certainty)

    def expected(self, ticket: float, asked: str, scene: Scene | None, request: gr.Request) -> Iterator[Update]:
        """Yields (panel, status)."""
        if self._wanted(ticket, asked, scene) is None or scene is None:
            yield gr.skip(), gr.skip()
            return
        work = expect(self.runtime, int(ticket), scene)
        yield from self._updates("likelihood", ticket, request, work, likelihood_html, scene, _bits_error)

    def _wanted(self, ticket: float, asked: str, scene: Scene | None) -> dict[str, Any] | None:
        """What was asked, if this request is the one to answer it."""
        if scene is None or not asked or not self.runtime.tickets.claim(int(ticket), "answer"):
            return None
        wanted: dict[str, Any] = json.loads(asked)
        return wanted

    def _updates(
        self,
        name: str,
        ticket: float,
        request: gr.Request,
        work: Generator[Any, None, None],
        render: Callable[..., str],
        scene: Scene,
        told: Callable[[Measuring], str],
    ) -> Iterator[Update]:
        """The panel and the status as the work goes on."""
        runtime = self.runtime
        shown, shown_at, told_at = None, 0.0, 0.0
        try:
            with closing(work):
                for item in work:
                    now = time.monotonic()
                    if isinstance(item, Waiting):
                        yield gr.skip(), asking_html(item.text, 0.0)
                    elif not isinstance(item, Measuring):
                        runtime.tickets.drop(int(ticket))
                        yield render(runtime, scene, item), asking_html()
                        return
                    elif _worth_showing(item.partial, shown) and now - shown_at > _REFRESH_SECONDS:
                        shown, shown_at, told_at = item.partial, now, now
                        yield render(runtime, scene, shown, running=True), asking_html(told(item), item.share)
                    elif now - told_at > _REFRESH_SECONDS / 2:
                        told_at = now
                        yield gr.skip(), asking_html(told(item), item.share)
        except (JobError, ValueError) as error:
            runtime.tickets.drop(int(ticket))
            yield gr.skip(), asking_html(str(error), kind="error")
            return
        newer = runtime.tickets.newest(_holder(request, name)) > ticket
        yield (
            gr.skip() if shown is None else render(runtime, scene, shown),
            gr.skip() if newer else asking_html("Stopped."),
        )

    def stop(self, request: gr.Request) -> tuple[Any, ...]:
        """Stop whatever was asked for; each job notices within one U-Net call and says so itself."""
        tickets = self.runtime.tickets
        held = [tickets.newest(_holder(request, question.name)) for question in self.page.questions.each]
        running = [tickets.live(ticket) for ticket in held]
        self.leave(request)
        return tuple(asking_html("Stopped.") if runs else gr.skip() for runs in running)

    def leave(self, request: gr.Request) -> None:
        """A closed page wants nothing any more."""
        for question in self.page.questions.each:
            self.runtime.tickets.cancel(_holder(request, question.name))


def _worth_showing(partial: Any, shown: Any) -> bool:
    """Whether an unfinished result is new, and has an error that means something."""
    return partial is not None and partial is not shown and getattr(partial, "n_replicates", _LEAST) >= _LEAST


def _holder(request: gr.Request, name: str) -> str:
    """Whose tickets a question's are."""
    return f"{request.session_hash} {name}"


def _error(item: Measuring, target: float) -> str:
    done = f"error {item.error:.0%}, wanted {target:.0%}" if item.error is not None else f"{item.n_evals} evaluations"
    return f"Measuring the two words: {done}{seconds_left(item.seconds_left)}"


def _certainty(item: Measuring) -> str:
    if item.partial is None:
        return f"Comparing the captions: {item.n_evals} evaluations{seconds_left(item.seconds_left)}"
    wanted = item.partial.settings["certainty"]
    sure = f"the order is right with {chance(item.partial.p_order)}, wanted {wanted:.0%}"
    return f"Comparing the captions: {sure}{seconds_left(item.seconds_left)}"


def _bits_error(item: Measuring) -> str:
    done = f"{item.n_evals} evaluations"
    if item.partial is not None:
        done = f"error {item.error:.3f} bits a dimension, wanted {item.partial.settings['error']:g}"
    return f"Measuring the picture: {done}{seconds_left(item.seconds_left)}"


def _way(item: Measuring) -> str:
    what = "Back to the noise and forwards again" if item.partial is None else "Measuring what the word told"
    return f"{what}{seconds_left(item.seconds_left)}"
