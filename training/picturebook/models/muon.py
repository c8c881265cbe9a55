"""Muon for matrices and convolution kernels.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".

The momentum of a matrix is replaced by the nearest semi-orthogonal matrix, found by a few Newton-Schulz iterations.
torch's own Muon takes 2-D weights only, one at a time; a kernel [out, in, h, w] is treated as the matrix
[out, in * h * w] here, and matrices of one shape are stepped together.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic iteration, tuned by its author for fast growth of small singular values."""


class Muon(torch.optim.Optimizer):
    """For weights of two or more dimensions; step the others with AdamW beside it, at the same learning rate."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        n_iterations: int = 5,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "n_iterations": n_iterations}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient; a closure is refused."""
        if closure is not None:
            raise ValueError("Muon takes no closure.")
        for group in self.param_groups:
            # Weights that are matrices of one shape are stepped as one stack: on a GPU, a few large products in place
            # of hundreds that are too small to fill it.
            alike: dict[tuple[int, int], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault((len(weight), weight[0].numel()), []).append(weight)
            for shape, weights in alike.items():
                self._update(weights, shape, group)

    def _update(self, weights: list[Tensor], shape: tuple[int, int], group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for weight in weights:
            self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        grads: list[Any] = [weight.grad for weight in weights]
        momenta: list[Tensor] = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"])
        stack = torch.stack([update.reshape(shape) for update in updates])
        stack = orthogonalise(stack, group["n_iterations"])
        # Same root mean square as AdamW's update, so that one learning rate fits both (Liu et al. 2025).
        scale = 0.2 * max(shape) ** 0.5
        steps = [update.view(weight.shape) for update, weight in zip(stack, weights, strict=True)]
        torch._foreach_add_(weights, steps, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, n_iterations: int) -> Tensor:
    """Matrices [..., m, n], each with about the same singular vectors and all singular values near one."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n_iterations):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    orthogonal: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return orthogonal
