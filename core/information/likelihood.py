"""How well a model expects a picture: its own bits a dimension, and the curves of squared errors that they come from.

    -log p(x) = d/2 log(2 pi e) - 1/2 Int [ d sigmoid(a) - E ||eps - e(x_a)||^2 ] da

over the whole log-SNR line, in nats (Kong, Brekelmans & Ver Steeg 2023, arXiv 2302.03792). The bracket is what a model
knows better than one that expects standard normal latents. It is integrated over the trained range alone; outside, the
model is taken to know no better: latents that it expects almost to the digit would have fewer bits than are told here.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from core.arrays import Floats
from core.information.estimator import Comparison, Estimate, NoisePredictor
from core.information.measuring import (
    Plan,
    check_rel_error,
    check_text,
    default_steps,
    integrated_range,
    last_of,
    measure,
    settings_of,
)
from core.information.quadrature import Sampler
from core.information.results import Measurement, Progress, mean_and_stderr

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation
    from core.information.measuring import ImageLike

WIDE = Sampler(scale=1000.0, clip=0.5)
"""Flat over all that the model was trained on: here the range decides the result, not only its truncation."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Likelihood(Measurement):
    """A picture's latents in bits a dimension, with a prompt and without. All arrays are float64.

    Bits of densities, not of a code: of continuous latents they may be negative, and they count the latents' scale.
    `rel_error` is the larger error of the two figures, in bits a dimension.
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
    """Its standard error. The two share their noise: `gain` is known better than either."""
    gain: float
    """What the prompt saves, in bits of the whole picture: the direct information of the prompt."""
    gain_stderr: float
    """Its standard error."""
    n_dims: int
    """d, the latents' dimensions."""
    log_snr_range: tuple[float, float]
    """What is integrated over."""
    edges: Floats
    """[S + 1] log-SNR, rising, of the curves' bins: one a sampler step."""
    errors: Floats
    """[2, S] mean squared error a dimension in each bin, without and with the prompt; 0 in a bin of no width."""
    error_stderr: Floats
    """[2, S] their standard errors."""

    @property
    def normal_errors(self) -> Floats:
        """[S] what `errors` are of a model that expects standard normal latents, of such latents: sigmoid(a)."""
        widths = np.diff(self.edges)
        areas = np.diff(np.logaddexp(0, self.edges))
        return np.asarray(np.divide(areas, widths, out=np.zeros_like(widths), where=widths > 0))


def likelihood(
    model: NoisePredictor,
    image: "ImageLike | Generation",
    prompt: str,
    *,
    error: float = 0.01,
    seed: int = 0,
    max_evals: int | None = None,
    batch_size: int | None = None,
    num_inference_steps: int | None = None,
    sampler: Sampler = WIDE,
    callback: Callable[[Progress[Likelihood]], bool | None] | None = None,
) -> Likelihood:
    """How many bits a dimension a picture's latents have for the model, with `prompt` and without.

    Args:
        model: A `Diffuser`.
        image: A PIL picture, the path of one, a `Generation`, or latents [1, C, h, w].
        prompt: What the picture shows.
        error: Sampling stops when both figures' standard errors are at most this many bits a dimension, or at
            `max_evals`.
        seed: Of the noise.
        max_evals: Most latents through the U-Net; a noise sample takes two.
        batch_size: Most latents in a U-Net call; results do not depend on it.
        num_inference_steps: How many bins the curves have; the generation's, or the model's default.
        sampler: How noise is drawn.
        callback: Sees a `Progress` after every U-Net call; if it returns False, the result so far is returned, or
            `Cancelled` raised where there is none yet.

    Raises:
        PromptError: A prompt that the model cannot take.
        ValueError: An `error` that is no positive number, a `max_evals` that is too small.
    """
    run = likelihood_iter(
        model,
        image,
        prompt,
        error=error,
        seed=seed,
        max_evals=max_evals,
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
        sampler=sampler,
    )
    return last_of(run, callback)


def likelihood_iter(
    model: NoisePredictor,
    image: "ImageLike | Generation",
    prompt: str,
    *,
    error: float = 0.01,
    seed: int = 0,
    max_evals: int | None = None,
    batch_size: int | None = None,
    num_inference_steps: int | None = None,
    sampler: Sampler = WIDE,
) -> Generator[Progress[Likelihood] | Likelihood, None, None]:
    """`likelihood`, with a `Progress` after every U-Net call, and last the `Likelihood`.

    The prompt and settings are checked here, before the first `next()`. Closing the generator stops the work within one
    U-Net call and frees the model.
    """
    check_text(model, prompt)
    target = check_rel_error(error)
    plan = Plan([Comparison("", prompt)], int(seed), sampler, batch_size, max_evals, "2 prompts")
    n_bins = num_inference_steps or int(getattr(image, "num_inference_steps", 0)) or default_steps(model)
    low, high = integrated_range(model, sampler)
    edges = model.schedule.bin_edges(n_bins, low, high)
    settings = settings_of(model, plan, error=target, num_inference_steps=n_bins)
    n_dims = math.prod(model.latent_shape)

    def summarise(estimate: Estimate) -> Likelihood:
        return _summarise(estimate, edges, n_dims, prompt, plan.seed, settings)

    return measure(
        model, image, plan, edges, summarise, excess=lambda result: result.rel_error / target, progress=Progress
    )


def _summarise(
    estimate: Estimate, edges: Floats, n_dims: int, prompt: str, seed: int, settings: dict[str, Any]
) -> Likelihood:
    per_dim = estimate.errors[:, 0] / n_dims
    known = np.diff(np.logaddexp(0, edges[[0, -1]]))  # the integral of sigmoid(a)
    nats = math.log(2 * math.pi * math.e) / 2 - (known - per_dim.sum(2)) / 2
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
