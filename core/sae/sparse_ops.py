"""Products of sparse codes with weights, and their gradients.

A batch of codes is a sparse matrix Z [N, d_sae] of which only the active entries are kept. Three operations make and
train its decoder: Z W, Z^T X, and the products of rows of X with rows of W at the active places. There are two paths:

- On a CPU each is a sum over the active entries alone, which `embedding_bag` computes without a tensor of
  [active, d_in]. (A product of transposed CSR does the same, but its kernels are missing on some platforms.)
- On an accelerator Z is scattered into a dense matrix, which lives for the length of one product. That takes as many
  operations as the encoder does, but of the kind that it is built for, and takes equally long whatever the code: sums
  by latent wait for the one that is active everywhere. And it is made of products, a scatter and a gather, which every
  device has in every precision; `embedding_bag` has no backward pass in bfloat16 on CUDA, for one.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from core.sae.selection import largest


class _ByLatent(NamedTuple):
    """A pattern read column by column."""

    order: Tensor
    """[n] permutation of the active entries that sorts them by latent, and by row within one."""
    rows: Tensor
    """[n] row of each."""
    starts: Tensor
    """[d_sae] where each latent's entries start."""


class Pattern:
    """Where a sparse matrix [N, d_sae] has its entries."""

    def __init__(self, rows: Tensor, latents: Tensor, n_rows: int, d_sae: int) -> None:
        """rows [n] in ascending order, and latents [n] are the entries' places."""
        self.rows, self.latents, self.n_rows, self.d_sae = rows, latents, n_rows, d_sae

    @cached_property
    def starts(self) -> Tensor:
        """[N] where each row's entries start."""
        return torch.searchsorted(self.rows, torch.arange(self.n_rows, device=self.rows.device))

    @cached_property
    def places(self) -> Tensor:
        """[n] place of each entry in the flattened dense matrix."""
        return self.rows * self.d_sae + self.latents

    @cached_property
    def by_latent(self) -> _ByLatent:
        """Column by column; the encoder's gradient and the decoder's share it."""
        latents, order = self.latents.sort(stable=True)
        starts = torch.searchsorted(latents, torch.arange(self.d_sae, device=latents.device))
        return _ByLatent(order, self.rows[order], starts)


def top_k(pre: Tensor, k: int) -> tuple[Tensor, Pattern]:
    """The k largest of every row of pre [N, d_sae], negative ones as zero: values [N * k] and where they are."""
    values, latents = largest(pre, k)
    n_rows, d_sae = pre.shape
    rows = torch.arange(n_rows, device=pre.device).repeat_interleave(k)
    return values.flatten(), Pattern(rows, latents.flatten(), n_rows, d_sae)


def batch_top_k(pre: Tensor, k: int) -> tuple[Tensor, Pattern]:
    """The N * k largest of pre [N, d_sae] as a whole (Bussmann et al. 2024): values [N * k] and where they are."""
    n_rows, d_sae = pre.shape
    values, places = pre.flatten().topk(n_rows * k, sorted=False)
    places, order = places.sort()
    rows = places.div(d_sae, rounding_mode="floor")
    return values[order].relu(), Pattern(rows, places - rows * d_sae, n_rows, d_sae)


def decode(values: Tensor, pattern: Pattern, weight: Tensor) -> Tensor:
    """Z W, [N, d_in], of values [n] and weight [d_sae, d_in] in one precision. No gradient."""
    values, weight = values.detach(), weight.detach()
    if _by_entry(values):
        return F.embedding_bag(pattern.latents, weight, pattern.starts, mode="sum", per_sample_weights=values)
    return _scattered(values, pattern) @ weight


def transposed_product(values: Tensor, pattern: Pattern, dense: Tensor) -> Tensor:
    """Z^T X, [d_sae, d], of values [n] and dense [N, d] in one precision. No gradient."""
    values, dense = values.detach(), dense.detach()
    if _by_entry(values):
        order, rows, starts = pattern.by_latent
        return F.embedding_bag(rows, dense, starts, mode="sum", per_sample_weights=values[order])
    return _scattered(values, pattern).T @ dense


