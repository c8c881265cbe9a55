"""Where on the log-SNR line a model's words are hardest to measure, and what else could make their errors smaller.

On training scenes: from the first table comes the profile that a model's spec holds, `core.spec.ModelSpec`. The second
says, from the same samples, what it brings on a scene that had no part in it, and what would be brought by what
`core.information` does without: an allocation fitted to the very prompt, and control variates of known mean.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from core.arrays import Floats
from core.diffusion.diffuser import Diffuser
from core.information.attribution import choose_words, compare
from core.information.estimator import noisy
from core.information.quadrature import Sampler, draw
from training.benchmark.arithmetic import Indices, Interval, interval, resamples
from training.benchmark.prompts import Sample, scenes_with
from training.common.report import Cell, Table

log = logging.getLogger(__name__)

FLAT_SHARE = 0.4
"""Share of a profile that looks everywhere equally often: bounds what a scene unlike the others can lose, keeps the
direct estimate's error, which is spread more evenly, from growing, and leaves samples in every bin of a timeline."""
RUN = 64
"""Noise samples of a run, to which a pilot's are counted."""


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    lengths: tuple[int, ...] = (3, 6, 10)
    """Different words in a prompt."""
    n_prompts: int = 5
    """Prompts of each length."""
    n_pieces: int = 12
    """Pieces of the range, equally likely under the flat density."""
    n_noises: int = 8
    """Independent noises in each; half of them stand for a pilot."""
    batch_size: int = 32
    """Most latents in a U-Net call."""


QUICK = Settings(lengths=(3,), n_prompts=3, n_noises=4)
"""Shows that it works; its figures mean little."""


class Spread(NamedTuple):
    """What single noise samples of one prompt say, piece by piece; everything in shares of each word's map."""

    maps: Floats
    """[K, J, W, h, w] integrand in each of K pieces, J noises each, over the root of the sum of squares of the map."""
    longer: Floats
    """[K, J, h, w] how much longer than on average the noise is in a cell; of mean 0."""
    along: Floats
    """[K, J, W, h, w] the noise's product with what the word changes under other noises of the piece, in shares of that
    change's own length; of mean 0."""

    def variance(self, which: slice = slice(None)) -> Floats:
        """[K, W] variance of a sample's map, summed over cells."""
        return np.asarray(self.maps[:, which].var(1, ddof=1).sum((2, 3)))


def tables(model: Diffuser, settings: Settings) -> list[Table]:
    """The benchmark's part `density`."""
    spreads: list[Spread] = []
    for n_words in settings.lengths:
        for number, sample in enumerate(scenes_with(n_words, settings.n_prompts, "train")):
            log.info("density: %d words, prompt %d of %d", n_words, number + 1, settings.n_prompts)
            spreads.append(measure(model, sample, settings, len(spreads)))
    drawn = resamples(np.repeat(settings.lengths, settings.n_prompts))
    note = (
        f"{len(spreads)} training scenes, {settings.n_prompts} each of captions of "
        f"{', '.join(map(str, settings.lengths))} different words, every word given the rest; {settings.n_noises} "
        f"independent noises in each of {settings.n_pieces} pieces. In brackets: 95 % bootstrap intervals over scenes."
    )
    return [_profile_table(model, spreads, drawn, settings, note), _variance_table(spreads, drawn, settings, note)]


