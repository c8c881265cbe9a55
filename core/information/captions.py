"""`rank_captions`: which of several captions describes an image best.

Captions are ranked by direct bits, which for an optimal denoiser are log p(x | caption) up to a constant. Kong et al.
2024 (arXiv 2310.07972) rank by orthogonal bits, which measure how much a caption changes the prediction; these are
computed from the same samples.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from core.arguments import as_seed
from core.arrays import Floats
from core.diffusion.predictor import PromptedModel
from core.errors import PromptError
from core.information.estimator import Comparison, Estimate
from core.information.measuring import Budget, Plan, check_text, integrated_range, measure, sampler_for, settings_of
from core.information.quadrature import Sampler
from core.information.ranking import Ranking, closest, differences, wanted_error
from core.information.results import Progress, mean_and_stderr
from core.job import Callback, Job, finished

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation
    from core.information.measuring import ImageLike


def rank_captions_iter(
    model: PromptedModel,
    image: "ImageLike | Generation",
    captions: Sequence[str],
    *,
    orthogonal: bool = True,
    certainty: float = 0.95,
    seed: int = 0,
    max_evals: int | None = None,
    batch_size: int | None = None,
    sampler: Sampler | None = None,
    callback: Callback[Progress[Ranking]] | None = None,
) -> Job[Progress[Ranking], Ranking]:
    """Rank captions by how well they describe `image`, with the probability that the order is right.

    All captions are evaluated on the same noise, so that the difference of two has a far smaller error than either.
    `rank_captions` returns the result; `rank_captions_iter` a `Job`, which yields progress after every U-Net call.
    Arguments are checked before the job starts.

    Args:
        model: A `Diffuser`.
        image: A PIL image, the path of one, a `Generation`, or latents [1, C, h, w].
        captions: Two different captions or more.
        orthogonal: Also evaluate the empty text: bits are then relative to it, and the order by orthogonal bits (Kong
            et al. 2024) is known too. This takes one more evaluation than the number of captions per noise sample.
        certainty: Sampling stops when the whole order is right with this probability, or at `max_evals`.
        seed: Seed of the noise.
        max_evals: Maximum number of latents through the U-Net.
        batch_size: Maximum number of latents in a U-Net call; results do not depend on it.
        sampler: How noise and log-SNR are drawn.
        callback: Called after every U-Net call. If it returns False, the job ends with the result so far, or raises
            `Cancelled` where there is none.

    Raises:
        PromptError: Fewer than two captions, two equal ones, or one that the model cannot read.
        ValueError: A `certainty` that is no probability above one half; a `max_evals` that is too small.
    """
    texts = check_captions(model, captions)
    if not 0.5 < certainty < 1:
        raise ValueError(f"certainty is a probability above 0.5 and below 1, such as 0.95, not {certainty}.")
    context, others = ("", texts) if orthogonal else (texts[0], texts[1:])
    budget = Budget(as_seed(seed), max_evals=max_evals, batch_size=batch_size, sampler=sampler_for(model, sampler))
    plan = Plan([Comparison(context, text) for text in others], budget, f"{len(texts)} captions")
    settings = settings_of(model, budget, certainty=certainty, orthogonal=orthogonal)

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
            seed=budget.seed,
            settings=settings,
        )

    return measure(
        model,
        image,
        plan,
        np.array(integrated_range(model, budget.sampler)),
        summarise=summarise,
        excess=lambda result: result.rel_error / wanted_error(certainty, len(texts), result.n_replicates),
        progress=Progress,
        callback=callback,
    )


rank_captions = finished(rank_captions_iter)


def check_captions(model: PromptedModel, captions: Sequence[str]) -> tuple[str, ...]:
    """The captions, if there are at least two, all different, and the model can read each.

    Raises:
        PromptError: Otherwise.
    """
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
    """[R, N] bits of all captions over their mean, from [R, N - 1] those of all but the first over the first."""
    over_first = np.concatenate([np.zeros((len(over_first), 1)), over_first], axis=1)
    return np.asarray(over_first - over_first.mean(1, keepdims=True))
