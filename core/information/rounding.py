"""Rounding error of a measurement in half precision.

Information comes from the difference of two predictions. Rounding adds a floor to it, below which the information of a
small word is lost. Before a measurement in half precision, a few noise samples are therefore predicted in half
precision and in float32, and the floor

    1/2 Int E || (h_y - e_y) - (h_c - e_c) ||^2 da,  h in half precision and e in float32,

is compared with the information in float32.
"""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.diffusion.predictor import NoisePredictor, PromptedModel
from core.information.estimator import Comparison, contributions, latents_at_once, noisy
from core.information.quadrature import Sampler, draw

MAX_ROUNDING_SHARE = 0.05
"""Largest accepted floor, as a share of the information of the comparison that it affects most."""

_SAMPLER = Sampler(n_points=4)
_REPLICATE = 2**33
"""Replicate number of the draw, larger than any of an estimate's."""


def is_rounded(model: NoisePredictor) -> bool:
    """Whether a model predicts in half precision and could do so in float32."""
    return getattr(model, "dtype", torch.float32) != torch.float32 and hasattr(model, "in_float32")


class Rounding:
    """Measures the rounding floor of some comparisons on one image."""

    share: float
    """The largest floor of a comparison relative to its information in float32; infinite where values overflow."""
    n_evals: int
    """Latents evaluated."""

    def __init__(
        self, model: PromptedModel, x: Tensor, comparisons: Sequence[Comparison], *, seed: int, batch_size: int
    ) -> None:
        """x is [C, h, w]; batch_size limits the latents in a U-Net call."""
        self._model, self._x, self._comparisons = model, x, comparisons
        self._seed, self._batch_size = seed % 2**64, batch_size
        self.share, self.n_evals = 0.0, 0

    def run(self) -> Generator[None, None, None]:
        """Measure, yielding after every U-Net call."""
        model: Any = self._model
        texts = list(dict.fromkeys(text for pair in self._comparisons for text in pair))
        density = _SAMPLER.density(model.schedule.log_snr_range)
        drawn = draw(_SAMPLER, density, model.latent_shape, (self._seed, _REPLICATE, 0))
        narrow = yield from self._predict(drawn.log_snr, drawn.noise, texts)
        with model.in_float32():
            wide = yield from self._predict(drawn.log_snr, drawn.noise, texts)
        context, text = ([texts.index(pair[side]) for pair in self._comparisons] for side in (0, 1))
        noise, weight = drawn.noise.to(wide.device), drawn.weight.numpy()[:, None]
        floor, information = (
            (weight * contributions(eps, noise, context, text)[0].sum((2, 3))).sum(0) for eps in (narrow - wide, wide)
        )
        shares = np.divide(floor, information, out=np.zeros_like(floor), where=floor > 0)
        # Where half precision overflows, the floor is no number.
        self.share = float(np.where(np.isfinite(floor), shares, np.inf).max())

    def _predict(self, log_snr: Tensor, noise: Tensor, texts: list[str]) -> Generator[None, None, Tensor]:
        """[m, T, C, h, w] predictions for m noise samples under T texts."""
        m, n = len(log_snr), len(texts)
        x, a = noisy(self._x, log_snr, noise).repeat_interleave(n, 0), log_snr.repeat_interleave(n)
        conditions = self._model.encode_text(texts).repeat(m)
        parts: list[Tensor] = []
        at_once = latents_at_once(self._model, min(self._batch_size, m * n), conditions)
        for at in range(0, m * n, at_once):
            rows = slice(at, at + at_once)
            parts.append(self._model.predict_noise(x[rows], a[rows], conditions[rows]))
            self.n_evals += len(parts[-1])
            yield
        return torch.cat(parts).reshape(m, n, *parts[0].shape[1:])
