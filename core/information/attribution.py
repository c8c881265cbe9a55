"""How many bits each word of a prompt tells a picture: `attribute`, and the same as a generator, `attribute_iter`."""

import difflib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from core.arrays import Floats
from core.diffusion.text import delete_words, distinct_words, only_words
from core.errors import PromptError, WordNotInPromptError
from core.information.estimator import Comparison, Estimate, NoisePredictor
from core.information.measuring import (
    ImageLike,
    Plan,
    check_rel_error,
    check_text,
    default_steps,
    integrated_range,
    last_of,
    measure,
    relative_errors,
    sampler_for,
    settings_of,
)
from core.information.quadrature import Sampler
from core.information.results import Attribution, AttributionProgress, Curves, Given, Timeline, mean_and_stderr

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation

Event = AttributionProgress | Attribution


def attribute(
    model: NoisePredictor,
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
    callback: Callable[[AttributionProgress], bool | None] | None = None,
) -> Attribution:
    """How many bits each word of `prompt` tells `image`, where, and when in the denoising.

    image: a PIL picture, the path of one, a `Generation`, or latents [1, C, h, w].
    words: those asked for; all of the prompt's by default. A word that occurs twice, or is asked for twice, counts as
        one; the result has them in the prompt's order.
    given: `rest` measures a word given the rest of the prompt (CMI), `nothing` the word alone (MI).
    rel_error: sampling stops when every word's standard error is at most this share of its bits (of a tenth of the
        largest word's, for smaller words), or when `max_evals` latents have gone through the U-Net.
    batch_size: most latents in a U-Net call; results do not depend on it.
    whole_prompt: also measure the whole prompt against the empty text; one more prompt a noise sample.
    num_inference_steps: how many bins the timeline has; the generation's, or the model's default.
    callback: sees an `AttributionProgress` after every U-Net call; if it returns False, the result so far is returned
        (`stopped` says "cancelled"), or `Cancelled` raised where there is none yet.
    """
    run = attribute_iter(
        model,
        image,
        prompt,
        seed=seed,
        words=words,
        given=given,
        rel_error=rel_error,
        max_evals=max_evals,
        batch_size=batch_size,
        whole_prompt=whole_prompt,
        num_inference_steps=num_inference_steps,
        sampler=sampler,
    )
    return last_of(run, callback)


def attribute_iter(
    model: NoisePredictor,
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
) -> Generator[Event, None, None]:
    """`attribute`, with an `AttributionProgress` after every U-Net call, and last the `Attribution`.

    Words and settings are checked here, before the first `next()`. Closing the generator stops the work within one
    U-Net call and frees the model.
    """
    check_text(model, prompt)
    check_given(given)
    chosen = choose_words(prompt, words)
    whole = [Comparison("", prompt)] if whole_prompt else []
    plan = Plan(
        comparisons=compare(prompt, chosen, given) + whole,
        seed=int(seed),
        sampler=sampler_for(model, sampler),
        batch_size=batch_size,
        max_evals=max_evals,
        what=f"{len(chosen)} words",
    )
    target = check_rel_error(rel_error)
    n_bins = num_inference_steps or int(getattr(image, "num_inference_steps", 0)) or default_steps(model)
    settings = settings_of(model, plan, rel_error=target, whole_prompt=whole_prompt, num_inference_steps=n_bins)
    edges = model.schedule.bin_edges(n_bins, *integrated_range(model, plan.sampler))
    asked = _Asked(prompt, chosen, given, whole_prompt, plan.seed, settings)
    return measure(
        model,
        image,
        plan,
        edges,
        summarise=lambda estimate: _summarise(estimate, edges, asked),
        excess=lambda result: result.rel_error / target,
        progress=AttributionProgress,
    )


def check_given(given: Given) -> None:
    """Refuse what bits cannot be given."""
    if given not in ("rest", "nothing"):
        raise ValueError(f"given is 'rest' (CMI) or 'nothing' (MI), not {given!r}.")


def choose_words(prompt: str, words: Sequence[str] | None) -> tuple[str, ...]:
    """The words asked for, lower case, in the prompt's order; all of them by default."""
    present = distinct_words(prompt)
    if not present:
        raise PromptError("The prompt has no word to attribute anything to.")
    wanted = {word.strip().lower() for word in ([words] if isinstance(words, str) else words or present)}
    for word in sorted(wanted.difference(present)):
        raise WordNotInPromptError(word, difflib.get_close_matches(word, present, n=1) or present)
    return tuple(word for word in present if word in wanted)


def compare(prompt: str, words: Sequence[str], given: Given) -> list[Comparison]:
    """The texts to compare, one pair a word: without and with it."""
    if given == "rest":
        return [Comparison(delete_words(prompt, [word]), prompt) for word in words]
    return [Comparison("", only_words(prompt, [word])) for word in words]


@dataclass(frozen=True)
class _Asked:
    """What one attribution was asked, for its result."""

    prompt: str
    words: tuple[str, ...]
    given: Given
    whole_prompt: bool
    seed: int
    settings: dict[str, Any]


def _summarise(estimate: Estimate, edges: Floats, asked: _Asked) -> Attribution:
    """Means over replicates and their standard errors."""
    n_words = len(asked.words)
    maps, map_stderr = mean_and_stderr(estimate.maps)
    totals, stderr = mean_and_stderr(estimate.maps.sum((2, 3)))
    direct, direct_stderr = mean_and_stderr(estimate.direct)
    widths = np.diff(edges)
    per_width = np.divide(1.0, widths, out=np.zeros_like(widths), where=widths > 0)
    when, when_stderr = mean_and_stderr(estimate.timeline * per_width)
    errors = estimate.errors[:, :n_words] * per_width
    each = mean_and_stderr(errors)
    _, difference_stderr = mean_and_stderr(errors[:, :, 0] - errors[:, :, 1])
    return Attribution(
        words=asked.words,
        bits=totals[:n_words],
        stderr=stderr[:n_words],
        maps=maps[:n_words],
        map_stderr=map_stderr[:n_words],
        direct_bits=direct[:n_words],
        direct_stderr=direct_stderr[:n_words],
        timeline=Timeline(edges, when[:n_words], when_stderr[:n_words]),
        curves=Curves(each[0][:, 0], each[1][:, 0], each[0][:, 1], each[1][:, 1], difference_stderr),
        prompt_bits=float(totals[-1]) if asked.whole_prompt else None,
        prompt_stderr=float(stderr[-1]) if asked.whole_prompt else None,
        n_evals=estimate.n_evals,
        n_replicates=len(estimate.maps),
        stopped="cancelled",
        rel_error=float(relative_errors(totals[:n_words], stderr[:n_words]).max()),
        prompt=asked.prompt,
        given=asked.given,
        seed=asked.seed,
        settings=asked.settings,
    )
