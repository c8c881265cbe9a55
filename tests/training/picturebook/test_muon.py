from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from training.picturebook.models.muon import Muon, orthogonalise


def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 60), (60, 24)):
        matrix = torch.randn(shape, generator=generator)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        result = orthogonalise(matrix, 5)
        inner = u.T @ result @ v.T
        # The quintic leaves singular values between about 0.7 and 1.2, and rotates nothing.
        assert inner.diagonal().min() > 0.6
        assert inner.diagonal().max() < 1.3
        assert (inner - inner.diagonal().diag()).abs().max() < 0.1


def test_muon_beside_adamw_solves_a_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(16, 32, generator=generator)
    x = torch.randn(256, 32, generator=generator)
    y = x @ truth.T + 1
    weight, bias = torch.zeros(16, 32, requires_grad=True), torch.zeros(16, requires_grad=True)
    optimizers = [Muon([weight], lr=0.1), torch.optim.AdamW([bias], lr=0.1, betas=(0.9, 0.99))]
    for step in range(300):
        loss = (x @ weight.T + bias - y).square().mean()
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - step / 300)
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.01
    torch.testing.assert_close(bias.detach(), torch.ones(16), atol=0.1, rtol=0)


def test_a_kernel_is_stepped_as_the_matrix_it_is_and_decays() -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(8, 4, 3, 3, generator=generator)
    kernel = torch.ones(8, 4, 3, 3, requires_grad=True)
    matrix = torch.ones(8, 36, requires_grad=True)
    kernel.grad, matrix.grad = grad, grad.flatten(1)
    for weight in (kernel, matrix):
        Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(kernel.flatten(1), matrix)
    # From 1 - 0.1 * 0.5 by an update whose root mean square is about 0.2 lr.
    assert (matrix - 0.95).square().mean().sqrt().item() == pytest.approx(0.02, rel=0.3)


class OneByOne(torch.optim.Optimizer):
    """Muon as its paper states it, for one matrix after another."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                mean = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                mean.mul_(group["momentum"]).add_(weight.grad, alpha=1 - group["momentum"])
                nesterov = group["momentum"] * mean + (1 - group["momentum"]) * weight.grad
                matrix = nesterov.reshape(len(weight), -1)
                step = orthogonalise(matrix, 5).reshape(weight.shape)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(group["lr"] * 0.2 * max(matrix.shape) ** 0.5 * step)


def test_stacks_of_equal_shapes_are_stepped_as_one_matrix_after_another() -> None:
    shapes = [(16, 8, 3, 3), (16, 72), (24, 12), (12, 24), (16, 72), (24, 12, 1, 1), (16, 4, 3, 3)]
    optimizers = []
    for kind in (OneByOne, Muon):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
        weights[0].data = weights[0].data.to(memory_format=torch.channels_last)
        optimizers.append((weights, kind(weights, lr=0.01, weight_decay=0.1)))
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        for weights, optimizer in optimizers:
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad.clone()
            optimizer.step()
    for one, stacked in zip(optimizers[0][0], optimizers[1][0], strict=True):
        torch.testing.assert_close(stacked, one, rtol=0, atol=1e-4)  # ten steps move a weight by 0.02
    assert all(state["momentum"].shape == weight.shape for weight, state in optimizers[1][1].state.items())


def test_a_weight_without_a_gradient_stays() -> None:
    weights = [torch.ones(12, 12, requires_grad=True) for _ in range(2)]
    weights[1].grad = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    Muon(weights, lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weights[0], torch.ones(12, 12))
    assert not torch.equal(weights[1], torch.ones(12, 12))
