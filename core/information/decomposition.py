"""What `decompose` returns, and the arithmetic from replicates to it. Numbers only: imports no torch.

With i1 and i2 what two words tell alone and i12 what they tell together, redundancy R splits them (design of Williams &
Beer 2010, pointwise as in Finn & Lizier 2018): U1 = i1 - R, U2 = i2 - R, S = i12 - i1 - i2 + R.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from core.arrays import Floats
from core.information.results import Given, Measurement, mean_and_stderr


class Total(NamedTuple):
    """Bits in the whole picture."""

    bits: float
    stderr: float
    """Standard error over replicates."""


class Part(NamedTuple):
    """Bits in the whole picture, and where in it."""

    bits: float
    """The map's sum."""
    stderr: float
    """Its standard error over replicates."""
    map: Floats
    """[h, w] bits a latent cell."""
    map_stderr: Floats
    """[h, w] standard error of each cell. Too small, by up to a third, where what two cells of a redundancy say lies
    within their errors of each other: which of them is smaller is then not known."""


class BySurprisal(NamedTuple):
    """The other split, of totals alone: redundancy as the bits of the likelier word that are known from either.

    R = min h - min (h - i) of surprisals h and direct bits i (Dewan et al. 2024, arXiv 2406.05191; without their maps,
    which mix a word's probability with a cell's bits). Unique and synergy can be negative.
    """

    redundancy: Total
    unique: tuple[Total, Total]
    synergy: Total
    surprisals: tuple[float, float]
    """h of each word in bits, as given."""
    exceeded: tuple[bool, bool]
    """Whether a word tells more bits than its surprisal has, by over two standard errors: guided pictures and poor
    denoisers can bring that about, and the split means little then."""


class PairInformation(NamedTuple):
    """What two words tell a picture, in parts. Redundancy, the two unique parts and synergy add up to `together`."""

    words: tuple[str, str]
    redundancy: Part
    """Told by either word: the smaller of what the two tell each cell, with the bias of a minimum of noisy means
    removed by the jackknife."""
    unique: tuple[Part, Part]
    """Told by one word and not by the other. A cell can be negative by the estimate's error."""
    synergy: Part
    """Told only by both together; negative where they tell less than each alone would make expect."""
    alone: tuple[Part, Part]
    """Orthogonal bits of each word by itself."""
    together: Part
    """Orthogonal bits of both."""
    coinformation: Total
    """Redundancy less synergy, i1 + i2 - i12, by the direct estimate. Of words that the picture determines it is
    log p(both) / p(one) p(other), whatever redundancy is taken to be."""
    by_surprisal: BySurprisal | None
    """None where no surprisals were given."""

    @property
    def parts(self) -> tuple[Part, Part, Part, Part]:
        """Redundancy, unique of the first and of the second, synergy."""
        return self.redundancy, *self.unique, self.synergy


@dataclass(frozen=True, eq=False, kw_only=True)
class Decomposition(Measurement):
    """What words tell a picture together, pair by pair. All arrays are float64.

    `rel_error` is that of the worst part of the worst pair: its standard error over what the pair tells together (over
    a tenth of what the best pair does, for lesser ones).
    """

    words: tuple[str, ...]
    """The W words, lower case, as asked for."""
    pairs: tuple[PairInformation, ...]
    """All W (W - 1) / 2 pairs, in the words' order."""
    prompt: str
    """The prompt as typed."""
    given: Given
    """What a pair's bits are given: the `rest` of the prompt without the two, or `nothing`."""

    def pair(self, first: str, second: str) -> PairInformation:
        """The pair of two of the words, in whichever order.

        Raises:
            ValueError: It was not measured.
        """
        for pair in self.pairs:
            if set(pair.words) == {first.lower(), second.lower()}:
                return pair
        raise ValueError(f"There is no pair of {first!r} and {second!r}; the words are {', '.join(self.words)}.")

    @property
    def redundancy(self) -> Part:
        """Of the only pair."""
        return self._only.redundancy

    @property
    def unique(self) -> tuple[Part, Part]:
        """Of the only pair, first word first."""
        return self._only.unique

    @property
    def synergy(self) -> Part:
        """Of the only pair."""
        return self._only.synergy

    @property
    def _only(self) -> PairInformation:
        if len(self.pairs) > 1:
            raise ValueError(
                f"There are {len(self.pairs)} pairs; ask for one: .pair({', '.join(map(repr, self.words[:2]))})."
            )
        return self.pairs[0]


class Replicates(NamedTuple):
    """R replicates of what a pair of words tells."""

    maps: tuple[Floats, Floats, Floats]
    """[R, h, w] orthogonal bits of the first word, of the second, of both."""
    direct: tuple[Floats, Floats, Floats]
    """[R] direct bits of the same."""


def split(
    words: tuple[str, str], replicates: Replicates, surprisals: tuple[float, float] | None = None
) -> PairInformation:
    """The parts of a pair, replicate by replicate, so that every error knows what varies together."""
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
    """Totals from direct bits [R] of the first word, of the second, of both."""
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
    """[R, ...] values whose mean is the smaller of two means over replicates, and their spread its error.

    The smaller of two noisy means is too small on average, the more the closer they are. These are the pseudo-values of
    the jackknife (Efron & Tibshirani 1993, ch. 11), whose mean lacks that bias but for half of it where the two are
    equal; a little is added where they lie one or two errors apart.
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
