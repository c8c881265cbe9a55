"""What can be done to concepts, and when and where in the picture."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from core.activations.hooks import ActivationKey
from core.concepts.trace import SaeSite
from core.diffusion.sampling import Branch
from core.diffusion.schedule import named_steps
from core.spec import Stage

RegionName = Literal["top-left", "top-right", "bottom-left", "bottom-right", "top", "bottom", "left", "right", "all"]
"""Quarters and halves of a picture, and all of it."""
Region = Any
"""One of `RegionName`; or a mask of the picture's size, [H, W], an array, a tensor or a picture: above 0 is inside."""
REGIONS: tuple[RegionName, ...] = get_args(RegionName)


class Target(NamedTuple):
    """A concept by its number, which means something at its place alone."""

    site: SaeSite
    """Hookpoint and branch of the SAE for all times."""
    number: int
    """Index of the latent."""


class Chosen(NamedTuple):
    """The n concepts of an edit at one place."""

    numbers: Tensor
    """[n] latents."""
    unit: Tensor
    """[n] what a strength of 1 adds."""
    of_word: bool
    """Whether that is what the word of a style does."""
    mean: Tensor
    """[n] mean value where active."""
    most: Tensor
    """[n] 99th percentile of the values where active."""
    threshold: Tensor
    """[n] value from which on a concept counts as there; 0: any."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptEdit:
    """What all edits share: which concepts, how strongly, when and where in the U-Net.

    Concepts are those that carry a label, wherever the edit acts, or those that are named one by one.
    """

    label: str | None = None
    """A label, or another word for it: every concept that carries it."""
    concepts: Sequence[Target | int] = ()
    """Concepts in place of a label. A bare number is of the edit's one hookpoint and branch."""
    strength: float = 1.0
    """0 is no edit. For what is raised, in units of each concept's mean value where it is active, or of what the word
    of a style does to it; for what is brought to a target, the share of the way there, at most all of it; for what is
    removed, how many times the way."""
    stage: str | None = None
    """`early`, `middle` or `late`, or all from one to another as `early to late`, in place of `steps`; by default what
    suits the edit best."""
    steps: tuple[int, int] | None = None
    """First and last sampler step of the edit, both included, from 0."""
    hookpoints: Sequence[str] | None = None
    """Cross-attention blocks; by default those that were measured to serve best. Concepts that are named one by one
    say themselves where they are."""
    branches: Sequence[Branch] | None = None
    """Halves of the guided batch; likewise."""

    default_stage: ClassVar[str] = "middle"
    """Where neither `stage` nor `steps` is given."""
    default_hookpoints: ClassVar[slice] = slice(1, 2)
    """Where no hookpoints are given: which of the model's, by measurement."""
    default_branches: ClassVar[tuple[Branch, ...]] = ("cond",)
    """Where no branches are given."""
    by_word: ClassVar[bool] = False
    """Whether a label whose word's effect was measured means the concepts that the word moves, each by as much as it
    does, rather than those that carry the label."""

    def change(self, z: Tensor, concepts: Chosen, inside: Tensor) -> Tensor:
        """The new values [..., P, n] of the chosen concepts.

        Args:
            z: Their values now, at P positions.
            concepts: What is known of them.
            inside: [P, 1] how much of each position lies in the edit's region.
        """
        raise NotImplementedError

    @property
    def where(self) -> Region:
        """The region that `change` is told of."""
        return "all"


@dataclass(frozen=True, eq=False, kw_only=True)
class SpatialEdit(ConceptEdit):
    """Raise concepts inside a region and silence them outside, which moves a thing or draws one there."""

    region: Region
    """Where the thing should be."""
    silence: bool = True
    """Whether concepts are silenced outside."""
    strength: float = 4.0
    """As for every edit; the default was chosen by measurement."""

    default_stage: ClassVar[str] = "early"

    def change(self, z: Tensor, concepts: Chosen, inside: Tensor) -> Tensor:
        """Add the strength inside, take the values away outside."""
        kept = 1 - min(self.strength, 1.0) * (1 - inside) if self.silence else 1
        return z * kept + self.strength * inside * concepts.unit

    @property
    def where(self) -> Region:
        """The region."""
        return self.region


@dataclass(frozen=True, eq=False, kw_only=True)
class GlobalEdit(ConceptEdit):
    """Raise concepts everywhere, which changes the look of the whole picture.

    A style is no concept that is there or not: its word raises or lowers hundreds of them a little. So for a style's
    label those are moved in the proportions in which its word moves them at one moment of a picture; a strength of 1 is
    what the word itself does there (`training.labels.effects`).
    """

    strength: float = 3.0
    """As for every edit; the default was chosen by measurement, for styles."""

    default_hookpoints: ClassVar[slice] = slice(1, None)
    by_word: ClassVar[bool] = True

    def change(self, z: Tensor, concepts: Chosen, inside: Tensor) -> Tensor:
        """Add the strength."""
        return z + self.strength * inside * concepts.unit


