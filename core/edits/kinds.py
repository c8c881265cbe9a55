"""The kinds of edits. A new one derives from `LatentEdit` or `PatchEdit`; nothing else in `core.edits` knows of it.

The formulas are in the docstring of `core.edits`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from core.activations.hooks import ActivationKey
from core.diffusion.diffuser import Diffuser, Edit
from core.diffusion.sampling import Branch
from core.edits.base import BaseEdit, Change, EditContext, SelectedLatents, check_strength
from core.edits.editor import load_editor
from core.edits.regions import Region
from core.spec import HookpointRange

_MARGIN = 16
"""A removed object takes an edge with it as wide as the image's side divided by this, in whole positions."""


class ConceptEdit(BaseEdit):
    """An edit by concepts, as `model.generate(edits=...)` takes it; the model's own SAEs and tables are used."""

    def bind(self, model: Diffuser, edits: Sequence[Edit], n_steps: int) -> AbstractContextManager[object]:
        """A context for one run of the sampler with all `edits` of that run, which share one encoding at each site.

        Raises:
            ArtifactError: The model has no SAEs or concept tables.
            TypeError: One of the edits is not by concepts.
            ValueError: An edit that cannot be applied, as for `Editor.editing`.
        """
        ours = [one for one in edits if isinstance(one, ConceptEdit)]
        if len(ours) < len(edits):
            raise TypeError("Edits by concepts cannot be combined with other edits in one run.")
        return load_editor(model).editing(ours, n_steps)


class LatentEdit(ConceptEdit):
    """An edit that changes the values of latents: x + (z_new - z) @ W_dec."""

    def change(self, z: Tensor, context: EditContext) -> Tensor:
        """The new values z_new [B, P, n] of the selected latents, from their values z."""
        raise NotImplementedError

    def apply(self, x: Tensor, z: Tensor, context: EditContext) -> Change:  # noqa: ARG002
        """Change the latents and leave the update alone."""
        return Change(x=None, z=self.change(z, context))


class PatchEdit(ConceptEdit):
    """An edit that exchanges updates where a concept is present (activation patching): x + mask * (other - x)."""

    def present(self, z: Tensor, latents: SelectedLatents) -> Tensor:  # noqa: ARG002
        """[B, P] bool where one of the selected latents counts as present."""
        return (z > 0).any(-1)

    def patch(self, x: Tensor, mask: Tensor, context: EditContext) -> Tensor:
        """The new updates [B, h, w, C], from x and a mask [B, h, w, 1] bool of where the concepts are present."""
        raise NotImplementedError

    def apply(self, x: Tensor, z: Tensor, context: EditContext) -> Change:
        """Patch the update and leave the latents alone."""
        mask = self.present(z, context.latents).view(-1, *context.grid, 1)
        return Change(x=self.patch(x, mask.to(x.device), context), z=None)


@dataclass(frozen=True, eq=False, kw_only=True)
class SpatialEdit(LatentEdit):
    """Raise concepts inside a region and silence them outside: places an object, or moves it."""

    region: Region
    """Where the object should be."""
    silence: bool = True
    """Whether the concepts are silenced outside."""
    strength: float = 4.0
    """In units of each concept's mean value where active; the default was chosen by measurement."""

    default_stage: ClassVar[str] = "early"

    def change(self, z: Tensor, context: EditContext) -> Tensor:
        """Add `strength` means inside, scale the values down outside."""
        inside = context.inside
        kept = 1 - min(self.strength, 1.0) * (1 - inside) if self.silence else 1
        return z * kept + self.strength * inside * context.latents.unit

    @property
    def active_region(self) -> Region:
        """The target region."""
        return self.region


@dataclass(frozen=True, eq=False, kw_only=True)
class GlobalEdit(LatentEdit):
    """Raise concepts everywhere: changes the style of the whole image.

    A style is not one latent: its word raises or lowers hundreds of them a little. For a style's label those latents
    are moved in the proportions in which the word moves them at one step (`training.labels.effects`), and a strength of
    1 is the effect of the word itself.
    """

    strength: float = 3.0
    """As for every edit that adds; the default was chosen by measurement, for styles."""

    default_hookpoints: ClassVar[HookpointRange] = "from bottleneck"
    uses_word_effects: ClassVar[bool] = True

    def change(self, z: Tensor, context: EditContext) -> Tensor:
        """Add `strength` units."""
        return z + self.strength * context.inside * context.latents.unit


