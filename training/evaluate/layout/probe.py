"""A linear probe: multinomial logistic regression from residual updates to classes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_POSITIONS = 32_000
"""Most positions a probe is fitted on; of more, this many are drawn at random."""
N_ITERATIONS = 40
"""Iterations of L-BFGS for each penalty."""
PENALTIES = (1e-1, 1e-2, 1e-3)
"""Candidate L2 penalties on the weights for whitened inputs, relative to the mean cross-entropy."""
HELD_OUT = 4
"""One image in this many is held out to choose the penalty."""


class Probe(NamedTuple):
    """Logits of K classes from x [..., d_in]."""

    weight: Tensor
    """[K, d_in]"""
    bias: Tensor
    """[K]"""

    def logits(self, x: Tensor) -> Tensor:
        """[..., K]"""
        return F.linear(x, self.weight, self.bias)


def fit_probe(x: Tensor, labels: Tensor, n_classes: int) -> Probe:
    """Fit a probe from x [images, positions, d_in] to classes [images, positions].

    Positions of no class (-1) are left out. The penalty with the lowest loss on held-out images is chosen, and the
    probe is then fitted on all images.
    """
    whiten = _Whitening.of(x.flatten(0, 1))
    apart = torch.arange(len(x)) % HELD_OUT == HELD_OUT - 1
    fitted, other, every = (
        _known(whiten(x[chosen]), labels[chosen]) for chosen in (~apart, apart, torch.ones_like(apart))
    )
    weight, bias = torch.zeros(n_classes, x.shape[2]), torch.zeros(n_classes)
    found = []
    for penalty in PENALTIES:  # each starts where the stronger one before it ended
        weight, bias = _descend(*fitted, weight, bias, penalty)
        loss = float(F.cross_entropy(F.linear(other[0], weight, bias), other[1])) if len(other[1]) else 0.0
        found.append((loss, penalty, weight, bias))
    _, penalty, weight, bias = min(found, key=lambda one: one[0])
    weight, bias = _descend(*every, weight, bias, penalty)
    of_x = weight.double() @ whiten.matrix.T
    return Probe(of_x.float(), (bias - of_x @ whiten.mean).float())


class _Whitening(NamedTuple):
    """Whitening of the inputs: directions of all scales are learnt alike, and L-BFGS converges quickly."""

    mean: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "_Whitening":
        centred = x.double() - x.double().mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        return cls(x.double().mean(0), vectors / values.clamp_min(1e-6 * float(values.max())).sqrt())

    def __call__(self, x: Tensor) -> Tensor:
        return ((x.double() - self.mean) @ self.matrix).float()


def _known(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that have a class, at most `MOST_POSITIONS`: [n, d_in] and [n]."""
    x, labels = x[labels >= 0], labels[labels >= 0]
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:MOST_POSITIONS]
    return x[chosen], labels[chosen]


def _descend(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight and bias that minimise the loss, starting from the given ones."""
    weight, bias = (part.clone().requires_grad_() for part in (weight, bias))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=N_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
