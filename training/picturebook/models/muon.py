"""Muon for matrices and convolution kernels.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".

The momentum of a matrix is replaced by the nearest semi-orthogonal matrix, found by a few Newton-Schulz iterations.
torch's own Muon takes 2-D weights only; a kernel [out, in, h, w] is treated as the matrix [out, in * h * w] here.
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
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"]).flatten(1)
        update = orthogonalise(update, group["n_iterations"])
        # Same root mean square as AdamW's update, so that one learning rate fits both (Liu et al. 2025).
        scale = 0.2 * max(update.shape) ** 0.5
        weight.add_(update.view(weight.shape), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, n_iterations: int) -> Tensor:
    """A matrix [m, n] with about the same singular vectors and all singular values near one."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(n_iterations):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    orthogonal: Tensor = (x.T if tall else x).to(matrix.dtype)
    return orthogonal
