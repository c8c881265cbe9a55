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


def test_both_halves_solve_a_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(16, 32, generator=generator)
    x = torch.randn(256, 32, generator=generator)
    y = x @ truth.T + 1
    weight, bias = torch.zeros(16, 32, requires_grad=True), torch.zeros(16, requires_grad=True)
    optimizer = Muon([{"params": [weight], "muon": True}, {"params": [bias]}], lr=0.1)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 300)
        loss = (x @ weight.T + bias - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    torch.testing.assert_close(bias.detach(), torch.ones(16), atol=0.1, rtol=0)


def test_adamw_half_is_torchs() -> None:
    ours, theirs = torch.ones(5, requires_grad=True), torch.ones(5, requires_grad=True)
    mine = Muon([{"params": [ours]}], lr=0.1, betas=(0.9, 0.99))
    reference = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99))
    for step in range(5):
        for weight, optimizer in ((ours, mine), (theirs, reference)):
            (weight * torch.arange(5) * (step + 1)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours, theirs)
