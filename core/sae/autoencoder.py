"""Sparse autoencoders of residual updates: a few active latents reconstruct each position of a block's update.

    z = TopK(ReLU(W_enc (x - b) + b_enc)),  x_hat = W_dec z + b

(Gao et al. 2024, arXiv 2406.04093; BatchTopK: Bussmann et al. 2024, arXiv 2412.06410.) The operations on sparse codes
are in `core.sae.sparse_ops`.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.diffusion.sampling import Branch
from core.sae.sparse_ops import batch_top_k, encoder_values, squared_error, top_k, weighted_rows

_HOOKPOINT = re.compile(r"\w+(\.\w+)*")
_BRANCHES: dict[str, Branch] = {branch: branch for branch in get_args(Branch)}

AllTimes = Literal["all"]
"""In place of a time: one SAE for all steps."""

Architecture = Literal["topk", "batchtopk"]
"""k active latents at every position, or k on average, which after training a threshold selects."""

Reads = Literal["update", "output"]
"""What an SAE reads at its hookpoint: what the block adds, or all that it returns, which other libraries hook."""

_THRESHOLD_RATE = 0.01
"""Weight of a batch in the running mean of its smallest active value."""

ENCODER_NORM = 0.5
"""Initial norm of the encoder's rows. Random directions overlap, so that k full projections overshoot: with half of
them, the loss falls faster and ends lower (measured on planted data, to 600 steps); with less, latents stay dead."""


class SaeId(NamedTuple):
    """Identifies an SAE of a collection by the activations that it reads."""

    hookpoint: str
    """Dotted module name of the block."""
    branch: Branch
    """Branch of classifier-free guidance."""
    t: float | AllTimes
    """Normalised time of the sampler step, 1.0 the first and 0.0 the last; or `all`."""

    @property
    def path(self) -> str:
        """Folder of the SAE in its collection, such as `mid_block.attentions.0/cond/t0.5`."""
        return f"{self.hookpoint}/{self.branch}/t{self.t if self.t == 'all' else float(self.t)}"

    @classmethod
    def parse(cls, path: str) -> "SaeId":
        """The SAE of a folder `<hookpoint>/<branch>/t<time|all>`.

        Raises:
            ValueError: The path has another form.
        """
        hookpoint, _, rest = path.partition("/")
        branch, _, time = rest.partition("/t")
        if _HOOKPOINT.fullmatch(hookpoint) and branch in _BRANCHES:
            if time == "all":
                return cls(hookpoint, _BRANCHES[branch], "all")
            try:
                return cls(hookpoint, _BRANCHES[branch], float(time))
            except ValueError:
                pass
        raise ValueError(f"{path!r} is no SAE's folder: <hookpoint>/<cond|uncond>/t<time|all> is.")


@dataclass(frozen=True)
class SaeConfig:
    """Shape of an SAE."""

    d_in: int
    """Channels of the residual update."""
    d_sae: int
    """Latents."""
    k: int = 20
    """Active latents per position; with BatchTopK on average over the training data, or 0 where only the thresholds
    are known."""
    architecture: Architecture = "topk"
    """`topk` or `batchtopk`."""
    has_threshold: bool = True
    """For BatchTopK: whether a threshold selects after training. Without one, as in files of SAeUron, the N * k largest
    values of the N positions in a call are active, so that a position's code depends on the others."""
    reads: Reads = "update"
    """`update` or `output` of the block."""

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ValueError(f"There is no SAE architecture {self.architecture!r}: topk and batchtopk are.")
        if self.reads not in get_args(Reads):
            raise ValueError(f"An SAE reads a block's update or its output, not {self.reads!r}.")
        if min(self.d_in, self.d_sae, self.k + self.uses_threshold) < 1:
            raise ValueError(f"d_in, d_sae and k must be at least 1: {self.d_in}, {self.d_sae}, {self.k}.")
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}, but there are only d_sae = {self.d_sae} latents. Lower k or raise d_sae.")

    @property
    def uses_threshold(self) -> bool:
        """Whether thresholds select the active latents after training."""
        return self.architecture == "batchtopk" and self.has_threshold


