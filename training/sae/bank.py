"""Many SAEs trained on one stream: their configuration, their joint loss, and their training statistics.

The SAEs share a forward call and an optimiser step, but no parameter or statistic: each learns as it would alone.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.sae.autoencoder import Architecture, SaeConfig, SaeId, SparseAutoencoder


@dataclass(frozen=True)
class TrainerConfig:
    """How SAEs are shaped and trained."""

    n_steps: int
    """Optimiser steps."""
    gradient_accumulation_steps: int = 1
    """Batches of the stream in one step."""
    k: int = 20
    """Active latents per position."""
    k_by_hookpoint: dict[str, int] = field(default_factory=dict)
    """k of hookpoints where it differs, by name, such as narrow ones."""
    expansion: int = 4
    """d_sae / d_in."""
    architecture: Architecture = "topk"
    """`topk` or `batchtopk`."""
    learning_rate: float = 3e-4
    """Peak learning rate of Adam, after the warm-up and before the decay."""
    n_warmup: int = 100
    """Steps of linear warm-up."""
    lr_decay_fraction: float = 0.2
    """Fraction of the steps, at the end, over which the learning rate falls linearly to zero."""
    k_aux: int = 256
    """Most dead latents that reconstruct the residual at a time (AuxK); never more than d_in / 2."""
    aux_weight: float = 1 / 32
    """Weight of the AuxK loss; 0 turns it off."""
    dead_after_fraction: float = 0.05
    """Fraction of the stream without firing after which a latent counts as dead."""
    n_calibration_batches: int = 4
    """First batches on which scale, mean and total variance of the inputs are measured; they are trained on too."""
    sync_every: int = 20
    """Steps between synchronisations with the device: processes reduce their counters, dead latents are updated, NaN is
    checked for, a line is logged, and a checkpoint may be written."""
    precision: str = "bf16"
    """`bf16`: products in bfloat16, weights and optimiser state in float32; `fp16`: the same in float16, with loss
    scaling, for GPUs without bfloat16; `no`: everything in float32."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        sizes = {
            name: getattr(self, name) for name in ("n_steps", "gradient_accumulation_steps", "expansion", "sync_every")
        }
        if wrong := [name for name, size in sizes.items() if size < 1]:
            raise ValueError(f"{' and '.join(wrong)} must be at least 1.")
        if self.precision not in ("bf16", "fp16", "no"):
            raise ValueError(f"There is no precision {self.precision!r}; there are bf16, fp16 and no.")
        if not 1 <= self.n_calibration_batches <= self.n_steps * self.gradient_accumulation_steps:
            raise ValueError(
                f"n_calibration_batches is {self.n_calibration_batches}; it has to be at least 1 and at most the "
                f"number of batches trained on."
            )


class Moments(NamedTuple):
    """Moments of an SAE's inputs, measured before training, in float64."""

    n: Tensor
    """[] number of samples."""
    total: Tensor
    """[d_in] sum of the samples."""
    squares: Tensor
    """[] sum of their squared norms."""


class Figures(NamedTuple):
    """An SAE's training metrics since the last synchronisation."""

    fvu: float
    """Fraction of variance unexplained: squared error over total variance."""
    auxk: float
    """AuxK loss, normalised in the same way; 0 while no latent is dead."""
    l0: float
    """Mean number of active latents per position."""
    dead: float
    """Fraction of latents that are dead."""