@dataclass(frozen=True, eq=False, kw_only=True)
class RemoveEdit(LatentEdit, PatchEdit):
    """Remove an object: where its concepts are active, the update is patched with the mean update around the object,
    taken from the same row of the image.

    Silencing the concepts is not enough, because the word also acts through other blocks and the skip connections.
    Hence the default strength above 1, which extrapolates past the surroundings, and all stages: an object that is
    removed early only is drawn again later.

    A style is everywhere and has no surroundings. For a style's label the effect of its word is subtracted, the
    opposite of `GlobalEdit`.
    """

    region: Region = "all"
    """Where to remove."""
    strength: float = 1.5
    """Multiple of the way from the object to its surroundings; the default was chosen by measurement."""

    default_stage: ClassVar[str] = "early to late"
    default_hookpoints: ClassVar[HookpointRange] = "all"
    uses_word_effects: ClassVar[bool] = True

    def apply(self, x: Tensor, z: Tensor, context: EditContext) -> Change:
        """Change latents for a style, patch for anything else."""
        kind = LatentEdit if context.latents.is_word_effect else PatchEdit
        return kind.apply(self, x, z, context)

    def change(self, z: Tensor, context: EditContext) -> Tensor:
        """Subtract the effect of a style's word."""
        return z - self.strength * context.inside * context.latents.unit

    def patch(self, x: Tensor, mask: Tensor, context: EditContext) -> Tensor:
        """Patch with the mean of the row outside the mask, or of the whole image where a row has nothing outside."""
        height, width = context.grid
        # The cells around an object carry some of it; those of a coarse grid contain that edge already.
        reach = height // _MARGIN
        there = F.max_pool2d(mask[..., 0].float(), 2 * reach + 1, 1, reach)[..., None]
        outside = 1 - there
        n_outside = outside.sum(2)  # [B, h, 1]
        of_image = (x * outside).sum((1, 2)) / outside.sum((1, 2)).clamp_min(1)
        of_row = (x * outside).sum(2) / n_outside.clamp_min(1)
        of_row = torch.where(n_outside > 0, of_row, of_image[:, None])
        weight = self.strength * context.inside.view(height, width, 1).to(x.device) * there
        weight = weight * outside.amax((1, 2), keepdim=True)  # an object that fills the image has no surroundings
        return x + weight * (of_row[:, :, None] - x)

    @property
    def active_region(self) -> Region:
        """The region to remove from."""
        return self.region


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplaceEdit(LatentEdit, PatchEdit):
    """Set concepts to a value, 0 by default; or patch the updates of another run in where the concepts are present."""

    default_stage: ClassVar[str] = "early"
    default_hookpoints: ClassVar[HookpointRange] = "all"
    default_branches: ClassVar[tuple[Branch, ...]] = get_args(Branch)

    to: float = 0.0
    """The value to set, in units of each concept's mean where active; clipped to its 99th percentile."""
    patches: Mapping[ActivationKey, Tensor] | None = None
    """Updates of another run, as from `record`, with at least the same hookpoints, branches and steps. Where a concept
    is present, the update is exchanged for the other run's."""
    region: Region = "all"
    """Where to replace."""

    def check(self) -> None:
        """As for every edit; the target value is checked like a strength."""
        super().check()
        check_strength(self.to, "to")

    def apply(self, x: Tensor, z: Tensor, context: EditContext) -> Change:
        """Patch where there are patches, change latents otherwise."""
        kind = LatentEdit if self.patches is None else PatchEdit
        return kind.apply(self, x, z, context)

    def change(self, z: Tensor, context: EditContext) -> Tensor:
        """Go the share `strength` of the way to the target."""
        target = (self.to * context.latents.mean).minimum(context.latents.p99)
        return z + min(self.strength, 1.0) * context.inside * (target - z)

    def present(self, z: Tensor, latents: SelectedLatents) -> Tensor:
        """[B, P] bool where one of the selected latents reaches its threshold."""
        return ((z > 0) & (z >= latents.threshold)).any(-1)

    def patch(self, x: Tensor, mask: Tensor, context: EditContext) -> Tensor:
        """Go the share `strength` of the way to the other run's update."""
        if self.patches is None or context.key not in self.patches:
            raise ValueError(
                f"The patches have no update for {tuple(context.key)}: record the other run with the same steps."
            )
        other = self.patches[context.key].float().movedim(1, -1).to(x.device)
        weight = min(self.strength, 1.0) * context.inside.view(*context.grid, 1).to(x.device) * mask
        return x + weight * (other - x)

    @property
    def active_region(self) -> Region:
        """The region to replace in."""
        return self.region
