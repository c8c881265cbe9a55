"""A model of finitely many states, whose words may be redundant, unique or synergistic, with the optimal denoiser.

An image is the centre of a state, drawn with its probability, plus tau times noise. Each state has some words, and a
text allows the states that have all its words. So x given a text is a mixture of Gaussians: its density, its noise
prediction and all pointwise information are known. Everything is in nats.
"""

from collections.abc import Mapping, Sequence
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
class State:
    """A state that an image can show."""

    words: str
    """The words that apply to it."""
    p: float
    """Its probability."""
    look: int
    """Index of its centre; states may share one."""


class DiscreteWorld:
    """A `PromptedModel`."""

    def __init__(self, states: Sequence[State], shape: tuple[int, int, int] = (4, 2, 2), apart: float = 1.0):
        rng = np.random.default_rng(0)
        self.states, self.latent_shape, self.tau = list(states), shape, 0.1
        looks = rng.normal(size=(1 + max(state.look for state in states), int(np.prod(shape))))
        self.centres = apart * looks[[state.look for state in states]]
        self.p = np.array([state.p for state in states])
        self.vocabulary = sorted({word for state in states for word in distinct_words(state.words)})
        self.schedule, self.device = NoiseSchedule.stable_diffusion(), torch.device("cpu")

    def allowed_by(self, text: str) -> NDArray[np.bool_]:
        """[K] whether each state has all words of a text."""
        words = set(distinct_words(text))
        return np.array([words <= set(distinct_words(state.words)) for state in self.states])

    def probability(self, text: str, given: str = "") -> float:
        """Probability that a state has the words of a text, given that it has those of another."""
        known = self.allowed_by(given)
        return float(self.p[self.allowed_by(text) & known].sum() / self.p[known].sum())

    def image(self, state: int, rng: np.random.Generator) -> Tensor:
        """An image [1, C, h, w] of a state."""
        x = self.centres[state] + self.tau * rng.normal(size=self.centres.shape[1])
        return torch.from_numpy(x).float().reshape(1, *self.latent_shape)

    # The protocol of a model.

    def busy(self) -> AbstractContextManager[None]:
        return nullcontext()

    def encode_text(self, texts: Sequence[str]) -> Conditions:
        """`states` [N, K]: whether each state is possible given each text."""
        return Conditions({"states": torch.from_numpy(np.stack([self.allowed_by(text) for text in texts]))})

    def predict_noise(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        """E[eps | x_a, text] = n (x_a - s sum of posterior times centre) / (s^2 tau^2 + n^2)."""
        signal, noise = (torch.sigmoid(sign * log_snr).numpy()[:, None] for sign in (1, -1))
        flat = x.double().flatten(1).numpy()
        posterior = np.exp(_normalised(self._log_joint(flat, signal, noise, conditions.tensors["states"].numpy())))
        mean = np.sqrt(signal) * (posterior @ self.centres)
        out = np.sqrt(noise) * (flat - mean) / (signal * self.tau**2 + noise)
        return torch.from_numpy(out).float().reshape(x.shape)

    # The exact answers.

    def log_ratio(self, x: Tensor, context: str, text: str) -> float:
        """log p(x | text) / p(x | context)."""
        flat = x.double().flatten(1).numpy()
        return float(self._log_ratio(flat, np.ones((1, 1)), np.zeros((1, 1)), context, text)[0])

    def direct(self, x: Tensor, context: str, text: str, low: float, high: float, n: int = 20_000) -> float:
        """1/2 Int E[|eps - e_context|^2 - |eps - e_text|^2] da over [low, high].

        It is the difference of E log p(x_a | text) / p(x_a | context) between both ends (Guo, Shamai & Verdu 2005). The
        expectations are over `n` noise samples.
        """
        noise = np.random.default_rng(1).normal(size=(n, self.centres.shape[1]))
        at_ends = []
        for a in (low, high):
            s, v = (np.full((n, 1), 1 / (1 + np.exp(-sign * a))) for sign in (1, -1))
            x_a = np.sqrt(s) * x.double().flatten(1).numpy() + np.sqrt(v) * noise
            at_ends.append(float(self._log_ratio(x_a, s, v, context, text).mean()))
        return at_ends[1] - at_ends[0]

    def _log_ratio(self, x: Floats, signal: Floats, noise: Floats, context: str, text: str) -> Floats:
        logs = []
        for words in (context, text):
            joint = self._log_joint(x, signal, noise, self.allowed_by(words)[None])
            top = joint.max(1)
            total = np.exp(joint - top[:, None]).sum(1)
            logs.append(top + np.log(total) - np.log(self.p[self.allowed_by(words)].sum()))
        return np.asarray(logs[1] - logs[0])

    def _log_joint(self, x: Floats, signal: Floats, noise: Floats, over: NDArray[np.bool_]) -> Floats:
        """[N, K] log p(state) p(x_a | state) up to a constant; minus infinity for states that the text excludes."""
        distance = ((x[:, None] - np.sqrt(signal)[..., None] * self.centres) ** 2).sum(2)
        return np.where(over, np.log(self.p) - distance / (2 * (signal * self.tau**2 + noise)), -np.inf)


def _normalised(logs: Floats) -> Floats:
    top = logs.max(1, keepdims=True)
    return np.asarray(logs - top - np.log(np.exp(logs - top).sum(1, keepdims=True)))


def world_of(joint: Mapping[str, float], looks: Mapping[str, int] | None = None, **options: float) -> DiscreteWorld:
    """A world from the probability of each state's words; by default each state has a centre of its own."""
    states = [State(words, p, (looks or {}).get(words, i)) for i, (words, p) in enumerate(joint.items())]
    return DiscreteWorld(states, **options)  # type: ignore[arg-type]
