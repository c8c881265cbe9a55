import pytest
import torch

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
