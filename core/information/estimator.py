"""The integral itself: how far two texts pull the noise prediction apart, summed over log-SNR and noise.

For noisy latents x_a and predictions e_c (context) and e_y (text), in nats:

    orthogonal  i_o = 1/2 Int E || e_c - e_y ||^2 da
    direct      i_d = 1/2 Int E [ ||eps - e_c||^2 - ||eps - e_y||^2 ] da

(Kong et al. 2024, arXiv 2310.07972). Both come from the same predictions; everything returned is in bits.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.diffusion.schedule import NoiseSchedule
from core.information.quadrature import Draw, Sampler, draw, fit

Floats = NDArray[np.float64]

_HALF_BIT = 1 / (2 * math.log(2))
"""The formulas' half, and nats to bits."""
_PILOT = 2**32
"""Replicate number of the pilot: none of the estimate's."""


class NoisePredictor(Protocol):
    """What information is estimated from: a `Diffuser`, or anything with a closed form in its place."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Tells the trained log-SNR range and the sampler's steps."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Conditions [N, ...] of texts."""

    def predict_noise(self, x: Tensor, log_snr: Tensor, embeddings: Tensor) -> Tensor:
        """Predictions [B, C, h, w] for noisy latents x [B, C, h, w] at log_snr [B] under conditions [B, ...]."""

    def busy(self) -> AbstractContextManager[Any]:
        """Held for as long as a job lives."""


class Comparison(NamedTuple):
    """Two texts whose predictions are compared."""

    context: str
    """What is known already: the prompt without the word, or the empty text."""
    text: str
    """The same with the word."""


class Estimate(NamedTuple):
    """Independent replicates of everything that is estimated, for P comparisons."""

    maps: Floats
    """[R, P, h, w] orthogonal bits a cell."""
    direct: Floats
    """[R, P] direct bits."""
    timeline: Floats
    """[R, P, S] orthogonal bits in each bin of log-SNR."""
    errors: Floats
    """[R, P, 2, S] squared errors of the noise predictions of context and text, integrated over each bin of log-SNR.
    What is a half in bits of their difference is `direct`."""
    n_evals: int
    """Latents evaluated for them, unfinished replicates and the pilot included."""


class _Group(NamedTuple):
    """Comparisons that share their noise and their batch."""

    columns: list[int]
    """Which comparisons of all they are, [P']."""
    texts: list[str]
    """Distinct texts to evaluate for every noise sample."""
    context: list[int]
    """[P'] index into texts."""
    text: list[int]
    """[P'] index into texts."""


