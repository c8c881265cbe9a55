"""What a narrow dtype makes of a measurement: how much two texts seem to differ because predictions are rounded.

Information is the difference of two predictions, and rounding adds to it a floor that a small word may not rise above.
So before anything is measured in half precision, a few noise samples are predicted in both, and the floor

    1/2 Int E || (h_y - e_y) - (h_c - e_c) ||^2 da,  h in half precision and e in float32,

is held against what the texts really told.
"""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.information.estimator import Comparison, NoisePredictor, contributions, latents_at_once, noisy
from core.information.quadrature import Sampler, draw

MOST = 0.05
"""Largest floor that is left in a result, as a share of what the least word tells."""

_SAMPLER = Sampler(n_points=4)
_REPLICATE = 2**33
"""None of an estimate's replicates."""


def is_rounded(model: NoisePredictor) -> bool:
    """Whether a model predicts in half precision and could do so in float32."""
    return getattr(model, "dtype", torch.float32) != torch.float32 and hasattr(model, "in_float32")


class Rounding:
    """Measures the floor of some comparisons on one picture."""

    share: float
    """The largest floor of a comparison, as a share of what it tells in float32."""
    n_evals: int
    """Latents evaluated for it."""

    def __init__(
        self, model: NoisePredictor, x: Tensor, comparisons: Sequence[Comparison], *, seed: int, batch_size: int
    ) -> None:
        self._model, self._x, self._comparisons = model, x, comparisons
        self._seed, self._batch_size = seed % 2**64, batch_size
        self.share, self.n_evals = 0.0, 0

    def run(self) -> Generator[None, None, None]:
        """Measure, pausing after every U-Net call."""
        model: Any = self._model
        texts = list(dict.fromkeys(text for pair in self._comparisons for text in pair))
        density = _SAMPLER.density(model.schedule.log_snr_range)
        drawn = draw(_SAMPLER, density, model.latent_shape, (self._seed, _REPLICATE, 0))
        narrow = yield from self._predict(drawn.log_snr, drawn.noise, texts)
        with model.in_float32():
            wide = yield from self._predict(drawn.log_snr, drawn.noise, texts)
        context, text = ([texts.index(pair[side]) for pair in self._comparisons] for side in (0, 1))
        noise, weight = drawn.noise.to(wide.device), drawn.weight.numpy()[:, None]
        floor, told = (
            (weight * contributions(eps, noise, context, text)[0].sum((2, 3))).sum(0) for eps in (narrow - wide, wide)
        )
        self.share = float(np.divide(floor, told, out=np.zeros_like(floor), where=floor > 0).max())

    def _predict(self, log_snr: Tensor, noise: Tensor, texts: list[str]) -> Generator[None, None, Tensor]:
        """[m, T, C, h, w] predictions for m noise samples under T texts."""
        m, n = len(log_snr), len(texts)
        x, a = noisy(self._x, log_snr, noise).repeat_interleave(n, 0), log_snr.repeat_interleave(n)
        embeddings = torch.cat([self._model.encode_text(texts)] * m)
        parts: list[Tensor] = []
        at_once = latents_at_once(self._model, min(self._batch_size, m * n), embeddings)
        for at in range(0, m * n, at_once):
            rows = slice(at, at + at_once)
            parts.append(self._model.predict_noise(x[rows], a[rows], embeddings[rows]))
            self.n_evals += len(parts[-1])
            yield
        return torch.cat(parts).reshape(m, n, *parts[0].shape[1:])
