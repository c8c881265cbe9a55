"""A model whose information is known in closed form: Gaussian images, Gaussian words, and their optimal denoiser.

An image is x = sum over words of A_w y_w + tau * noise, in D = C*h*w dimensions, with K standard normals y_w per word.
A prompt with a word conditions on that word's y; without it, y is integrated out. So x given a text is Gaussian, the
optimal noise prediction is linear, and the estimator's integrals have closed forms. Everything is in nats.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.diffusion.predictor import Conditions
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.text import distinct_words

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """x given a text: N(mean, vectors diag(values) vectors^T)."""

    mean: Floats
    values: Floats
    vectors: Floats


class GaussianWorld:
    """A `PromptedModel` for one draw of the words' values."""

    def __init__(self, words: Sequence[str], shape: tuple[int, int, int] = (8, 2, 2), k: int = 8, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.words, self.latent_shape, self.tau = list(words), shape, 0.5
        self.d = int(np.prod(shape))
        strength = np.linspace(1.0, 0.4, len(self.words)) / np.sqrt(k)
        self.loadings = rng.normal(size=(self.d, len(self.words), k)) * strength[:, None]
        self.schedule, self.device = NoiseSchedule.stable_diffusion(), torch.device("cpu")
        self.batch_sizes: list[int] = []
        self.encoded: list[str] = []
        self.draw_words(rng)

    def draw_words(self, rng: np.random.Generator) -> None:
        """Draw new values of the words."""
        self.y = rng.normal(size=self.loadings.shape[1:])
        self._known: dict[str, Known] = {}

    def draw_image(self, rng: np.random.Generator) -> Tensor:
        """An image [1, C, h, w] given the present values of the words."""
        x = np.einsum("dwk,wk->d", self.loadings, self.y) + self.tau * rng.normal(size=self.d)
        return torch.from_numpy(x).float().reshape(1, *self.latent_shape)

    def without(self, word: str) -> str:
        """The prompt of all words but one."""
        return " ".join(other for other in self.words if other != word)

    def known(self, text: str) -> Known:
        if text not in self._known:
            has = np.array([word in distinct_words(text) for word in self.words])
            hidden = self.loadings[:, ~has].reshape(self.d, -1)
            values, vectors = np.linalg.eigh(hidden @ hidden.T + self.tau**2 * np.eye(self.d))
            mean = np.einsum("dwk,wk->d", self.loadings[:, has], self.y[has])
            self._known[text] = Known(mean, values, vectors)
        return self._known[text]

    # The protocol of a model.

    def busy(self) -> AbstractContextManager[None]:
        return nullcontext()

    def encode_text(self, texts: Sequence[str]) -> Conditions:
        """`words` [N, W]: whether each text has each word, 0 or 1."""
        self.encoded += texts
        has = [[float(word in distinct_words(text)) for word in self.words] for text in texts]
        return Conditions({"words": torch.tensor(has)})

    def predict_noise(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        """E[eps | x_a, text] = n (s^2 Sigma + n^2)^-1 (x_a - s mean)."""
        self.batch_sizes.append(len(x))
        out = np.empty((len(x), self.d))
        signal, noise = (torch.sigmoid(sign * log_snr).numpy()[:, None] for sign in (1, -1))
        flat, given = x.double().flatten(1).numpy(), conditions.tensors["words"].numpy()
        for has in np.unique(given, axis=0):
            known = self.known(" ".join(word for word, here in zip(self.words, has, strict=True) if here))
            rows = (given == has).all(1)
            centred = flat[rows] - np.sqrt(signal[rows]) * known.mean
            turned = centred @ known.vectors / (signal[rows] * known.values + noise[rows])
            out[rows] = np.sqrt(noise[rows]) * turned @ known.vectors.T
        return torch.from_numpy(out).float().reshape(x.shape)

    # The exact answers.

    def log_ratio(self, x: Tensor, context: str, text: str) -> float:
        """log p(x | text) / p(x | context): the direct information over the whole log-SNR line."""
        return self._log_density(x, text) - self._log_density(x, context)

    def direct(self, x: Tensor, context: str, text: str, low: float, high: float) -> float:
        """1/2 Int E[|eps - e_context|^2 - |eps - e_text|^2] da over [low, high], in closed form.

        With w = exp(-a), an eigenvalue v and z the image's distance from the mean along its eigenvector,
        E|eps - e|^2 = (v / (v + w))^2 + w z^2 / (v + w)^2, whose integral is log((v + w) / w) + (z^2 - v) / (v + w).
        """

        def antiderivative(known: Known, a: float) -> float:
            w, v = np.exp(-a), known.values
            z = known.vectors.T @ (_flat(x) - known.mean)
            return float(np.sum(np.log((v + w) / w) + (z**2 - v) / (v + w)))

        c, y = self.known(context), self.known(text)
        inside = [antiderivative(c, a) - antiderivative(y, a) for a in (low, high)]
        return (inside[1] - inside[0]) / 2

    def bits_per_dim(self, x: Tensor, text: str, low: float, high: float) -> float:
        """-log2 p(x | text) / d, with a standard normal's errors outside [low, high].

        The squared error's antiderivative is that of `direct`, of sigmoid(a) it is log(1 + exp(a)).
        """
        known = self.known(text)
        z = known.vectors.T @ (_flat(x) - known.mean)
        nats = self.d * np.log(2 * np.pi * np.e) / 2
        for sign, a in ((1, high), (-1, low)):
            v, w = known.values, np.exp(-a)
            errors = np.sum(np.log((v + w) / w) + (z**2 - v) / (v + w))
            nats -= sign * (self.d * np.logaddexp(0, a) - errors) / 2
        return float(nats / np.log(2) / self.d)

    def orthogonal(self, x: Tensor, context: str, text: str, low: float, high: float) -> Floats:
        """1/2 Int E(e_context - e_text)^2 da over [low, high], [C, h, w].

        The expectation is in closed form, with M = (s^2 Sigma + n^2)^-1: e_c - e_y is Gaussian with mean
        n s (M_c (x - mean_c) - M_y (x - mean_y)) and covariance n^4 (M_c - M_y)^2. Its integral over a is by 64 Gauss-
        Legendre points, exact to 12 digits for so smooth a function (compared with 400).
        """
        nodes, weights = np.polynomial.legendre.leggauss(64)
        c, y = self.known(context), self.known(text)
        total = np.zeros(self.d)
        for a, weight in zip((low + high) / 2 + (high - low) / 2 * nodes, (high - low) / 2 * weights, strict=True):
            signal, noise = 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(a))
            m_c, m_y = (k.vectors / (signal * k.values + noise) @ k.vectors.T for k in (c, y))
            mean = np.sqrt(noise * signal) * (m_c @ (_flat(x) - c.mean) - m_y @ (_flat(x) - y.mean))
            total += weight / 2 * (mean**2 + noise**2 * np.sum((m_c - m_y) ** 2, axis=1))
        return total.reshape(self.latent_shape)

    def information(self, context: str, text: str) -> float:
        """I(x; what text adds | context) = 1/2 log det Sigma_context / det Sigma_text, averaged over everything."""
        return float(np.sum(np.log(self.known(context).values) - np.log(self.known(text).values)) / 2)

    def information_within(self, context: str, text: str, low: float, high: float) -> float:
        """The part of it between two log-SNRs: 1/2 Int (mmse_context - mmse_text) da (Guo, Shamai, Verdu 2005)."""

        def antiderivative(known: Known, a: float) -> float:
            return float(np.sum(np.log1p(known.values * np.exp(a))))

        c, y = self.known(context), self.known(text)
        inside = [antiderivative(c, a) - antiderivative(y, a) for a in (low, high)]
        return (inside[1] - inside[0]) / 2

    def _log_density(self, x: Tensor, text: str) -> float:
        known = self.known(text)
        z = known.vectors.T @ (_flat(x) - known.mean)
        return float(-np.sum(np.log(2 * np.pi * known.values) + z**2 / known.values) / 2)


def _flat(x: Tensor) -> Floats:
    return x.double().flatten().numpy()