@torch.no_grad()
def measure(model: Diffuser, sample: Sample, settings: Settings, seed: int) -> Spread:
    """One prompt's words under `n_noises` noises in each piece."""
    comparisons = compare(sample.prompt, choose_words(sample.prompt, None), "rest")
    texts = [sample.prompt, *(comparison.context for comparison in comparisons)]
    sampler = Sampler(n_points=settings.n_pieces * settings.n_noises, antithetic=False)
    samples = draw(sampler, sampler.density(model.schedule.log_snr_range), model.latent_shape, (seed, 0))
    x_a = noisy(model.encode(sample.image)[0], samples.log_snr, samples.noise)
    conditions = model.encode_text(texts)
    parts = []
    stride = max(1, settings.batch_size // len(texts))
    with model.busy():
        for at in range(0, len(x_a), stride):
            rows = slice(at, at + stride)
            x, a, n = x_a[rows], samples.log_snr[rows], len(x_a[rows])
            x, a = x.repeat_interleave(len(texts), 0), a.repeat_interleave(len(texts))
            eps = model.predict_noise(x, a, conditions.repeat(n))
            eps = eps.reshape(n, len(texts), *eps.shape[1:]).cpu()
            parts.append((eps[:, :1] - eps[:, 1:]).double().numpy())
    shape = settings.n_pieces, settings.n_noises
    apart = np.concatenate(parts)
    noise = samples.noise.double().numpy()
    return spread_of(apart.reshape(*shape, *apart.shape[1:]), noise.reshape(*shape, *noise.shape[1:]))


def spread_of(apart: Floats, noise: Floats) -> Spread:
    """From what words change in the prediction [K, J, W, C, h, w] under noises [K, J, C, h, w]."""
    maps = (apart**2).sum(3)
    length = np.sqrt((maps.mean((0, 1)) ** 2).sum((1, 2)))
    n = apart.shape[1]
    others = (apart.sum(1, keepdims=True) - apart) / (n - 1)
    along = (others * noise[:, :, None]).sum(3)
    return Spread(maps / length[:, None, None], (noise**2).sum(2) - noise.shape[2], along)


def profile_of(spreads: Sequence[Spread], flat_share: float = FLAT_SHARE) -> Floats:
    """[K] how often to look into each piece, 1 on average: in part everywhere, in part where maps vary most.

    The best density is in proportion to the root of the mean of the words' variances (Owen 2013, ch. 9), averaged here
    over prompts.
    """
    roots = [np.sqrt(spread.variance().mean(1)) for spread in spreads]
    followed = np.mean([root / root.mean() for root in roots], axis=0)
    return np.asarray(flat_share + (1 - flat_share) * followed)


def error(variance: Floats, profile: Floats | float = 1.0) -> float:
    """Relative error of a map by one sample, mean over words, from [K, W], looking into pieces as often as that."""
    return float(np.sqrt((variance / np.broadcast_to(profile, len(variance))[:, None]).mean(0)).mean())


def controlled(spread: Spread, control: Floats) -> float:
    """How much smaller a control variate [K, J, W, h, w] of mean 0 makes the evaluations for the same error.

    Its coefficient, one a piece and word, is fitted on half of the noises and used on the other half, in turn.
    """
    half = control.shape[1] // 2
    left, whole = np.zeros(spread.maps.shape[::2][:2]), np.zeros(spread.maps.shape[::2][:2])
    for fit, use in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        maps, known = spread.maps[:, fit], control[:, fit]
        top = ((maps - maps.mean(1, keepdims=True)) * known).sum((1, 3, 4))
        coefficient = np.divide(top, (known**2).sum((1, 3, 4)))
        used = spread.maps[:, use] - coefficient[:, None, :, None, None] * control[:, use]
        left += used.var(1, ddof=1).sum((2, 3)) / 2
        whole += spread.maps[:, use].var(1, ddof=1).sum((2, 3)) / 2
    return (error(whole) / error(left)) ** 2


def _profile_table(model: Diffuser, spreads: Sequence[Spread], drawn: Indices, settings: Settings, note: str) -> Table:
    density = Sampler().density(model.schedule.log_snr_range)
    edges = density.quantile(np.linspace(0, 1, settings.n_pieces + 1))
    roots = np.array([np.sqrt(spread.variance().mean(1)) for spread in spreads])
    roots /= roots.mean(1, keepdims=True)
    profile = [round(float(weight), 2) for weight in profile_of(spreads)]
    rows: list[dict[str, Cell]] = []
    for piece, (low, high) in enumerate(pairwise(edges)):
        spread = interval(float(roots[:, piece].mean()), roots[drawn, piece].mean(1))
        rows.append(
            {"log-SNR": f"{low:.1f} to {high:.1f}", "spread of a sample": str(spread), "profile": profile[piece]}
        )
    notes = (
        "Spread: root of the variance of a single sample's map, mean over words, 1 on average over the pieces. "
        f"Profile: {FLAT_SHARE:.0%} of it flat, the rest as the spread. In the spec: log_snr_profile={tuple(profile)}.",
        note,
    )
    details = {"settings": asdict(settings), "profile": profile}
    return Table("profile", "Where a model's words are hardest to measure", rows, notes, details)


def _variance_table(spreads: Sequence[Spread], drawn: Indices, settings: Settings, note: str) -> Table:
    half = settings.n_noises // 2
    pilot, rest = slice(half), slice(half, None)
    least = np.array([len(spread.maps) * half for spread in spreads])
    own, shared = [], []
    for i, spread in enumerate(spreads):
        others = [*spreads[:i], *spreads[i + 1 :]]
        fitted = profile_of([spread._replace(maps=spread.maps[:, pilot])])
        flat = error(spread.variance(rest))
        shared.append((flat / error(spread.variance(rest), profile_of(others))) ** 2)
        own.append((flat / error(spread.variance(rest), fitted)) ** 2)
    gains = {
        "a profile of other scenes (the default)": np.array(shared),
        "Neyman allocation after a pilot, the pilot free": np.array(own),
        f"the same, a pilot of {least[0]} counted to a run of {RUN}": np.array(own) * RUN / (RUN + least),
        "control variate: length of the noise in the cell": np.array(
            [controlled(s, s.longer[:, :, None] * s.maps.mean((0, 1))) for s in spreads]
        ),
        "control variate: length of the whole noise": np.array(
            [controlled(s, s.longer.mean((2, 3))[:, :, None, None, None] * s.maps.mean((0, 1))) for s in spreads]
        ),
        "control variate: the noise along what other noises show": np.array(
            [controlled(s, s.along * np.sqrt(s.maps.mean((0, 1)))) for s in spreads]
        ),
    }
    rows: list[dict[str, Cell]] = [
        {"instead of a flat density over strata": name, "times fewer evaluations": str(_mean(gain, drawn))}
        for name, gain in gains.items()
    ]
    notes = (
        "Evaluations for the same relative error of maps, mean over words, within strata of log-SNR. A profile is "
        "fitted to all other scenes, or to half of the very scene's noises and judged by the other half. A control "
        "variate's coefficient, one a piece and word, comes from half of the noises and is used on the other half.",
        note,
    )
    return Table("variance", "What could make the errors smaller", rows, notes)


def _mean(values: Floats, drawn: Indices) -> Interval:
    return interval(float(values.mean()), values[drawn].mean(1))
