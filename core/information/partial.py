"""`decompose`: redundant, unique and synergistic information of two words about an image."""

from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from core.arguments import as_seed
from core.diffusion.predictor import PromptedModel
from core.diffusion.text import delete_words, only_words, plain
from core.errors import PromptError
from core.information.attribution import check_given, choose_words
from core.information.decomposition import Decomposition, PairInformation, Replicates, split
from core.information.estimator import Comparison, Estimate
from core.information.measuring import (
    Budget,
    Plan,
    check_text,
    integrated_range,
    measure,
    sampler_for,
    settings_of,
)
from core.information.precision import FLOOR
from core.information.quadrature import Sampler
from core.information.results import Given, Progress
from core.job import Callback, Job, finished

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation
    from core.information.measuring import ImageLike

Surprisal = Callable[[str], float]
"""The surprisal of a word in bits: -log2 of its probability under the condition of the measurement."""


def decompose_iter(
    model: PromptedModel,
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
    callback: Callback[Progress[Decomposition]] | None = None,
) -> Job[Progress[Decomposition], Decomposition]:
    """Decompose what words of `prompt` say about `image` into redundant, unique and synergistic information.

    Of W words every pair is decomposed, from the same noise, with 1 + W + W (W - 1) / 2 texts per noise sample.
    `decompose` returns the result; `decompose_iter` a `Job`, which yields progress after every U-Net call. Arguments
    are checked before the job starts.

    Args:
        model: A `Diffuser`.
        image: A PIL image, the path of one, a `Generation`, or latents [1, C, h, w].
        prompt: A description of the image.
        words: Two different words or more; by default all of the prompt's.
        given: `rest` decomposes the information of a pair given the prompt without the two, `nothing` that of the two
            words alone.
        surprisal: A word's surprisal in bits under the same condition; adds the decomposition by surprisal, of totals.
        seed: Seed of the noise.
        rel_error: Sampling stops when the standard error of every part is at most this share of the bits of its pair,
            or of a tenth of the largest pair's bits if that is more.
        max_evals: Maximum number of latents through the U-Net.
        batch_size: Maximum number of latents in a U-Net call; results do not depend on it.
        sampler: How noise and log-SNR are drawn.
        callback: Called after every U-Net call. If it returns False, the job ends with the result so far, or raises
            `Cancelled` where there is none.

    Raises:
        PromptError: Fewer than two different words, a word given twice, or one that the prompt lacks.
        ValueError: Another `given`; a `rel_error` that is not positive; a `max_evals` that is too small.
    """
    check_text(model, prompt)
    check_given(given)
    chosen = _different(prompt, words)
    pairs = [_pair(prompt, *pair, given) for pair in combinations(chosen, 2)]
    surprisals = {word: float(surprisal(word)) for word in chosen} if surprisal else {}
    comparisons = list(dict.fromkeys(comparison for pair in pairs for comparison in pair.comparisons))
    budget = Budget(as_seed(seed), float(rel_error), max_evals, batch_size, sampler_for(model, sampler))
    plan = Plan(comparisons, budget, f"{len(chosen)} words")
    settings = settings_of(model, budget, rel_error=budget.rel_error, surprisals=surprisals)

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
            seed=budget.seed,
            settings=settings,
        )

    return measure(
        model,
        image,
        plan,
        np.array(integrated_range(model, budget.sampler)),
        summarise=summarise,
        excess=lambda result: result.rel_error / budget.rel_error,
        progress=Progress,
        callback=callback,
    )


decompose = finished(decompose_iter)


class _Pair(NamedTuple):
    """Two words, and the comparisons that decompose their information."""

    words: tuple[str, str]
    comparisons: tuple[Comparison, Comparison, Comparison]
    """The first word against the context, the second, and both."""

    def split(self, comparisons: list[Comparison], estimate: Estimate, surprisals: dict[str, float]) -> PairInformation:
        """The decomposition of the pair, from an estimate of `comparisons`."""
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
    """The requested words and phrases, in the order given; all of the prompt's words by default."""
    requested = [plain(word) for word in words]
    for word in requested:
        if requested.count(word) > 1:
            raise PromptError(f"{word!r} was given twice; give two different words of the prompt.")
    present = choose_words(prompt, words or None)
    if len(present) < 2:
        raise PromptError(f"Two different words are needed; there is only {present[0]!r}.")
    return tuple(requested) or present


def _rel_error(pairs: tuple[PairInformation, ...]) -> float:
    """The largest standard error of a part, relative to the bits of its pair."""
    least = FLOOR * max(pair.together.bits for pair in pairs)
    scales = [max(pair.together.bits, least) for pair in pairs]
    errors = [max(part.stderr for part in pair.parts) for pair in pairs]
    return max(error / scale if scale > 0 else 0.0 for error, scale in zip(errors, scales, strict=True))