@dataclass(frozen=True, eq=False, kw_only=True)
class RemoveEdit(ConceptEdit):
    """Take a thing away: wherever one of its concepts is active, what the block adds is exchanged for what it adds
    beside the thing, in the same row of the picture.

    To silence the concepts is not enough, as the word reaches the picture through other blocks and through the skips
    too. Hence a strength above 1, which goes past what is beside the thing, and all steps: a thing that is taken away
    early is drawn again.

    A style is everywhere, with nothing beside it. For a style's label, what its word does is taken off, as `GlobalEdit`
    adds it.
    """

    region: Region = "all"
    """Where."""
    strength: float = 1.5
    """How many times the way from the thing to what is beside it; the default was chosen by measurement."""

    default_stage: ClassVar[str] = "early to late"
    default_hookpoints: ClassVar[slice] = slice(None)
    by_word: ClassVar[bool] = True

    def change(self, z: Tensor, concepts: Chosen, inside: Tensor) -> Tensor:
        """Take off what a style's word does."""
        return z - self.strength * inside * concepts.unit

    @property
    def where(self) -> Region:
        """The region."""
        return self.region


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplaceEdit(ConceptEdit):
    """Bring concepts to a value that data have, by default to silence; or exchange the patches where they are."""

    default_stage: ClassVar[str] = "early"
    default_hookpoints: ClassVar[slice] = slice(None)
    default_branches: ClassVar[tuple[Branch, ...]] = get_args(Branch)

    to: float = 0.0
    """The value to bring them to, in units of their mean where active; held at their 99th percentile."""
    patches: Mapping[ActivationKey, Tensor] | None = None
    """Updates of another run, such as one of `record`, over at least the same hookpoints, branches and steps: wherever
    one of the concepts is active, what the block adds is exchanged for what it added there."""
    region: Region = "all"
    """Where."""

    def change(self, z: Tensor, concepts: Chosen, inside: Tensor) -> Tensor:
        """Go the share `strength` of the way."""
        target = (self.to * concepts.mean).minimum(concepts.most)
        return z + min(self.strength, 1.0) * inside * (target - z)

    @property
    def where(self) -> Region:
        """The region."""
        return self.region


class RegionMask:
    """The region of an edit, on any grid.

    Raises:
        ValueError: No such region, an empty one, or one of another size than the picture.
    """

    def __init__(self, region: Region, size: int) -> None:
        self._mask = _named_mask(region, size) if isinstance(region, str) else _mask(region, size)
        self._grids: dict[tuple[int, int], Tensor] = {}

    def grid(self, height: int, width: int) -> Tensor:
        """[height x width, 1] share of each cell that lies inside: a region smaller than a cell is not lost."""
        if (height, width) not in self._grids:
            shares = F.adaptive_avg_pool2d(self._mask[None], (height, width))
            self._grids[height, width] = shares.flatten()[:, None]
        return self._grids[height, width]


def window_of(one: ConceptEdit, n_steps: int, stages: Sequence[Stage]) -> range:
    """The sampler steps at which an edit acts.

    Raises:
        ValueError: No such stage or one without steps, steps that the sampler does not have, or a stage and steps.
    """
    if one.steps is not None:
        if one.stage is not None:
            raise ValueError("An edit has either a stage or steps, not both.")
        try:
            first, last = map(operator.index, one.steps)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"An edit's steps are its first and its last, two whole numbers, not {one.steps!r}."
            ) from error
        if not 0 <= first <= last < n_steps:
            raise ValueError(
                f"The steps {first} to {last} are not a window of this sampler's, which are 0 to {n_steps - 1}."
            )
        return range(first, last + 1)
    name = one.default_stage if one.stage is None else one.stage
    window = named_steps(name, n_steps, stages)
    if not window:
        raise ValueError(f"With {n_steps} steps the {name} stage has none: take more, or name the edit's steps.")
    return window


def check_strength(one: ConceptEdit) -> None:
    """Refuse strengths that mean nothing.

    Raises:
        ValueError: A strength that is not finite, or below 0.
    """
    figures = {"strength": one.strength} | ({"to": one.to} if isinstance(one, ReplaceEdit) else {})
    for name, value in figures.items():
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"An edit's {name} is a finite number from 0 on, not {value}. To remove, use RemoveEdit.")


def _named_mask(name: str, size: int) -> Tensor:
    if name not in REGIONS:
        raise ValueError(f"A region is one of {', '.join(REGIONS)}, or a mask, not {name!r}.")
    mask, half = torch.ones(size, size), size // 2
    for side, outside in (
        ("top", (slice(half, None), slice(None))),
        ("bottom", (slice(None, half), slice(None))),
        ("left", (slice(None), slice(half, None))),
        ("right", (slice(None), slice(None, half))),
    ):
        if side in name.split("-"):
            mask[outside] = 0
    return mask


def _mask(region: Any, size: int) -> Tensor:
    array = region.detach().cpu().numpy() if isinstance(region, Tensor) else region
    if isinstance(array, Image.Image):
        array = array.convert("L")
    mask = torch.from_numpy(np.asarray(array) > 0).float()
    if mask.shape != (size, size):
        raise ValueError(f"A region has the picture's size, {size} x {size}, not {' x '.join(map(str, mask.shape))}.")
    if not mask.any():
        raise ValueError("The region is empty: mark some of the picture.")
    return mask