def row_products(dense: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    """[n] products of row i of dense [N, d] with row j of weight [d_sae, d] for each entry (i, j). No gradient."""
    dense, weight = dense.detach(), weight.detach()
    if _by_entry(dense):
        places = pattern.latents, pattern.starts, pattern.rows
        products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(dense, weight, *places, 0)
        return products
    return (dense @ weight.T).flatten()[pattern.places]


def weighted_rows(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """[N, d] sums over k of values [N, k] times the rows of weight [d_sae, d] at indices [N, k], which may repeat."""
    if _has_embedding_bag(values):
        return F.embedding_bag(indices, weight, mode="sum", per_sample_weights=values)
    return values.new_zeros(len(values), len(weight)).scatter_add(1, indices, values) @ weight


def _has_embedding_bag(tensor: Tensor) -> bool:
    """Whether the forward pass of `embedding_bag` is known to have a kernel in every precision where this tensor is."""
    return tensor.device.type in ("cpu", "cuda")


def _by_entry(tensor: Tensor) -> bool:
    """Whether sums over the active entries are the faster way where this tensor is."""
    return tensor.device.type == "cpu"


def _scattered(values: Tensor, pattern: Pattern) -> Tensor:
    """Z [N, d_sae], dense."""
    dense = values.new_zeros(pattern.n_rows * pattern.d_sae)
    return dense.scatter_(0, pattern.places, values).view(pattern.n_rows, pattern.d_sae)


def encoder_values(
    values: Tensor, pattern: Pattern, centred: Tensor, weight: Tensor, bias: Tensor, centre: Tensor
) -> Tensor:
    """Values [n] that `relu(centred weight^T + bias)` takes at the pattern's places, with their gradients.

    `centred` is x - centre; the gradient for x goes through it, that for the centre is added here. The values are
    computed by the caller without autograd, which would keep the dense product [N, d_sae].
    """
    arguments = values, pattern, centred, weight, bias, centre
    result: Tensor = _EncoderValues.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def squared_error(
    values: Tensor, pattern: Pattern, centred: Tensor, weight: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor]:
    """||centred - Z weight||^2, a scalar, with its gradients, and centred - Z weight [N, d_in] without."""
    arguments = values, pattern, centred, weight, centre
    error, residual = _SquaredError.apply(*arguments)  # type: ignore[no-untyped-call]
    return error, residual


class _EncoderValues(Function):
    """Adds the gradients of what made the values; the forward pass hands the values through."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        pattern: Pattern,
        centred: Tensor,
        weight: Tensor,
        bias: Tensor,
        centre: Tensor,  # noqa: ARG004
    ) -> Tensor:
        ctx.pattern, ctx.bias_dtype = pattern, bias.dtype
        ctx.save_for_backward(values, centred.to(values.dtype), weight)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), pattern = gradients, ctx.pattern
        values, centred, weight = ctx.saved_tensors
        _, _, of_x, of_weight, of_bias, of_centre = ctx.needs_input_grad
        # Autocast would round the sums, where it is still on.
        with torch.autocast(centred.device.type, enabled=False):
            through = grad * (values > 0)
            sums = torch.zeros(pattern.d_sae, dtype=weight.dtype, device=weight.device)
            sums.index_add_(0, pattern.latents, through.to(weight.dtype))
            return (
                None,
                None,
                decode(through, pattern, weight.to(through.dtype)).to(weight.dtype) if of_x else None,
                transposed_product(through, pattern, centred).to(weight.dtype) if of_weight else None,
                sums if of_bias else None,
                -(sums @ weight) if of_centre else None,
            )


class _SquaredError(Function):
    """The squared error of the reconstruction, with no more passes over [N, d_in] than it takes."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        pattern: Pattern,
        centred: Tensor,
        weight: Tensor,
        centre: Tensor,  # noqa: ARG004
    ) -> tuple[Tensor, Tensor]:
        rows = weight.to(values.dtype)
        residual = centred - decode(values, pattern, rows)
        ctx.pattern, ctx.weight_dtype = pattern, weight.dtype
        ctx.save_for_backward(values, rows, residual)
        ctx.mark_non_differentiable(residual)
        ctx.set_materialize_grads(False)
        return torch.linalg.vector_norm(residual).square(), residual

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pattern, (values, rows, residual) = ctx.pattern, ctx.saved_tensors
        _, _, of_x, of_weight, of_centre = ctx.needs_input_grad
        with torch.autocast(residual.device.type, enabled=False):
            # Scaled before it is rounded: then a loss scale keeps float16 from overflow and underflow here too.
            of_rebuilt = residual * (-2 * gradients[0])
            low = of_rebuilt.to(values.dtype)
            return (
                row_products(low, rows, pattern),
                None,
                -of_rebuilt if of_x else None,
                transposed_product(values, pattern, low).to(ctx.weight_dtype) if of_weight else None,
                of_rebuilt.sum(0) if of_centre else None,
            )
