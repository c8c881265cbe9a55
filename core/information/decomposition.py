"""The result of `decompose`, and its computation from replicates. Imports no torch.

Partial information decomposition (Williams & Beer 2010; pointwise, Finn & Lizier 2018): of two words with information
i1 and i2 each and i12 together, redundancy R gives the unique parts U1 = i1 - R and U2 = i2 - R, and the synergy S =
i12 - i1 - i2 + R.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from core.arrays import Floats
from core.diffusion.text import plain
from core.information.results import Given, Measurement, mean_and_stderr


class Total(NamedTuple):
    """Bits of the whole image."""

    bits: float
    """The estimate."""
    stderr: float
    """Its standard error over replicates."""


class Part(NamedTuple):
    """Bits of the whole image, and their map."""

    bits: float
    """The sum of the map."""
    stderr: float
    """Its standard error over replicates."""
    map: Floats
    """[h, w] bits per latent cell."""
    map_stderr: Floats
    """[h, w] standard error of each cell. In a map of redundancy it is up to a third too small where the bits of the
    two words do not differ significantly, so that it is not known which of them is smaller."""


class BySurprisal(NamedTuple):
    """The decomposition of Dewan et al. 2024 (arXiv 2406.05191), of totals: R = min h - min (h - i).

    h are surprisals and i direct bits. Their maps are left out, since they mix a word's probability with the bits of a
    cell. Unique parts and synergy can be negative.
    """

    redundancy: Total
    unique: tuple[Total, Total]
    synergy: Total
    surprisals: tuple[float, float]
    """Surprisal of each word in bits, as given."""
    exceeded: tuple[bool, bool]
    """Whether a word has more direct bits than surprisal, by over two standard errors. This happens with guided images
    and poor denoisers, and the decomposition means little then."""


class PairInformation(NamedTuple):
    """Decomposed information of two words. Redundancy, both unique parts and synergy add up to `together`."""

    words: tuple[str, str]
    redundancy: Part
    """Information that either word has: the minimum of both in each cell. The jackknife removes the bias of a minimum
    of noisy means."""
    unique: tuple[Part, Part]
    """Information of one word that the other lacks. A cell can be negative by its error."""
    synergy: Part
    """Information of both words together only; negative where they have less than the sum of the other parts."""
    alone: tuple[Part, Part]
    """Orthogonal bits of each word alone."""
    together: Part
    """Orthogonal bits of both words."""
    coinformation: Total
    """Redundancy minus synergy, i1 + i2 - i12, from direct bits; does not depend on the definition of redundancy. For
    words that the image determines, it is log2 p(both) / (p(one) p(other))."""
    by_surprisal: BySurprisal | None
    """The decomposition by surprisal; None where no surprisals were given."""

    @property
    def parts(self) -> tuple[Part, Part, Part, Part]:
        """Redundancy, unique information of the first and of the second word, synergy."""
        return self.redundancy, *self.unique, self.synergy


@dataclass(frozen=True, eq=False, kw_only=True)
class Decomposition(Measurement):
    """Decomposed information of pairs of words. All arrays are float64.

    `rel_error` is the largest standard error of a part over the bits of its pair together, or over a tenth of those of
    the largest pair if that is more.
    """

    words: tuple[str, ...]
    """The W words, lower case, in the order given."""
    pairs: tuple[PairInformation, ...]
    """All W (W - 1) / 2 pairs, in the order of the words."""
    prompt: str
    """The prompt as typed."""
    given: Given
    """The condition of a pair's bits: the `rest` of the prompt without the two, or `nothing`."""

    def pair(self, first: str, second: str) -> PairInformation:
        """The pair of two of the words, in either order.

        Raises:
            ValueError: It was not measured.
        """
        for pair in self.pairs:
            if set(pair.words) == {plain(first), plain(second)}:
                return pair
        raise ValueError(f"There is no pair of {first!r} and {second!r}; the words are {', '.join(self.words)}.")

    @property
    def redundancy(self) -> Part:
        """Redundancy of the only pair."""
        return self._only.redundancy

    @property
    def unique(self) -> tuple[Part, Part]:
        """Unique information of the only pair, first word first."""
        return self._only.unique

    @property
    def synergy(self) -> Part:
        """Synergy of the only pair."""
        return self._only.synergy

    @property
    def _only(self) -> PairInformation:
        if len(self.pairs) > 1:
            raise ValueError(
                f"There are {len(self.pairs)} pairs; ask for one: .pair({', '.join(map(repr, self.words[:2]))})."
            )
        return self.pairs[0]


class Replicates(NamedTuple):
    """R replicates of the information of a pair of words."""

    maps: tuple[Floats, Floats, Floats]
    """[R, h, w] orthogonal bits of the first word, of the second, of both."""
    direct: tuple[Floats, Floats, Floats]
    """[R] direct bits of the first word, of the second, of both."""


def split(
    words: tuple[str, str], replicates: Replicates, surprisals: tuple[float, float] | None = None
) -> PairInformation:
    """The decomposition of a pair. Parts are computed by replicate, so that their errors include all covariances."""
    (first, second, both), direct = replicates.maps, replicates.direct
    redundant = smaller_of_means(first, second)
    return PairInformation(
        words=words,
        redundancy=_part(redundant),
        unique=(_part(first - redundant), _part(second - redundant)),
        synergy=_part(both - first - second + redundant),
        alone=(_part(first), _part(second)),
        together=_part(both),
        coinformation=_total(direct[0] + direct[1] - direct[2]),
        by_surprisal=None if surprisals is None else split_by_surprisal(direct, surprisals),
    )


def split_by_surprisal(direct: tuple[Floats, Floats, Floats], surprisals: tuple[float, float]) -> BySurprisal:
    """Decompose by surprisal, from direct bits [R] of the first word, of the second, of both."""
    first, second, both = direct
    left = smaller_of_means(surprisals[0] - first, surprisals[1] - second)
    redundant = min(surprisals) - left
    return BySurprisal(
        redundancy=_total(redundant),
        unique=(_total(first - redundant), _total(second - redundant)),
        synergy=_total(both - first - second + redundant),
        surprisals=surprisals,
        exceeded=(_exceeds(first, surprisals[0]), _exceeds(second, surprisals[1])),
    )


def _exceeds(direct: Floats, surprisal: float) -> bool:
    bits, stderr = _total(direct)
    return bits - 2 * stderr > surprisal


def smaller_of_means(first: Floats, second: Floats) -> Floats:
    """[R, ...] pseudo-values whose mean estimates the smaller of two means, and whose spread its error.

    The minimum of two noisy means is biased downwards, the more the closer they are. The jackknife (Efron & Tibshirani
    1993, ch. 11) removes the bias, but for half of it where the means are equal; it overcorrects slightly where they
    are one or two errors apart.
    """
    n = len(first)
    whole = np.minimum(first.mean(0), second.mean(0))
    without = np.minimum(*((values.sum(0) - values) / (n - 1) for values in (first, second)))
    return np.asarray(n * whole - (n - 1) * without)


def _part(replicates: Floats) -> Part:
    bits, stderr = mean_and_stderr(replicates.sum((1, 2)))
    return Part(float(bits), float(stderr), *mean_and_stderr(replicates))


def _total(replicates: Floats) -> Total:
    bits, stderr = mean_and_stderr(replicates)
    return Total(float(bits), float(stderr))
