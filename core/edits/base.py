"""What every edit has: which concepts it acts on, how strongly, when, and where in the U-Net and the image."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from core.activations.hooks import ActivationKey
from core.concepts.trace import SaeSite
from core.diffusion.sampling import Branch
from core.diffusion.schedule import named_steps
from core.edits.regions import Region
from core.spec import HookpointRange, Stage


class Target(NamedTuple):
    """One latent of one SAE."""

    site: SaeSite
    """Hookpoint and branch of an SAE for all times."""
    number: int
    """Index of the latent."""


class SelectedLatents(NamedTuple):
    """The n latents of one SAE that an edit acts on."""

    numbers: Tensor
    """[n] indices of the latents."""
    unit: Tensor
    """[n] what a strength of 1 adds: the mean value where active, or the effect of a style word."""
    is_word_effect: bool
    """Whether `unit` is the measured effect of a style word."""
    mean: Tensor
    """[n] mean value where active."""
    p99: Tensor
    """[n] 99th percentile of the values where active."""
    threshold: Tensor
    """[n] value from which a latent counts as present; 0: any value above 0."""


class EditContext(NamedTuple):
    """Where an edit acts in one call of the U-Net."""

    key: ActivationKey
    """Hookpoint, branch and step."""
    grid: tuple[int, int]
    """(h, w) of the hookpoint, P = h x w positions."""
    latents: SelectedLatents
    """What is edited there."""
    inside: Tensor
    """[P, 1] share of each position that lies in the edit's region."""


class Change(NamedTuple):
    """What an edit makes of an update and its code; None: left as it is."""

    x: Tensor | None
    """[B, h, w, C] the new update."""
    z: Tensor | None
    """[B, P, n] the new values of the selected latents."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseEdit:
    """The settings that all edits share. Concepts are given by a label, or one by one."""

    label: str | None = None
    """A label, or a synonym of it: every concept that has the label, wherever the edit acts."""
    concepts: Sequence[Target | int] = ()
    """Concepts instead of a label. A bare number belongs to the edit's only hookpoint and branch."""
    strength: float = 1.0
    """0 leaves the image unchanged to the bit. The unit depends on the kind of edit: a concept's mean value where it is
    active, or the effect of a style word, for edits that add; the share of the way to a target, at most 1, for edits
    that replace; a multiple of the way to the surroundings for edits that remove."""
    stage: str | None = None
    """`early`, `middle`, `late`, or a range such as `early to late`; None: what was measured to work best."""
    steps: tuple[int, int] | None = None
    """First and last sampler step, both included, from 0; instead of a stage."""
    hookpoints: Sequence[str] | None = None
    """Cross-attention blocks to edit; None: those that were measured to work best. `Target`s carry their own."""
    branches: Sequence[Branch] | None = None
    """Branches of classifier-free guidance to edit; None: those that were measured to work best."""

    default_stage: ClassVar[str] = "middle"
    """The stage where neither `stage` nor `steps` is given."""
    default_hookpoints: ClassVar[HookpointRange] = "bottleneck"
    """The hookpoints where none are given, as `ModelSpec.edit_hookpoints` takes them."""
    default_branches: ClassVar[tuple[Branch, ...]] = ("cond",)
    """The branches where none are given."""
    uses_word_effects: ClassVar[bool] = False
    """Whether a style's label selects the latents that its word moves, each as much as the word does, and not those
    that have the label."""

    def apply(self, x: Tensor, z: Tensor, context: EditContext) -> Change:
        """What the edit does to updates x [B, h, w, C] and the values z [B, P, n] of the selected latents in them."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise a `ValueError` for settings that mean nothing."""
        check_strength(self.strength)

    @property
    def active_region(self) -> Region:
        """The region of the image in which the edit acts."""
        return "all"


def window_of(one: BaseEdit, n_steps: int, stages: Sequence[Stage]) -> range:
    """The sampler steps at which an edit acts.

    Raises:
        ValueError: No such stage or one without steps, steps that the sampler does not have, or both a stage and steps.
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
                f"Steps {first} to {last} are not a window of this sampler, which has steps 0 to {n_steps - 1}."
            )
        return range(first, last + 1)
    name = one.default_stage if one.stage is None else one.stage
    window = named_steps(name, n_steps, stages)
    if not window:
        raise ValueError(f"With {n_steps} steps the {name} stage has none: use more steps, or give the edit's steps.")
    return window


def check_strength(value: float, name: str = "strength") -> None:
    """Raise a `ValueError` for a strength that is negative or not finite."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"An edit's {name} is a finite number, at least 0, not {value}. To remove, use RemoveEdit.")