class Code(NamedTuple):
    """The active latents of N positions."""

    indices: Tensor
    """[N, k] int64 indices of latents, the most active first. With BatchTopK, k is the largest number of active latents
    of a position, and unused entries are -1."""
    values: Tensor
    """[N, k] activations, never negative; 0 is inactive."""


class SaeLoss(NamedTuple):
    """Loss of a batch of N positions, and the counts of active latents."""

    loss: Tensor
    """Scalar to minimise: fvu + aux_weight * auxk."""
    fvu: Tensor
    """Scalar: fraction of variance unexplained, with the variance of the training data."""
    auxk: Tensor
    """Scalar: error of reconstructing the residual from dead latents, in the same unit; 0 if there are none."""
    n_fired: Tensor
    """[d_sae] positions at which each latent was active."""


class SparseAutoencoder(nn.Module):
    """TopK or BatchTopK autoencoder.

    Its parameters are `encoder.weight` [d_sae, d_in] (W_enc transposed, so that a latent's weights are contiguous),
    `encoder.bias` [d_sae], `W_dec` [d_sae, d_in] with rows of unit norm, and `b_dec` [d_in].
    """

    threshold: Tensor | None
    """[d_sae] smallest value that counts as active after training; BatchTopK only."""

    def __init__(
        self, cfg: SaeConfig, *, generator: torch.Generator | None = None, metadata: dict[str, Any] | None = None
    ) -> None:
        """`generator` (CPU) draws the initial weights; `metadata` is saved with the weights."""
        super().__init__()
        self.cfg, self.metadata = cfg, dict(metadata or {})
        rows = F.normalize(torch.randn(cfg.d_sae, cfg.d_in, generator=generator), dim=1)
        self.encoder = nn.Linear(cfg.d_in, cfg.d_sae, device="meta")  # so that no weights are drawn
        self.encoder.weight = nn.Parameter(ENCODER_NORM * rows)
        self.encoder.bias = nn.Parameter(torch.zeros(cfg.d_sae))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in))
        self.register_buffer("threshold", torch.zeros(cfg.d_sae) if cfg.uses_threshold else None)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Code:
        """Active latents of x [N, d_in].

        The code of a position does not depend on the other positions, except for BatchTopK without a threshold.
        """
        self._check(x)
        pre = self._pre(x)
        if self.cfg.architecture == "topk":
            values, indices = pre.topk(self.cfg.k)
            return Code(indices, values.relu())
        active = self._largest(pre) if self.threshold is None else pre.relu() > self.threshold
        width = int(active.sum(1).max()) if len(x) else 0
        values, indices = torch.where(active, pre, 0).topk(width)
        return Code(indices.masked_fill(values <= 0, -1), values)

    def decode(self, code: Code) -> Tensor:
        """Reconstructions [N, d_in] from codes."""
        values = code.values.masked_fill(code.indices < 0, 0).to(self.W_dec.dtype)
        if not values.numel():
            return self.b_dec.expand(len(values), -1)
        return weighted_rows(code.indices.clamp_min(0), values, self.W_dec) + self.b_dec

    def forward(
        self, x: Tensor, total_variance: Tensor | float, dead: Tensor | None = None, aux_weight: float = 1 / 32
    ) -> SaeLoss:
        """The training loss of x [N, d_in].

        In plain torch, with every tensor dense (BatchTopK takes the `len(x) * k` largest of the batch as a whole):

            pre = sae.encoder(x - sae.b_dec)
            z = torch.zeros_like(pre).scatter(1, pre.topk(sae.cfg.k).indices, 1) * pre.relu()
            residual = x - (z @ sae.W_dec + sae.b_dec)
            fvu = residual.square().sum() / (len(x) * total_variance)
            from_dead = pre.relu()[:, dead] @ sae.W_dec[dead]
            auxk = (residual.detach() - from_dead).square().sum() / (len(x) * total_variance)
            loss = fvu + aux_weight * auxk

        Args:
            x: Positions.
            total_variance: Mean squared distance of the training data from its mean, measured once.
            dead: [n] latents that have not fired for long and reconstruct the residual (AuxK); None for no AuxK.
            aux_weight: Weight of AuxK in the loss.
        """
        self._check(x)
        # Detached: the functions below add the gradient of b_dec themselves.
        centred = x.to(self.b_dec.dtype) - self.b_dec.detach()
        with torch.no_grad():  # autograd would keep the dense pre-activations for the backward pass
            select = top_k if self.cfg.architecture == "topk" else batch_top_k
            values, pattern = select(self.encoder(centred), self.cfg.k)
        self._follow_threshold(values)
        values = encoder_values(values, pattern, centred, self.encoder.weight, self.encoder.bias, self.b_dec)
        error, residual = squared_error(values, pattern, centred, self.W_dec, self.b_dec)
        scale = len(x) * total_variance
        fvu = error / scale
        auxk = torch.zeros_like(fvu)
        if dead is not None and len(dead):
            auxk = (residual - self._from_dead(x, dead)).square().sum() / scale
        n_fired = torch.zeros(self.cfg.d_sae, device=x.device).index_add_(0, pattern.latents, (values > 0).float())
        return SaeLoss(fvu + aux_weight * auxk, fvu, auxk, n_fired)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove from W_dec's gradient the components along its rows, whose norms stay 1."""
        grad = self.W_dec.grad
        if grad is not None:
            along = torch.linalg.vecdot(grad, self.W_dec)
            grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give W_dec's rows unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def for_unscaled_input(self, scale: float) -> "SparseAutoencoder":
        """An SAE of x that is equivalent to this one, which reads scale * x.

        Only biases and threshold change; values and reconstructions are divided by scale. The rows of W_dec keep unit
        norm, so that a value is a length in the unit of the activations.
        """
        other = copy.deepcopy(self)
        for tensor in (other.encoder.bias, other.b_dec, other.threshold):
            if tensor is not None:
                tensor.div_(scale)
        return other

    def _pre(self, x: Tensor) -> Tensor:
        """Pre-activations [N, d_sae], dense."""
        pre: Tensor = self.encoder(x.to(self.b_dec.dtype) - self.b_dec)
        return pre

    def _largest(self, pre: Tensor) -> Tensor:
        """[N, d_sae] which pre-activations are among the N * k largest, and positive."""
        places = pre.flatten().topk(len(pre) * self.cfg.k, sorted=False).indices
        chosen = torch.zeros(pre.numel(), dtype=torch.bool, device=pre.device).index_fill_(0, places, True)
        return chosen.view_as(pre) & (pre > 0)

    def _from_dead(self, x: Tensor, dead: Tensor) -> Tensor:
        """[N, d_in] reconstructions from these latents alone, without b_dec: the residual lacks it already."""
        pre = F.linear(x - self.b_dec, self.encoder.weight[dead], self.encoder.bias[dead])
        return pre.relu() @ self.W_dec[dead]

    @torch.no_grad()
    def _follow_threshold(self, values: Tensor) -> None:
        if self.threshold is None:
            return
        smallest = torch.where(values > 0, values, torch.inf).min()
        smallest = torch.where(smallest.isfinite(), smallest, self.threshold)
        new = torch.where(self.threshold > 0, torch.lerp(self.threshold, smallest, _THRESHOLD_RATE), smallest)
        self.threshold.copy_(new)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.cfg.d_in:
            raise ValueError(f"This SAE reads [N, {self.cfg.d_in}], not {list(x.shape)}.")


def output_hookpoints(saes: Mapping[Any, SparseAutoencoder]) -> frozenset[str]:
    """The hookpoints of SAEs, by `SaeId` or another key with a hookpoint, that read the block's whole output.

    Raises:
        ValueError: Two SAEs of one hookpoint read different things.
    """
    output, update = (
        frozenset(key.hookpoint for key, sae in saes.items() if sae.cfg.reads == reads)
        for reads in ("output", "update")
    )
    if both := sorted(output & update):
        raise ValueError(f"At {both[0]} one SAE reads the block's update and another its output: use one at a time.")
    return output
