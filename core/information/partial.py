"""What two words tell a picture together and apart: `decompose`, and the same as a generator, `decompose_iter`."""

from collections.abc import Callable, Generator
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from core.diffusion.text import delete_words, only_words
from core.errors import PromptError
from core.information.attribution import check_given, choose_words
from core.information.decomposition import Decomposition, PairInformation, Replicates, split
from core.information.estimator import Comparison, Estimate, NoisePredictor
from core.information.measuring import (
    FLOOR,
    Plan,
    check_rel_error,
    check_text,
    integrated_range,
    last_of,
    measure,
    sampler_for,
    settings_of,
)
from core.information.quadrature import Sampler
from core.information.results import Given, Progress

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation
    from core.information.measuring import ImageLike

Surprisal = Callable[[str], float]
"""Bits of a word's surprisal, -log2 of its probability given what the bits are given."""
Event = Progress[Decomposition] | Decomposition


def decompose(
    model: NoisePredictor,
    image: "ImageLike | Generation",
    prompt: str,
    *words: str,
    given: Given = "rest",
    surprisal: Surprisal | None = None,
    seed: int = 0,
    rel_error: float = 0.1,
    max_evals: int | None = None,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    callback: Callable[[Progress[Decomposition]], bool | None] | None = None,
) -> Decomposition:
    """What words of `prompt` tell `image` redundantly, each for itself, and only together, where, and with what error.

    Two words are a pair; of W words every pair is measured from the same noise, for 1 + W + W (W - 1) / 2 texts a noise
    sample.

    Args:
        model: A `Diffuser`.
        image: A PIL picture, the path of one, a `Generation`, or latents [1, C, h, w].
        prompt: The text that has the words.
        words: Two different words or more; all of the prompt's by default.
        given: `rest` decomposes what a pair tells given the prompt without the two, `nothing` what the two tell alone.
        surprisal: Of a word, in bits, given the same: adds the split by surprisal, of totals.
        seed: Of the noise.
        rel_error: Sampling stops when every part's standard error is at most this share of what its pair tells (of a
            tenth of what the best pair does, for lesser ones), or at `max_evals`.
        max_evals: Most latents through the U-Net.
        batch_size: Most latents in a U-Net call; results do not depend on it.
        sampler: How noise is drawn.
        callback: Sees a `Progress` after every U-Net call; if it returns False, the result so far is returned, or
            `Cancelled` raised where there is none yet.

    Raises:
        PromptError: Fewer than two different words, one asked for twice, or one that the prompt does not have.
        ValueError: Another `given`, a `rel_error` or `max_evals` that is too small.
    """
    run = decompose_iter(
        model,
        image,
        prompt,
        *words,
        given=given,
        surprisal=surprisal,
        seed=seed,
        rel_error=rel_error,
        max_evals=max_evals,
        batch_size=batch_size,
        sampler=sampler,
    )
    return last_of(run, callback)


def decompose_iter(
    model: NoisePredictor,
    image: "ImageLike | Generation",
    prompt: str,
    *words: str,
    given: Given = "rest",
    surprisal: Surprisal | None = None,
    seed: int = 0,
    rel_error: float = 0.1,
    max_evals: int | None = None,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
) -> Generator[Event, None, None]:
    """`decompose`, with a `Progress` after every U-Net call, and last the `Decomposition`.

    Words and settings are checked here, before the first `next()`. Closing the generator stops the work within one
    U-Net call and frees the model.
    """
    check_text(model, prompt)
    check_given(given)
    chosen = _different(prompt, words)
    pairs = [_pair(prompt, *pair, given) for pair in combinations(chosen, 2)]
    surprisals = {word: float(surprisal(word)) for word in chosen} if surprisal else {}
    comparisons = list(dict.fromkeys(comparison for pair in pairs for comparison in pair.comparisons))
    target = check_rel_error(rel_error)
    plan = Plan(comparisons, int(seed), sampler_for(model, sampler), batch_size, max_evals, f"{len(chosen)} words")
    settings = settings_of(model, plan, rel_error=target, surprisals=surprisals)

    def summarise(estimate: Estimate) -> Decomposition:
        parts = tuple(pair.split(comparisons, estimate, surprisals) for pair in pairs)
        return Decomposition(
            words=chosen,
            pairs=parts,
            prompt=prompt,
            given=given,
            n_evals=estimate.n_evals,
            n_replicates=len(estimate.maps),
            stopped="cancelled",
            rel_error=_rel_error(parts),
            seed=plan.seed,
            settings=settings,
        )

    return measure(
        model,
        image,
        plan,
        np.array(integrated_range(model, plan.sampler)),
        summarise=summarise,
        excess=lambda result: result.rel_error / target,
        progress=Progress,
    )


class _Pair(NamedTuple):
    """Two words, and what is compared to take apart what they tell."""

    words: tuple[str, str]
    comparisons: tuple[Comparison, Comparison, Comparison]
    """What the first adds, what the second adds, what both add."""

    def split(self, comparisons: list[Comparison], estimate: Estimate, surprisals: dict[str, float]) -> PairInformation:
        """The pair's parts from an estimate of `comparisons`."""
        first, second, both = (comparisons.index(comparison) for comparison in self.comparisons)
        replicates = Replicates(
            (estimate.maps[:, first], estimate.maps[:, second], estimate.maps[:, both]),
            (estimate.direct[:, first], estimate.direct[:, second], estimate.direct[:, both]),
        )
        a, b = self.words
        return split(self.words, replicates, (surprisals[a], surprisals[b]) if surprisals else None)


def _pair(prompt: str, first: str, second: str, given: Given) -> _Pair:
    if given == "rest":
        rest = delete_words(prompt, [first, second])
        texts = delete_words(prompt, [second]), delete_words(prompt, [first]), prompt
    else:
        rest = ""
        texts = only_words(prompt, [first]), only_words(prompt, [second]), only_words(prompt, [first, second])
    one, other, both = (Comparison(rest, text) for text in texts)
    return _Pair((first, second), (one, other, both))


def _different(prompt: str, words: tuple[str, ...]) -> tuple[str, ...]:
    """The words asked for, lower case, in the order asked for."""
    asked = [word.strip().lower() for word in words]
    for word in asked:
        if asked.count(word) > 1:
            raise PromptError(f"{word!r} was asked for twice; ask for two different words of the prompt.")
    present = choose_words(prompt, words or None)
    if len(present) < 2:
        raise PromptError(f"Two different words are needed; there is only {present[0]!r}.")
    return tuple(asked) or present


def _rel_error(pairs: tuple[PairInformation, ...]) -> float:
    """The largest error of a part, in shares of what its pair tells together."""
    least = FLOOR * max(pair.together.bits for pair in pairs)
    scales = [max(pair.together.bits, least) for pair in pairs]
    errors = [max(part.stderr for part in pair.parts) for pair in pairs]
    return max(error / scale if scale > 0 else 0.0 for error, scale in zip(errors, scales, strict=True))
