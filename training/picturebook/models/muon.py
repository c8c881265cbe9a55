"""Muon for matrices and convolution kernels, AdamW for the rest, as one optimiser.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") replaces a matrix's momentum by the
nearest semi-orthogonal matrix, found by a few Newton-Schulz steps. torch's own takes 2-D weights alone; most weights
here are kernels [out, in, h, w], which are matrices [out, in * h * w] to it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic iteration, tuned by its author for fast growth of small singular values."""


class Muon(torch.optim.Optimizer):
    """Groups with `muon=True` hold weights of two or more dimensions; those with `muon=False` are stepped by AdamW."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        n_iterations: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "n_iterations": n_iterations,
            "muon": False,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        if closure is not None:
            raise ValueError("this optimiser takes no closure")
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if group["weight_decay"]:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                (self._muon if group["muon"] else self._adamw)(weight, weight.grad, group)

    def _muon(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"]).flatten(1)
        update = orthogonalise(update, group["n_iterations"])
        # As large an update, root mean square, as AdamW's: one learning rate then fits both (Liu et al. 2025).
        scale = 0.2 * max(update.shape) ** 0.5
        weight.add_(update.view(weight.shape), alpha=-group["lr"] * scale)

    def _adamw(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        mean, square = state["exp_avg"].lerp_(grad, 1 - beta1), state["exp_avg_sq"]
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step = float(state["step"])
        spread = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight.addcdiv_(mean, spread, value=-group["lr"] / (1 - beta1**step))


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
