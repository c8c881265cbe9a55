"""Monte Carlo estimates of pointwise information: how far two texts pull the noise prediction apart.

For noisy latents x_a and predictions e_c (context) and e_y (text), in nats:

    orthogonal  i_o = 1/2 Int E || e_c - e_y ||^2 da
    direct      i_d = 1/2 Int E [ ||eps - e_c||^2 - ||eps - e_y||^2 ] da

(Kong et al. 2024, arXiv 2310.07972). Both come from the same predictions; results are in bits. Where half precision is
faster, most predictions are made in it (`core.information.precision`).
"""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.arrays import Bools, Floats, Ints
from core.diffusion.predictor import Conditions, NoisePredictor, PromptedModel
from core.errors import NotFiniteError
from core.information.precision import Split, levels_of, pick, timed
from core.information.quadrature import Draw, Sampler, block_size, draw, fit

_HALF_BIT = 1 / (2 * math.log(2))
"""The factor 1/2 of the formulas, and nats to bits."""
_PILOT = 2**32
"""Replicate number of the pilot, larger than any of the estimate's."""


class Comparison(NamedTuple):
    """Two texts whose noise predictions are compared."""

    context: str
    """The condition: the prompt without the word, or the empty text."""
    text: str
    """The same with the word."""


class Estimate(NamedTuple):
    """R replicates of every estimate, for P comparisons."""

    maps: Floats
    """[R, P, h, w] orthogonal bits a cell."""
    direct: Floats
    """[R, P] direct bits."""
    timeline: Floats
    """[R, P, S] orthogonal bits in each bin of log-SNR."""
    errors: Floats
    """[R, P, 2, S] squared errors of the noise predictions for context and text, integrated over each bin of log-SNR.
    Half of their difference, in bits and summed over the bins, is `direct`."""
    n_evals: int
    """Latents evaluated, unfinished replicates and the pilot included."""
    precision: dict[str, Any]
    """For a result's settings, which precisions were used; empty for a model that has but one."""


class _Group(NamedTuple):
    """Comparisons that share their noise and their batch."""

    columns: list[int]
    """[P'] indices of these comparisons among all."""
    texts: list[str]
    """[T] distinct texts, evaluated for every noise sample."""
    context: list[int]
    """[P'] index of the context in `texts`."""
    text: list[int]
    """[P'] index of the text in `texts`."""