class Estimator:
    """Replicates of the integrals for some comparisons on one picture, computed a U-Net batch at a time."""

    n_evals: int
    """Latents evaluated so far."""

    def __init__(
        self,
        model: NoisePredictor,
        x: Tensor,
        comparisons: Sequence[Comparison],
        *,
        seed: int,
        sampler: Sampler,
        edges: Floats,
        batch_size: int,
    ) -> None:
        """x is [C, h, w]; edges [S + 1] are the timeline's bins; batch_size is the most latents in a U-Net call."""
        self._model, self._x, self._sampler, self._edges, self._batch_size = model, x, sampler, edges, batch_size
        self._seed = seed % 2**64
        self._groups = _groups(comparisons, sampler)
        self._densities = [sampler.density(model.schedule.log_snr_range) for _ in self._groups]
        self._has_pilot = not sampler.fitted
        n_bins = len(edges) - 1
        self._maps = np.zeros((0, len(comparisons), *model.latent_shape[1:]))
        self._direct = np.zeros((0, len(comparisons)))
        self._timeline = np.zeros((0, len(comparisons), n_bins))
        self._errors = np.zeros((0, len(comparisons), 2, n_bins))
        self._n_finished = 0
        self.n_evals = 0

    @property
    def n_replicates(self) -> int:
        """Replicates finished so far."""
        return self._n_finished

    def result(self) -> Estimate:
        """The replicates finished so far."""
        n = self._n_finished
        return Estimate(self._maps[:n], self._direct[:n], self._timeline[:n], self._errors[:n], self.n_evals)

    def run(self, n_replicates: int) -> Generator[None, None, None]:
        """Go on until there are `n_replicates` in all, pausing after every U-Net call."""
        if not self._has_pilot:
            self._has_pilot = True
            for index, group in enumerate(self._groups):
                yield from self._pilot(index, group)
        start = len(self._maps)
        self._maps, self._direct, self._timeline, self._errors = (
            np.concatenate([old, np.zeros((n_replicates - start, *old.shape[1:]))])
            for old in (self._maps, self._direct, self._timeline, self._errors)
        )
        for index, group in enumerate(self._groups):
            draws = [
                draw(self._sampler, self._densities[index], self._model.latent_shape, (self._seed, replicate, index))
                for replicate in range(start, n_replicates)
            ]
            owner = np.arange(start, n_replicates).repeat(self._sampler.n_points)
            everything = Draw(*(torch.cat(part) for part in zip(*draws, strict=True)))
            stride = max(1, self._batch_size // len(group.texts))
            for at in range(0, len(owner), stride):
                batch = Draw(*(part[at : at + stride] for part in everything))
                eps = yield from self._predict(batch, group)
                self._add(batch, eps, owner[at : at + stride], group)
                if index == len(self._groups) - 1:
                    self._n_finished = start + (at + len(eps)) // self._sampler.n_points
                yield

    def _pilot(self, index: int, group: _Group) -> Generator[None, None, None]:
        """Fit a group's density to its integrands, on draws that the estimate leaves out."""
        density = self._densities[index]
        pilot = replace(self._sampler, n_points=self._sampler.n_pilot, stratified=True, antithetic=False)
        everything = draw(pilot, density, self._model.latent_shape, (self._seed, _PILOT, index))
        values = []
        stride = max(1, self._batch_size // len(group.texts))
        for at in range(0, pilot.n_points, stride):
            batch = Draw(*(part[at : at + stride] for part in everything))
            eps = yield from self._predict(batch, group)
            orthogonal, _ = contributions(eps, batch.noise.to(eps.device), group.context, group.text)
            values.append(orthogonal.sum((2, 3)))
            yield
        self._densities[index] = fit(density, everything.log_snr.numpy(), np.concatenate(values).T)

    def _predict(self, batch: Draw, group: _Group) -> Generator[None, None, Tensor]:
        """Predictions [m, T, C, h, w] for m noise samples under the group's T texts, in one call if they fit."""
        m, n_texts = len(batch.log_snr), len(group.texts)
        x_a = noisy(self._x, batch.log_snr, batch.noise)
        embeddings = self._model.encode_text(group.texts)
        sample = torch.arange(m).repeat_interleave(n_texts)
        text = torch.arange(n_texts).repeat(m)
        parts: list[Tensor] = []
        at_once = latents_at_once(self._model, min(self._batch_size, m * n_texts), embeddings)
        for at in range(0, m * n_texts, at_once):
            if parts:
                yield  # between the calls of one batch; after the last, the caller pauses
            rows = slice(at, at + at_once)
            which = sample[rows]
            conditions = embeddings[text[rows].to(embeddings.device)]
            parts.append(self._model.predict_noise(x_a[which], batch.log_snr[which], conditions))
            self.n_evals += len(which)
        return torch.cat(parts).reshape(m, n_texts, *parts[0].shape[1:])

    def _add(self, batch: Draw, eps: Tensor, owner: NDArray[np.int64], group: _Group) -> None:
        """Add m noise samples to the replicates that own them, [m]."""
        noise = batch.noise.to(eps.device)
        orthogonal, direct = contributions(eps, noise, group.context, group.text)
        errors = squared_errors(eps, noise, batch.log_snr)[:, [group.context, group.text]].transpose(0, 2, 1)
        weight = batch.weight.numpy()
        n_bins = len(self._edges) - 1
        bins = np.searchsorted(self._edges, batch.log_snr.numpy(), side="right").clip(1, n_bins) - 1
        where = owner[:, None], np.array(group.columns)
        np.add.at(self._maps, where, weight[:, None, None, None] * orthogonal)
        np.add.at(self._direct, where, weight[:, None] * direct)
        np.add.at(self._timeline, (*where, bins[:, None]), weight[:, None] * orthogonal.sum((2, 3)))
        which = owner[:, None, None], np.array(group.columns)[:, None], np.arange(2), bins[:, None, None]
        np.add.at(self._errors, which, weight[:, None, None] * errors)


def latents_at_once(model: NoisePredictor, n: int, embeddings: Tensor) -> int:
    """How many of n latents fit into one call of a model with such embeddings [T, L, D]; all if it cannot tell.

    A `Diffuser` would part a larger batch by itself, but nobody could pause between the parts.
    """
    fit = getattr(model, "latents_at_once", None)
    return n if fit is None else int(fit(n, embeddings.shape[1]))


def noisy(x: Tensor, log_snr: Tensor, noise: Tensor) -> Tensor:
    """x_a [m, C, h, w] float32 on x's device, from clean x [C, h, w], log_snr [m] and noise [m, C, h, w]."""
    abar = torch.sigmoid(log_snr)[:, None, None, None]
    signal, spread = abar.sqrt().float().to(x.device), (1 - abar).sqrt().float().to(x.device)
    return signal * x + spread * noise.to(x.device)


@torch.no_grad()
def contributions(eps: Tensor, noise: Tensor, context: list[int], text: list[int]) -> tuple[Floats, Floats]:
    """Integrands in bits per unit of log-SNR: orthogonal [m, P, h, w] and direct [m, P].

    eps is [m, T, C, h, w]; comparison p is between the predictions `context[p]` and `text[p]`. The direct one is
    written as a product, because the difference of two nearly equal squares loses digits.
    """
    e_c, e_y = eps[:, context], eps[:, text]
    apart = e_y - e_c
    orthogonal = apart.square().sum(2)
    direct = (apart * (2 * noise[:, None] - e_c - e_y)).sum((2, 3, 4))
    return _HALF_BIT * orthogonal.double().cpu().numpy(), _HALF_BIT * direct.double().cpu().numpy()


@torch.no_grad()
def squared_errors(eps: Tensor, noise: Tensor, log_snr: Tensor) -> Floats:
    """[m, T] squared errors of predictions [m, T, C, h, w] of noise [m, C, h, w], with a control variate.

    A prediction leaves most of the noise's own length in its error where there is little of it in x_a. How much longer
    than on average a noise is has mean 0, and is taken off times sigmoid(a)^2: all that varies for standard normal
    latents under antithetic noise.
    """
    errors = (noise[:, None] - eps).square().sum((2, 3, 4)).double().cpu()
    longer = noise.square().sum((1, 2, 3)).double().cpu() - noise[0].numel()
    return np.asarray((errors - (torch.sigmoid(log_snr) ** 2 * longer)[:, None]).numpy())


class Cost(NamedTuple):
    """U-Net evaluations, in latents. W words share W + 1 texts where they are compared with one prompt."""

    pilot: int
    """For fitting the density, once."""
    replicate: int
    """For each replicate."""


def cost(comparisons: Sequence[Comparison], sampler: Sampler) -> Cost:
    """What estimating these comparisons costs."""
    n_texts = sum(len(group.texts) for group in _groups(comparisons, sampler))
    return Cost(sampler.n_pilot * n_texts if sampler.fitted else 0, sampler.n_points * n_texts)


def _groups(comparisons: Sequence[Comparison], sampler: Sampler) -> list[_Group]:
    if sampler.shared:
        return [_group(list(range(len(comparisons))), comparisons, [])]
    unused = [""] if sampler.prompts_per_word == 3 else []
    return [_group([i], comparisons, unused) for i in range(len(comparisons))]


def _group(columns: list[int], comparisons: Sequence[Comparison], unused: list[str]) -> _Group:
    pairs = [comparisons[i] for i in columns]
    texts = list(dict.fromkeys([text for pair in pairs for text in pair] + unused))
    return _Group(columns, texts, [texts.index(p.context) for p in pairs], [texts.index(p.text) for p in pairs])