class SaeTrainState(nn.Module):
    """An SAE in training, with the scale of its inputs and the steps since each latent fired."""

    scale: Tensor
    """[] factor that gives the inputs a mean square of 1 over samples and channels."""
    total_variance: Tensor
    """[] mean squared distance of scaled inputs from their mean."""
    steps_since_fired: Tensor
    """[d_sae] batches since each latent was last active."""
    sums: Tensor
    """[4] sums since the last synchronisation: batches, fvu, auxk, L0. Not saved: zero at checkpoints."""

    def __init__(self, sae_id: SaeId, d_in: int, config: TrainerConfig) -> None:
        super().__init__()
        self.config = config
        # A seed of its own: the other SAEs of the bank change nothing.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {sae_id.path}".encode()))
        k = config.k_by_hookpoint.get(sae_id.hookpoint, config.k)
        cfg = SaeConfig(d_in, config.expansion * d_in, k, config.architecture)
        self.sae = SparseAutoencoder(cfg, generator=generator)
        self.dead: Tensor | None = None
        self.n_dead = 0
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("total_variance", torch.ones(()))
        self.register_buffer("steps_since_fired", torch.zeros(cfg.d_sae, dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(4), persistent=False)

    @torch.no_grad()
    def start_from(self, moments: Moments, name: str) -> None:
        """Set input scale, total variance and decoder bias from the measured moments.

        Raises:
            ValueError: The inputs do not vary.
        """
        mean = moments.total / moments.n
        square = moments.squares / moments.n
        variance = square - mean.square().sum()
        if not variance > 1e-12 * square:
            raise ValueError(f"The activations of {name} do not vary: there is nothing to learn from them.")
        scale = (self.sae.cfg.d_in / square).sqrt()
        # In float32 before they leave the CPU: not every device has float64.
        self.scale.copy_(scale.float())
        self.total_variance.copy_((variance * scale.square()).float())
        self.sae.b_dec.copy_((mean * scale).float())

    def forward(self, x: Tensor) -> Tensor:
        """The loss of x [n, d_in], unscaled."""
        dead = self.dead if self.config.aux_weight else None
        out = self.sae(x * self.scale, self.total_variance, dead, self.config.aux_weight)
        with torch.no_grad():
            self.steps_since_fired.add_(1).mul_(out.n_fired == 0)
            l0 = out.n_fired.sum() / len(x)
            self.sums += torch.stack([torch.ones_like(l0), out.fvu.detach(), out.auxk.detach(), l0])
        loss: Tensor = out.loss
        return loss

    def update_dead_latents(self) -> None:
        """Give AuxK the dead latents that have not fired for longest. Synchronises with the device."""
        limit = self.config.dead_after_fraction * self.config.n_steps * self.config.gradient_accumulation_steps
        self.n_dead = int((self.steps_since_fired > limit).sum())
        n = min(self.n_dead, self.config.k_aux, self.sae.cfg.d_in // 2)
        self.dead = self.steps_since_fired.argsort(descending=True, stable=True)[:n] if n else None

    def take_figures(self) -> Figures:
        """Metrics since the last call. Synchronises with the device."""
        n, fvu, auxk, l0 = self.sums.tolist()
        self.sums.zero_()
        return Figures(fvu / n, auxk / n, l0 / n, self.n_dead / self.sae.cfg.d_sae)


class SaeBank(nn.Module):
    """SAEs trained together. The loss is computed in `forward`, as DistributedDataParallel requires."""

    def __init__(self, d_in: Mapping[SaeId, int], config: TrainerConfig) -> None:
        super().__init__()
        self.ids = tuple(d_in)
        if unknown := set(config.k_by_hookpoint) - {sae_id.hookpoint for sae_id in self.ids}:
            known = ", ".join(sorted({sae_id.hookpoint for sae_id in self.ids}))
            raise ValueError(
                f"k_by_hookpoint names {', '.join(sorted(unknown))}; the hookpoints trained on are {known}."
            )
        self.states = nn.ModuleList(SaeTrainState(sae_id, size, config) for sae_id, size in d_in.items())

    def forward(self, samples: Sequence[Tensor]) -> Tensor:
        """The sum of the SAEs' losses on their samples [n, d_in], in the order of `ids`."""
        return torch.stack([state(x) for state, x in zip(self.states, samples, strict=True)]).sum()

    def items(self) -> list[tuple[SaeId, SaeTrainState]]:
        """Every SAE in training with its id."""
        return [(i, state) for i, state in zip(self.ids, self.states, strict=True) if isinstance(state, SaeTrainState)]

    def before_step(self) -> None:
        """Remove from the decoders' gradients what is parallel to their rows."""
        for _, state in self.items():
            state.sae.remove_parallel_gradient()

    def after_step(self) -> None:
        """Rescale the decoders' rows to unit norm."""
        for _, state in self.items():
            state.sae.normalize_decoder()
