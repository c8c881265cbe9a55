"""Further questions about an image as jobs: a word pair, a counterfactual word change, captions, its likelihood."""

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from core.information.decomposition import Decomposition
from core.information.ranking import Ranking
from core.information.results import Attribution
from core.ui.backend.jobs import MAX_EVALS, MeasurementProgress, Waiting, in_turn, measure, with_progress
from core.ui.backend.runtime import Runtime
from core.ui.look.scene import Scene

if TYPE_CHECKING:
    from core.information.counterfactual import WordChange
    from core.information.likelihood import Likelihood


_REL_ERROR = 0.1
"""To which a word is measured if it has not been measured yet."""


class Counterfactual(NamedTuple):
    """An image regenerated with a word removed or replaced, and the information of that word."""

    change: "WordChange"
    """The image regenerated from its own noise, with the original and with the changed prompt."""
    attribution: Attribution | None
    """Bits of the word given the rest of the prompt, possibly with other words; None while they are being measured."""


def decompose(
    runtime: Runtime, ticket: int | None, scene: Scene, words: Sequence[str], given: str, rel_error: float
) -> Generator[Waiting | MeasurementProgress | Decomposition, None, None]:
    """Decompose the information of two words; the last item is the result, unless the job was cancelled."""
    work = in_turn(
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
            max_evals=MAX_EVALS,
        ),
        lends=True,
    )
    yield from with_progress(work)


def rank_captions(
    runtime: Runtime, ticket: int | None, scene: Scene, captions: Sequence[str], certainty: float = 0.95
) -> Generator[Waiting | MeasurementProgress | Ranking, None, None]:
    """Rank captions by how well they fit; the last item is the result, unless the job was cancelled."""
    work = in_turn(
        runtime,
        ticket,
        lambda: runtime.engine.rank_captions_iter(
            runtime.model, scene.image, captions, certainty=certainty, seed=scene.seed, max_evals=MAX_EVALS
        ),
        lends=True,
    )
    yield from with_progress(work)


def likelihood(
    runtime: Runtime, ticket: int | None, scene: Scene, error: float = 0.01
) -> "Generator[Waiting | MeasurementProgress | Likelihood, None, None]":
    """Measure the likelihood of an image; the last item is the result, unless the job was cancelled."""
    work = in_turn(
        runtime,
        ticket,
        lambda: runtime.engine.likelihood_iter(
            runtime.model,
            scene.image,
            scene.prompt,
            error=error,
            seed=scene.seed,
            max_evals=MAX_EVALS,
            num_inference_steps=scene.steps,
        ),
        lends=True,
    )
    yield from with_progress(work)


def change_word(
    runtime: Runtime, ticket: int | None, scene: Scene, word: str, to: str | None
) -> "Generator[Waiting | MeasurementProgress | WordChange, None, None]":
    """Regenerate an image with a word changed; the last item is the result, unless the job was cancelled."""
    started = time.monotonic()
    work = in_turn(
        runtime,
        ticket,
        lambda: runtime.engine.change_word_iter(runtime.model, scene.image, scene.prompt, word, to or None),
    )
    for item in work:
        if hasattr(item, "max_evals"):
            pace = (time.monotonic() - started) / max(item.n_evals, 1)
            left = pace * (item.max_evals - item.n_evals)
            yield MeasurementProgress(item.n_evals, None, None, item.n_evals / item.max_evals, left)
        else:
            if isinstance(item, Waiting):
                started = time.monotonic()
            yield item


def measure_counterfactual(
    runtime: Runtime, ticket: int | None, scene: Scene, word: str, to: str | None
) -> Generator[Waiting | MeasurementProgress | Counterfactual, None, None]:
    """Regenerate an image with a word changed, then measure the bits of that word unless they are known already."""
    changed = None
    for item in change_word(runtime, ticket, scene, word, to):
        if isinstance(item, Waiting | MeasurementProgress):
            yield item
        else:
            changed = item
    if changed is None:
        return
    attribution = runtime.most_exact_attribution(scene.key, "rest")
    if attribution is None or changed.word not in attribution.words:
        attribution, unmeasured = None, Counterfactual(changed, None)
        for found in measure(runtime, ticket, scene, "rest", _REL_ERROR, [changed.word]):
            if isinstance(found, Attribution):
                attribution = found
            elif isinstance(found, MeasurementProgress):
                yield found._replace(partial=unmeasured)
    if attribution is not None:
        yield Counterfactual(changed, attribution)
