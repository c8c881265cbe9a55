"""`attribute`: the information that each word of a prompt carries about an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from core.arguments import as_items, as_seed
from core.arrays import Floats
from core.diffusion.predictor import PromptedModel
from core.diffusion.text import delete_words, distinct_words, occurrences, only_words, plain
from core.errors import PromptError, WordNotInPromptError
from core.information.estimator import Comparison, Estimate
from core.information.measuring import (
    Budget,
    ImageLike,
    Plan,
    check_text,
    integrated_range,
    measure,
    n_bins_for,
    relative_errors,
    sampler_for,
    settings_of,
)
from core.information.quadrature import Sampler
from core.information.results import Attribution, AttributionProgress, Curves, Given, Timeline, mean_and_stderr
from core.job import Callback, Job, finished

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation


def attribute_iter(
    model: PromptedModel,
    image: "ImageLike | Generation",
    prompt: str,
    *,
    seed: int = 0,
    words: Sequence[str] | None = None,
    given: Given = "rest",
    rel_error: float = 0.1,
    max_evals: int | None = None,
    batch_size: int | None = None,
    whole_prompt: bool = False,
    num_inference_steps: int | None = None,
    sampler: Sampler | None = None,
    callback: Callback[AttributionProgress] | None = None,
) -> Job[AttributionProgress, Attribution]:
    """Measure how many bits each word of `prompt` carries about `image`, where in it, and when in the denoising.

    `attribute` returns the result; `attribute_iter` a `Job`, which yields progress after every U-Net call. Arguments
    are checked before the job starts.

    Args:
        model: A `Diffuser`.
        image: A PIL image, the path of one, a `Generation`, or latents [1, C, h, w].
        prompt: A description of the image.
        seed: Seed of the noise.
        words: The words to measure; by default all. A word that occurs several times counts as one. Results are in the
            order of the prompt.
        given: `rest` measures a word given the rest of the prompt (conditional mutual information), `nothing` the word
            alone (mutual information).
        rel_error: Sampling stops when the standard error of every word is at most this share of its bits, or of a tenth
            of the largest word's bits if that is more.
        max_evals: Maximum number of latents through the U-Net.
        batch_size: Maximum number of latents in a U-Net call; results do not depend on it.
        whole_prompt: Also measure the whole prompt against the empty text, for one more evaluation per noise sample.
        num_inference_steps: Number of bins of the timeline; by default the generation's steps, or the model's.
        sampler: How noise and log-SNR are drawn.
        callback: Called after every U-Net call. If it returns False, the job ends with the result so far
            (`stopped="cancelled"`), or raises `Cancelled` where there is none.

    Raises:
        PromptError: The model cannot read the prompt, or the prompt lacks one of `words`.
        ValueError: Another `given`; a `rel_error` that is not positive; a `max_evals` that is too small.
    """
    check_text(model, prompt)
    check_given(given)
    chosen = choose_words(prompt, words)
    budget = Budget(as_seed(seed), float(rel_error), max_evals, batch_size, sampler_for(model, sampler))
    whole = [Comparison("", prompt)] if whole_prompt else []
    plan = Plan(compare(prompt, chosen, given) + whole, budget, f"{len(chosen)} words")
    n_bins = n_bins_for(model, image, num_inference_steps)
    edges = model.schedule.bin_edges(n_bins, *integrated_range(model, budget.sampler))
    settings = settings_of(
        model, budget, rel_error=budget.rel_error, whole_prompt=whole_prompt, num_inference_steps=n_bins
    )
    request = _AttributionRequest(prompt, chosen, given, whole_prompt, budget.seed, settings)
    return measure(
        model,
        image,
        plan,
        edges,
        summarise=lambda estimate: _summarise(estimate, edges, request),
        excess=lambda result: result.rel_error / budget.rel_error,
        progress=AttributionProgress,
        callback=callback,
    )


attribute = finished(attribute_iter)


def check_given(given: Given) -> None:
    """Raise a `ValueError` unless `given` is one of the two conditions."""
    if given not in ("rest", "nothing"):
        raise ValueError(f"given is 'rest' (CMI) or 'nothing' (MI), not {given!r}.")


def choose_words(prompt: str, words: Sequence[str] | None) -> tuple[str, ...]:
    """The requested words and phrases, as `Word.text` spells them, in the order of the prompt; None requests all.

    Raises:
        PromptError: A word that is not in the prompt, or a prompt without words.
    """
    present = distinct_words(prompt)
    if not present:
        raise PromptError("The prompt has no word to attribute anything to.")
    if not words:
        return tuple(present)
    first: dict[str, int] = {}
    for word in as_items(words):
        found = occurrences(prompt, word)
        if not found:
            raise WordNotInPromptError(word.strip(), present)
        first[plain(word)] = found[0].start
    return tuple(sorted(first, key=lambda word: (first[word], -len(word))))


def compare(prompt: str, words: Sequence[str], given: Given) -> list[Comparison]:
    """The pair of texts to compare for each word: without it and with it."""
    if given == "rest":
        return [Comparison(delete_words(prompt, [word]), prompt) for word in words]
    return [Comparison("", only_words(prompt, [word])) for word in words]


@dataclass(frozen=True)
class _AttributionRequest:
    """The arguments of an attribution that its result repeats."""

    prompt: str
    words: tuple[str, ...]
    given: Given
    whole_prompt: bool
    seed: int
    settings: dict[str, Any]


def _summarise(estimate: Estimate, edges: Floats, request: _AttributionRequest) -> Attribution:
    """Means over replicates and their standard errors."""
    n_words = len(request.words)
    maps, map_stderr = mean_and_stderr(estimate.maps)
    totals, stderr = mean_and_stderr(estimate.maps.sum((2, 3)))
    direct, direct_stderr = mean_and_stderr(estimate.direct)
    widths = np.diff(edges)
    per_width = np.divide(1.0, widths, out=np.zeros_like(widths), where=widths > 0)
    timeline, timeline_stderr = mean_and_stderr(estimate.timeline * per_width)
    errors = estimate.errors[:, :n_words] * per_width
    each = mean_and_stderr(errors)
    _, difference_stderr = mean_and_stderr(errors[:, :, 0] - errors[:, :, 1])
    return Attribution(
        words=request.words,
        bits=totals[:n_words],
        stderr=stderr[:n_words],
        maps=maps[:n_words],
        map_stderr=map_stderr[:n_words],
        direct_bits=direct[:n_words],
        direct_stderr=direct_stderr[:n_words],
        timeline=Timeline(edges, timeline[:n_words], timeline_stderr[:n_words]),
        curves=Curves(each[0][:, 0], each[1][:, 0], each[0][:, 1], each[1][:, 1], difference_stderr),
        prompt_bits=float(totals[-1]) if request.whole_prompt else None,
        prompt_stderr=float(stderr[-1]) if request.whole_prompt else None,
        n_evals=estimate.n_evals,
        n_replicates=len(estimate.maps),
        stopped="cancelled",
        rel_error=float(relative_errors(totals[:n_words], stderr[:n_words]).max()),
        prompt=request.prompt,
        given=request.given,
        seed=request.seed,
        settings=request.settings,
    )
