"""Which of several captions tells a picture best: `rank_captions`, and the same as a generator, `rank_captions_iter`.

Captions are ranked by direct bits, which for an optimal denoiser are log p(x | caption) up to what all captions share.
The published rule, orthogonal bits (Kong et al. 2024, arXiv 2310.07972), asks instead which caption changes the
prediction most, and stands beside on the same samples.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from core.arrays import Floats
from core.errors import PromptError
from core.information.estimator import Comparison, Estimate, NoisePredictor
from core.information.measuring import Plan, check_text, integrated_range, last_of, measure, sampler_for, settings_of
from core.information.quadrature import Sampler
from core.information.ranking import Ranking, closest, differences, wanted_error
from core.information.results import Progress, mean_and_stderr

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation
    from core.information.measuring import ImageLike

Event = Progress[Ranking] | Ranking


def rank_captions(
    model: NoisePredictor,
    image: "ImageLike | Generation",
    captions: Sequence[str],
    *,
    orthogonal: bool = True,
    certainty: float = 0.95,
    seed: int = 0,
    max_evals: int | None = None,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    callback: Callable[[Progress[Ranking]], bool | None] | None = None,
) -> Ranking:
    """Captions in the order of how well they tell `image`, with the probability that this order is right.

    All captions are evaluated on the same noise, so that what lies between two of them is known far better than either.

    Args:
        model: A `Diffuser`.
        image: A PIL picture, the path of one, a `Generation`, or latents [1, C, h, w].
        captions: Two different ones or more.
        orthogonal: Also evaluate the empty text, one more a noise sample: bits are then over nothing, and the published
            rule stands beside. Without it N captions cost N evaluations a noise sample.
        certainty: Sampling stops when the whole order is right with this probability, or at `max_evals`.
        seed: Of the noise.
        max_evals: Most latents through the U-Net.
        batch_size: Most latents in a U-Net call; results do not depend on it.
        sampler: How noise is drawn.
        callback: Sees a `Progress` after every U-Net call; if it returns False, the result so far is returned, or
            `Cancelled` raised where there is none yet.

    Raises:
        PromptError: Fewer than two captions, two that are the same, or one that the model cannot take.
        ValueError: A `certainty` that is no probability above one half, a `max_evals` that is too small.
    """
    run = rank_captions_iter(
        model,
        image,
        captions,
        orthogonal=orthogonal,
        certainty=certainty,
        seed=seed,
        max_evals=max_evals,
        batch_size=batch_size,
        sampler=sampler,
    )
    return last_of(run, callback)


def rank_captions_iter(
    model: NoisePredictor,
    image: "ImageLike | Generation",
    captions: Sequence[str],
    *,
    orthogonal: bool = True,
    certainty: float = 0.95,
    seed: int = 0,
    max_evals: int | None = None,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
) -> Generator[Event, None, None]:
    """`rank_captions`, with a `Progress` after every U-Net call, and last the `Ranking`.

    Captions and settings are checked here, before the first `next()`. Closing the generator stops the work within one
    U-Net call and frees the model.
    """
    texts = check_captions(model, captions)
    if not 0.5 < certainty < 1:
        raise ValueError(f"certainty is a probability above 0.5 and below 1, such as 0.95, not {certainty}.")
    context, others = ("", texts) if orthogonal else (texts[0], texts[1:])
    comparisons = [Comparison(context, text) for text in others]
    plan = Plan(comparisons, int(seed), sampler_for(model, sampler), batch_size, max_evals, f"{len(texts)} captions")
    settings = settings_of(model, plan, certainty=certainty, orthogonal=orthogonal)

    def summarise(estimate: Estimate) -> Ranking:
        direct = estimate.direct if orthogonal else _over_their_mean(estimate.direct)
        bits, stderr = mean_and_stderr(direct)
        ahead, ahead_stderr = differences(direct)
        changed = mean_and_stderr(estimate.maps.sum((2, 3))) if orthogonal else (None, None)
        return Ranking(
            captions=texts,
            bits=bits,
            stderr=stderr,
            ahead=ahead,
            ahead_stderr=ahead_stderr,
            orthogonal_bits=changed[0],
            orthogonal_stderr=changed[1],
            n_evals=estimate.n_evals,
            n_replicates=len(direct),
            stopped="cancelled",
            rel_error=closest(bits, ahead, ahead_stderr),
            seed=plan.seed,
            settings=settings,
        )

    return measure(
        model,
        image,
        plan,
        np.array(integrated_range(model, plan.sampler)),
        summarise=summarise,
        excess=lambda result: result.rel_error / wanted_error(certainty, len(texts), result.n_replicates),
        progress=Progress,
    )


def check_captions(model: NoisePredictor, captions: Sequence[str]) -> tuple[str, ...]:
    """The captions, if there are several, all different, and the model can take each."""
    texts = (captions,) if isinstance(captions, str) else tuple(captions)
    if len(texts) < 2:
        raise PromptError("Ranking needs two captions or more; write another one to compare with.")
    seen: dict[str, int] = {}
    for number, text in enumerate(texts, start=1):
        check_text(model, text)
        plain = " ".join(text.lower().split())
        if plain in seen:
            raise PromptError(f"Captions {seen[plain]} and {number} are the same, {text!r}; leave one of them out.")
        seen[plain] = number
    return texts


def _over_their_mean(over_first: Floats) -> Floats:
    """[R, N] bits of all captions over their mean, from those of all but the first over the first, [R, N - 1]."""
    over_first = np.concatenate([np.zeros((len(over_first), 1)), over_first], axis=1)
    return np.asarray(over_first - over_first.mean(1, keepdims=True))