class Estimator:
    """Estimates the integrals of some comparisons on one image, a U-Net batch at a time."""

    n_evals: int
    """Latents evaluated so far."""
    n_repeats: int
    """Those of them that were evaluated in a second precision, too. They come on top of the plan's cost."""

    def __init__(
        self,
        model: PromptedModel,
        x: Tensor,
        comparisons: Sequence[Comparison],
        *,
        seed: int,
        sampler: Sampler,
        edges: Floats,
        batch_size: int,
    ) -> None:
        """x is [C, h, w]; edges [S + 1] are of the timeline's bins; batch_size is the maximum in a U-Net call."""
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
        self._correction = np.zeros(len(comparisons))
        self._n_finished = 0
        self.n_evals = self.n_repeats = 0
        levels = levels_of(model)
        self._split = levels and Split(model, levels, sampler.exact_every, 2 * len(comparisons))

    @property
    def n_replicates(self) -> int:
        """Replicates finished so far."""
        return self._n_finished

    def result(self, *, blocks: bool = True) -> Estimate:
        """The replicates finished so far; by default those that interleave are taken as one, once there are many."""
        n = self._n_finished
        size = block_size(n, self._sampler.interleaved) if blocks else 1
        maps, direct, timeline, errors = (
            array[:n].reshape(n // size, size, *array.shape[1:]).mean(1)
            for array in (self._maps, self._direct, self._timeline, self._errors)
        )
        precision = self._split.settings(self._correction, n * maps.mean(0).sum((1, 2))) if self._split else {}
        return Estimate(maps, direct, timeline, errors, self.n_evals, precision)

    def run(self, n_replicates: int) -> Generator[None, None, None]:
        """Continue until there are `n_replicates` in all, yielding after every U-Net call."""
        if not self._has_pilot:
            self._has_pilot = True
            for index, group in enumerate(self._groups):
                yield from self._pilot(index, group)
        self._maps, self._direct, self._timeline, self._errors = (
            np.concatenate([old, np.zeros((n_replicates - len(old), *old.shape[1:]))])
            for old in (self._maps, self._direct, self._timeline, self._errors)
        )
        while (start := self._n_finished) < n_replicates:
            stop = self._split.until(start, n_replicates) if self._split else n_replicates
            for index, group in enumerate(self._groups):
                yield from self._block(index, group, range(start, stop))
            self._n_finished = stop
            if self._split:
                self._split.decide(self._maps[:stop].sum((2, 3)), self._direct[:stop])

    def _block(self, index: int, group: _Group, replicates: range) -> Generator[None, None, None]:
        """Evaluate a group's noise samples of some replicates."""
        n, key = self._sampler.n_points, self._seed
        draws = [
            draw(self._sampler, self._densities[index], self._model.latent_shape, (key, r, index)) for r in replicates
        ]
        samples = Draw(*(torch.cat(part) for part in zip(*draws, strict=True)))
        owner = np.array(replicates).repeat(n)
        # Replicates are finished with their last group.
        after = replicates.stop if index == len(self._groups) - 1 else replicates.start
        if self._split is None:
            yield from self._pass(samples, owner, group, 1.0, after)
            return
        every = self._split.every
        picked: Bools = np.concatenate([pick(n, every, (key, r, index)) for r in replicates])
        of_picked = Draw(*(part[picked] for part in samples))
        narrow: Floats | None = None
        if self._split.both:
            factor: Floats = np.where(picked, 1.0 - every, 1.0)
            with self._computing_in(self._split.levels.narrow):
                narrow = yield from self._pass(samples, owner, group, factor, replicates.start)
        with self._computing_in(self._split.levels.wide):
            wide = yield from self._pass(of_picked, owner[picked], group, float(every), after)
        if narrow is not None:
            difference = wide - narrow[picked]
            self.n_repeats += len(difference) * len(group.texts)
            which = np.concatenate([group.columns, len(self._correction) + np.array(group.columns)])
            self._split.differed(which, difference**2, n)
            self._correction[group.columns] += every * difference.sum(0)[: len(group.columns)]

    @contextmanager
    def _computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        model: Any = self._model
        with model.computing_in(dtype):
            yield

    def _pass(
        self, samples: Draw, owner: Ints, group: _Group, factor: Floats | float, after: int
    ) -> Generator[None, None, Floats]:
        """Add m noise samples, times a factor each, to the replicates that they belong to, owner [m].

        A replicate below `after` is finished when its last sample is added. Returns the samples' contributions to the
        orthogonal and the direct totals, [m, 2 P'].
        """
        factors = np.broadcast_to(factor, len(owner))
        totals = [np.zeros((0, 2 * len(group.columns)))]
        stride = max(1, self._batch_size // len(group.texts))
        for at in range(0, len(owner), stride):
            rows = slice(at, at + stride)
            batch = Draw(*(part[rows] for part in samples))
            eps = yield from self._predict(batch, group)
            totals.append(self._add(batch, eps, owner[rows], factors[rows], group))
            if owner[at] < after:
                rest = owner[at + stride :]
                self._n_finished = int(rest[0]) if len(rest) else after
            yield
        return np.concatenate(totals)

    def _pilot(self, index: int, group: _Group) -> Generator[None, None, None]:
        """Fit a group's density to its integrands, on draws that do not enter the estimate."""
        density = self._densities[index]
        pilot = replace(self._sampler, n_points=self._sampler.n_pilot, stratified=True, antithetic=False)
        everything = draw(pilot, density, self._model.latent_shape, (self._seed, _PILOT, index))
        values = []
        stride = max(1, self._batch_size // len(group.texts))
        for at in range(0, pilot.n_points, stride):
            batch = Draw(*(part[at : at + stride] for part in everything))
            eps = yield from self._predict(batch, group)
            orthogonal, direct = contributions(eps, batch.noise.to(eps.device), group.context, group.text)
            self._check(orthogonal, direct)
            values.append(orthogonal.sum((2, 3)))
            yield
        self._densities[index] = fit(density, everything.log_snr.numpy(), np.concatenate(values).T)

    def _predict(self, batch: Draw, group: _Group) -> Generator[None, None, Tensor]:
        """Predictions [m, T, C, h, w] for m noise samples under the group's T texts, in one call if they fit."""
        m, n_texts = len(batch.log_snr), len(group.texts)
        x_a = noisy(self._x, batch.log_snr, batch.noise)
        conditions = self._model.encode_text(group.texts)
        sample = torch.arange(m).repeat_interleave(n_texts)
        text = torch.arange(n_texts).repeat(m)
        parts: list[Tensor] = []
        at_once = latents_at_once(self._model, min(self._batch_size, m * n_texts), conditions)
        for at in range(0, m * n_texts, at_once):
            if parts:
                yield  # between the calls of one batch; after the last one, the caller yields
            rows = slice(at, at + at_once)
            samples = sample[rows]
            eps = self._call(x_a[samples], batch.log_snr[samples], conditions[text[rows]])
            parts.append(eps)
            self.n_evals += len(samples)
        return torch.cat(parts).reshape(m, n_texts, *parts[0].shape[1:])

    def _call(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        model: Any = self._model
        if not (self._split and self._split.both):
            predicted: Tensor = model.predict_noise(x, log_snr, conditions)
            return predicted
        predicted, seconds = timed(model.device, lambda: model.predict_noise(x, log_snr, conditions))
        self._split.took(model.dtype, seconds / len(x))
        # float16 can overflow. Whatever takes the place of that, float32 corrects it.
        return predicted.nan_to_num(0.0, 0.0, 0.0) if model.dtype == self._split.levels.narrow else predicted

    def _add(self, batch: Draw, eps: Tensor, owner: Ints, factor: Floats, group: _Group) -> Floats:
        """Add m noise samples, times factor [m], to the replicates owner [m]. Returns what `_pass` does."""
        noise = batch.noise.to(eps.device)
        orthogonal, direct = contributions(eps, noise, group.context, group.text)
        self._check(orthogonal, direct)
        errors = squared_errors(eps, noise, batch.log_snr)[:, [group.context, group.text]].transpose(0, 2, 1)
        once = batch.weight.numpy()
        weight = factor * once
        n_bins = len(self._edges) - 1
        bins = np.searchsorted(self._edges, batch.log_snr.numpy(), side="right").clip(1, n_bins) - 1
        where = owner[:, None], np.array(group.columns)
        total = orthogonal.sum((2, 3))
        np.add.at(self._maps, where, weight[:, None, None, None] * orthogonal)
        np.add.at(self._direct, where, weight[:, None] * direct)
        np.add.at(self._timeline, (*where, bins[:, None]), weight[:, None] * total)
        which = owner[:, None, None], np.array(group.columns)[:, None], np.arange(2), bins[:, None, None]
        np.add.at(self._errors, which, weight[:, None, None] * errors)
        return np.asarray(once[:, None] * np.concatenate([total, direct], axis=1))

    def _check(self, *sums: Floats) -> None:
        """Raise a `NotFiniteError` if a batch's sums, which are on the CPU, are not finite."""
        if not all(np.isfinite(part).all() for part in sums):
            raise NotFiniteError("The noise predictor", getattr(self._model, "dtype", torch.float32))


def latents_at_once(model: NoisePredictor, n: int, conditions: Conditions) -> int:
    """How many of n latents fit into one call of the model under such conditions; n if the model cannot tell.

    A `Diffuser` splits a larger batch by itself, but a job could not yield between the parts.
    """
    fit = getattr(model, "latents_at_once", None)
    return n if fit is None else int(fit(n, conditions))


def noisy(x: Tensor, log_snr: Tensor, noise: Tensor) -> Tensor:
    """x_a [m, C, h, w], float32 on x's device, from clean latents x [C, h, w], log_snr [m] and noise [m, C, h, w]."""
    abar = torch.sigmoid(log_snr)[:, None, None, None]
    signal, spread = abar.sqrt().float().to(x.device), (1 - abar).sqrt().float().to(x.device)
    return signal * x + spread * noise.to(x.device)


@torch.no_grad()
def contributions(eps: Tensor, noise: Tensor, context: list[int], text: list[int]) -> tuple[Floats, Floats]:
    """Integrands in bits per unit of log-SNR: orthogonal [m, P, h, w] and direct [m, P].

    eps is [m, T, C, h, w]; comparison p is between the predictions `context[p]` and `text[p]`. The direct integrand is
    computed as a product, because the difference of two nearly equal squares loses digits.
    """
    e_c, e_y = eps[:, context], eps[:, text]
    difference = e_y - e_c
    orthogonal = difference.square().sum(2)
    direct = (difference * (2 * noise[:, None] - e_c - e_y)).sum((2, 3, 4))
    return _HALF_BIT * orthogonal.double().cpu().numpy(), _HALF_BIT * direct.double().cpu().numpy()


@torch.no_grad()
def squared_errors(eps: Tensor, noise: Tensor, log_snr: Tensor) -> Floats:
    """[m, T] squared errors of predictions [m, T, C, h, w] of noise [m, C, h, w], with a control variate.

    Where x_a holds little noise, the error of a prediction is about the noise itself, and varies with its length. The
    deviation of the squared length from its mean, times sigmoid(a)^2, is subtracted: it has mean 0, and for standard
    normal latents under antithetic noise it is all of the variance.
    """
    errors = (noise[:, None] - eps).square().sum((2, 3, 4)).double().cpu()
    deviation = noise.square().sum((1, 2, 3)).double().cpu() - noise[0].numel()
    return np.asarray((errors - (torch.sigmoid(log_snr) ** 2 * deviation)[:, None]).numpy())


class Cost(NamedTuple):
    """Cost of an estimate in U-Net evaluations of one latent. W words of one prompt take W + 1 texts."""

    pilot: int
    """To fit the density, once."""
    replicate: int
    """Per replicate."""


def cost(comparisons: Sequence[Comparison], sampler: Sampler) -> Cost:
    """Cost of estimating these comparisons."""
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
