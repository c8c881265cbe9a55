"""Further questions about a picture as jobs like those in `jobs.py`: two words, a word left out, captions, itself."""

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from core.information.decomposition import Decomposition
from core.information.ranking import Ranking
from core.information.results import Attribution
from core.ui.jobs import Measuring, Waiting, engine_items, measure, measuring
from core.ui.look.scene import Scene
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.information.counterfactual import WordChange
    from core.information.likelihood import Likelihood


_REL_ERROR = 0.1
"""To which a word is measured where that has not been done."""


class Absence(NamedTuple):
    """A picture without a word, and what the word had told it."""

    change: "WordChange"
    """The picture drawn again from its own noise, with the word and without."""
    told: Attribution | None
    """What the word told given the rest of the prompt, perhaps among others; None while that is being measured."""


def take_apart(
    runtime: Runtime, ticket: int | None, scene: Scene, words: Sequence[str], given: str, rel_error: float
) -> Generator[Waiting | Measuring | Decomposition, None, None]:
    """Measure what two words tell together; the last item is the result, unless the job was cancelled."""
    work = engine_items(
        runtime,
        ticket,
        lambda: runtime.engine.decompose_iter(
            runtime.model,
            scene.image,
            scene.prompt,
            *words,
            given=given,
            surprisal=runtime.surprisal(words) if given == "nothing" else None,
            seed=scene.seed,
            rel_error=rel_error,
        ),
    )
    yield from measuring(work)


def rank(
    runtime: Runtime, ticket: int | None, scene: Scene, captions: Sequence[str], certainty: float = 0.95
) -> Generator[Waiting | Measuring | Ranking, None, None]:
    """Order captions by how well they fit; the last item is the result, unless the job was cancelled."""
    work = engine_items(
        runtime,
        ticket,
        lambda: runtime.engine.rank_captions_iter(
            runtime.model, scene.image, captions, certainty=certainty, seed=scene.seed
        ),
    )
    yield from measuring(work)


def expect(
    runtime: Runtime, ticket: int | None, scene: Scene, error: float = 0.01
) -> "Generator[Waiting | Measuring | Likelihood, None, None]":
    """Measure how well the model expects a picture; the last item is the result, unless the job was cancelled."""
    work = engine_items(
        runtime,
        ticket,
        lambda: runtime.engine.likelihood_iter(
            runtime.model,
            scene.image,
            scene.prompt,
            error=error,
            seed=scene.seed,
            num_inference_steps=scene.steps,
        ),
    )
    yield from measuring(work)


def change(
    runtime: Runtime, ticket: int | None, scene: Scene, word: str, to: str | None
) -> "Generator[Waiting | Measuring | WordChange, None, None]":
    """Draw a picture again with a word changed; the last item is the result, unless the job was cancelled."""
    started = time.monotonic()
    work = engine_items(
        runtime,
        ticket,
        lambda: runtime.engine.change_word_iter(runtime.model, scene.image, scene.prompt, word, to or None),
    )
    for item in work:
        if hasattr(item, "max_evals"):
            pace = (time.monotonic() - started) / max(item.n_evals, 1)
            left = pace * (item.max_evals - item.n_evals)
            yield Measuring(item.n_evals, None, None, item.n_evals / item.max_evals, left)
        else:
            if isinstance(item, Waiting):
                started = time.monotonic()
            yield item


def without_word(
    runtime: Runtime, ticket: int | None, scene: Scene, word: str, to: str | None
) -> Generator[Waiting | Measuring | Absence, None, None]:
    """Draw a picture without a word, then measure what the word told, where that is not known yet."""
    changed = None
    for item in change(runtime, ticket, scene, word, to):
        if isinstance(item, Waiting | Measuring):
            yield item
        else:
            changed = item
    if changed is None:
        return
    told = runtime.most_exact(scene.key, "rest")
    if told is None or changed.word not in told.words:
        told, pictures = None, Absence(changed, None)
        for found in measure(runtime, ticket, scene, "rest", _REL_ERROR, [changed.word]):
            if isinstance(found, Attribution):
                told = found
            elif isinstance(found, Measuring):
                yield found._replace(partial=pictures)
    if told is not None:
        yield Absence(changed, told)
