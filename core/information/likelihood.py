"""`likelihood`: the model's negative log-likelihood of an image in bits a dimension.

    -log p(x) = d/2 log(2 pi e) - 1/2 Int [ d sigmoid(a) - E ||eps - e(x_a)||^2 ] da

over all log-SNRs a, in nats (Kong, Brekelmans & Ver Steeg 2023, arXiv 2302.03792). The bracket is what the model gains
over one for standard normal latents. It is integrated over the trained range only, and taken as 0 outside: latents that
the model predicts almost exactly would have fewer bits than this.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from core.arguments import as_seed
from core.arrays import Floats
from core.diffusion.predictor import PromptedModel
from core.information.estimator import Comparison, Estimate
from core.information.measuring import Budget, Plan, check_text, integrated_range, measure, n_bins_for, settings_of
from core.information.quadrature import Sampler
from core.information.results import Measurement, Progress, mean_and_stderr
from core.job import Callback, Job, finished

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation
    from core.information.measuring import ImageLike

WIDE = Sampler(scale=1000.0, clip=0.5)
"""Flat over the whole trained range, which for a likelihood is part of its definition."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Likelihood(Measurement):
    """Negative log-likelihood of an image's latents in bits a dimension, with a prompt and without. Arrays are float64.

    These are bits of a density of continuous latents, not of a code: they may be negative, and depend on the latents'
    scale. `rel_error` is the larger of the two standard errors, in bits a dimension.
    """

    prompt: str
    """The prompt as typed."""
    bits_per_dim: float
    """-log2 p(x | prompt) / d."""
    stderr: float
    """Its standard error."""
    unprompted_bits_per_dim: float
    """-log2 p(x) / d, given the empty text."""
    unprompted_stderr: float
    """Its standard error. Both share their noise, so `gain` has a smaller error than their difference would."""
    gain: float
    """The direct information of the prompt: bits that it saves in the whole image."""
    gain_stderr: float
    """Its standard error."""
    n_dims: int
    """d, the number of dimensions of the latents."""
    log_snr_range: tuple[float, float]
    """The range of integration."""
    edges: Floats
    """[S + 1] edges of the curves' bins of log-SNR, rising; one bin a sampler step."""
    errors: Floats
    """[2, S] mean squared error of the predicted noise a dimension, without and with the prompt; 0 in an empty bin."""
    error_stderr: Floats
    """[2, S] standard errors of `errors`."""

    @property
    def normal_errors(self) -> Floats:
        """[S] the errors that standard normal latents have under their optimal model: sigmoid(a), mean over a bin."""
        widths = np.diff(self.edges)
        areas = np.diff(np.logaddexp(0, self.edges))
        return np.asarray(np.divide(areas, widths, out=np.zeros_like(widths), where=widths > 0))


def likelihood_iter(
    model: PromptedModel,
    image: "ImageLike | Generation",
    prompt: str,
    *,
    error: float = 0.01,
    seed: int = 0,
    max_evals: int | None = None,
    batch_size: int | None = None,
    num_inference_steps: int | None = None,
    sampler: Sampler = WIDE,
    callback: Callback[Progress[Likelihood]] | None = None,
) -> Job[Progress[Likelihood], Likelihood]:
    """Estimate the negative log-likelihood of an image's latents in bits a dimension, with `prompt` and without.

    `likelihood` returns the result; `likelihood_iter` a `Job`, which yields progress after every U-Net call. Arguments
    are checked before the job starts.

    Args:
        model: A `Diffuser`.
        image: A PIL image, the path of one, a `Generation`, or latents [1, C, h, w].
        prompt: A description of the image.
        error: Sampling stops when both standard errors are at most this many bits a dimension, or at `max_evals`.
        seed: Seed of the noise.
        max_evals: Maximum number of latents through the U-Net; a noise sample takes two.
        batch_size: Maximum number of latents in a U-Net call; results do not depend on it.
        num_inference_steps: Number of bins of the curves; by default the generation's steps, or the model's.
        sampler: How noise and log-SNR are drawn.
        callback: Called after every U-Net call. If it returns False, the job ends with the result so far, or raises
            `Cancelled` where there is none.

    Raises:
        PromptError: The model cannot read the prompt.
        ValueError: An `error` that is not positive; a `max_evals` that is too small.
    """
    check_text(model, prompt)
    if not 0 < error < math.inf:
        raise ValueError(f"error has to be a positive number of bits a dimension, such as 0.01, not {error}.")
    budget = Budget(as_seed(seed), float(error), max_evals, batch_size, sampler)
    plan = Plan([Comparison("", prompt)], budget, "2 prompts")
    n_bins = n_bins_for(model, image, num_inference_steps)
    edges = model.schedule.bin_edges(n_bins, *integrated_range(model, sampler))
    settings = settings_of(model, budget, error=budget.rel_error, num_inference_steps=n_bins)
    n_dims = math.prod(model.latent_shape)
    return measure(
        model,
        image,
        plan,
        edges,
        summarise=lambda estimate: _summarise(estimate, edges, n_dims, prompt, budget.seed, settings),
        excess=lambda result: result.rel_error / budget.rel_error,
        progress=Progress,
        callback=callback,
    )


likelihood = finished(likelihood_iter)


def _summarise(
    estimate: Estimate, edges: Floats, n_dims: int, prompt: str, seed: int, settings: dict[str, Any]
) -> Likelihood:
    per_dim = estimate.errors[:, 0] / n_dims
    normal = np.diff(np.logaddexp(0, edges[[0, -1]]))  # the integral of sigmoid(a)
    nats = math.log(2 * math.pi * math.e) / 2 - (normal - per_dim.sum(2)) / 2
    bits, stderr = mean_and_stderr(nats / math.log(2))
    gain, gain_stderr = mean_and_stderr(estimate.direct[:, 0])
    widths = np.diff(edges)
    curve = np.divide(per_dim, widths, out=np.zeros_like(per_dim), where=widths > 0)
    errors, error_stderr = mean_and_stderr(curve)
    return Likelihood(
        prompt=prompt,
        bits_per_dim=float(bits[1]),
        stderr=float(stderr[1]),
        unprompted_bits_per_dim=float(bits[0]),
        unprompted_stderr=float(stderr[0]),
        gain=float(gain),
        gain_stderr=float(gain_stderr),
        n_dims=n_dims,
        log_snr_range=(float(edges[0]), float(edges[-1])),
        edges=edges,
        errors=errors,
        error_stderr=error_stderr,
        n_evals=estimate.n_evals,
        n_replicates=len(nats),
        stopped="cancelled",
        rel_error=float(stderr.max()),
        seed=seed,
        settings=settings,
    )
