"""Every path on which codes are trained, each against plain dense formulas in float64."""

import textwrap
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core.sae import sparse_ops as sparse
from core.sae.autoencoder import Architecture, Code, SaeConfig, SparseAutoencoder
from core.sae.sparse_ops import Pattern, decode, row_products, transposed_product
from tests.core.sae.test_autoencoder import dense_loss, make_sae, positions

VARIANCE = 5.0
PATHS = ["by entry", "dense"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a CPU does, and what an accelerator does; the latter's operations all are there on a CPU, too."""
    scattered: list[int] = []
    original = sparse._scattered

    def noted(values: Tensor, pattern: Pattern) -> Tensor:
        scattered.append(1)
        return original(values, pattern)

    monkeypatch.setattr(sparse, "_scattered", noted)
    if request.param == "dense":
        monkeypatch.setattr(sparse, "_by_entry", lambda _: False)
    yield
    assert bool(scattered) == (request.param == "dense")


def pattern_and_values(dtype: torch.dtype) -> tuple[Pattern, Tensor, Tensor]:
    """Entries of a matrix [4, 5], one row and one column of it empty, and the matrix."""
    z = torch.tensor([[0.0, 2, 0, 0, 0.5], [1, 0, 0, 0, 3], [0, 0, 0, 0, 0], [0, 4, 0, 0.25, 0]], dtype=dtype)
    rows, latents = z.nonzero(as_tuple=True)
    return Pattern(rows, latents, *z.shape), z[rows, latents], z


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_products_of_a_ragged_pattern_are_those_of_the_dense_matrix(dtype: torch.dtype) -> None:
    pattern, values, z = pattern_and_values(dtype)
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, 3, generator=generator).to(dtype) for n in (5, 4))
    products = decode(values, pattern, w), transposed_product(values, pattern, x), row_products(x, w, pattern)
    wanted = z.double() @ w.double(), z.double().T @ x.double(), (x.double() @ w.double().T)[z != 0]
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(products, wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * eps, atol=8 * eps)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("dead", [None, torch.tensor([1, 4, 11])])
@pytest.mark.parametrize("k", [3, 20])
def test_gradients_of_every_parameter_and_the_input_are_the_dense_ones(
    architecture: Architecture, dead: Tensor | None, k: int
) -> None:
    sae, x = make_sae(architecture, k=k), positions().requires_grad_()  # with k = 20 latents are chosen that are zero
    inputs = {**dict(sae.named_parameters()), "x": x}
    assert set(inputs) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec", "x"}
    expected = dense_loss(sae, x, VARIANCE, dead)
    wanted = torch.autograd.grad(expected, list(inputs.values()))
    got = sae(x, VARIANCE, dead)
    assert got.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, ours, theirs in zip(inputs, torch.autograd.grad(got.loss, list(inputs.values())), wanted, strict=True):
        assert theirs.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize(("low", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)])
def test_under_autocast_gradients_are_the_dense_ones_up_to_rounding(
    architecture: Architecture, low: torch.dtype, bound: float
) -> None:
    sae, x = make_sae(architecture, d_in=16, d_sae=40).float(), positions(300, 16).float()
    dead = torch.tensor([2, 7])
    x.requires_grad_()
    inputs = [*sae.parameters(), x]
    scale = 1024.0  # as a loss is scaled for float16
    with torch.autocast("cpu", low):
        rounded = sae(x, VARIANCE, dead)
    got = torch.autograd.grad(rounded.loss * scale, inputs)
    # The latents that were chosen are taken as they are: which of two near ones is larger, rounding decides.
    with torch.autocast("cpu", low):
        pre = sae.encoder(x - sae.b_dec).double()
    wanted = torch.autograd.grad(_chosen_by(pre, sae, x, dead), inputs)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours / scale - theirs).norm() < bound * theirs.norm()


def _chosen_by(pre: Tensor, sae: SparseAutoencoder, x: Tensor, dead: Tensor) -> Tensor:
    """The dense loss in float64 with the latents that `pre` chooses."""
    k, weights = sae.cfg.k, [p.double() for p in (sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec)]
    w_enc, b_enc, w_dec, b_dec = weights
    if sae.cfg.architecture == "topk":
        keep = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1)
    else:
        keep = torch.zeros(pre.numel(), dtype=pre.dtype).scatter(0, pre.flatten().topk(len(x) * k).indices, 1)
        keep = keep.view(pre.shape)
    exact = ((x.double() - b_dec) @ w_enc.T + b_enc).relu()
    residual = x.double() - (exact * keep) @ w_dec - b_dec
    auxk = (residual.detach() - exact[:, dead] @ w_dec[dead]).square().sum()
    return (residual.square().sum() + auxk / 32) / len(x) / VARIANCE


@pytest.mark.usefixtures("path")
def test_the_docstring_of_forward_is_what_forward_computes() -> None:
    text = SparseAutoencoder.forward.__doc__ or ""
    lines = textwrap.dedent(text.split("as a whole):\n\n")[1].split("\n\n")[0])
    sae, x = make_sae(), positions().requires_grad_()
    known = {"sae": sae, "x": x, "torch": torch, "total_variance": VARIANCE, "dead": torch.tensor([1, 4])}
    known["aux_weight"] = 1 / 32
    exec(lines, known)
    got = sae(x, VARIANCE, known["dead"])
    inputs = [*sae.parameters(), x]
    for name in ("loss", "fvu", "auxk"):
        expected = known[name]
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(getattr(got, name), expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(known["loss"], inputs)  # type: ignore[arg-type]
    for ours, theirs in zip(torch.autograd.grad(got.loss, inputs), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_training_takes_the_same_way_on_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for by_entry in (True, False):
        monkeypatch.setattr(sparse, "_by_entry", lambda _, answer=by_entry: answer)
        sae, x = make_sae("batchtopk"), positions(60)
        optimizer = torch.optim.Adam(sae.parameters(), lr=0.01)
        for _ in range(20):
            sae(x, VARIANCE, torch.tensor([3])).loss.backward()
            sae.remove_parallel_gradient()
            optimizer.step()
            optimizer.zero_grad()
            sae.normalize_decoder()
        ends.append(torch.cat([p.detach().flatten() for p in sae.parameters()]))
    assert not torch.equal(ends[0], torch.cat([p.detach().flatten() for p in make_sae("batchtopk").parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)


def test_no_dense_code_outlives_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_by_entry", lambda _: False)
    n, d_sae = 50, 70
    sae, x = make_sae(d_in=8, d_sae=d_sae, k=4), positions(n, 8)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sae(x, VARIANCE, torch.tensor([3, 5])).loss.backward()
    assert n * 4 in kept
    assert max(kept) < n * d_sae


def test_codes_decode_alike_with_and_without_embedding_bag(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = SparseAutoencoder(SaeConfig(d_in=4, d_sae=9, k=3), generator=torch.Generator().manual_seed(0))
    # Latent 0 is active, and is what places that a row leaves empty point to.
    code = Code(torch.tensor([[0, 4, -1], [0, -1, -1], [8, 2, 1]]), torch.tensor([[1.0, 2, 9], [3, 9, 9], [1, 2, 3]]))
    with_bags = sae.decode(code)
    called: list[Callable[..., Tensor]] = []
    monkeypatch.setattr(F, "embedding_bag", lambda *_, **__: called.append(F.embedding_bag))
    monkeypatch.setattr(sparse, "_has_embedding_bag", lambda _: False)
    torch.testing.assert_close(sae.decode(code), with_bags)
    assert not called
    expected = sae.W_dec[0] + 2 * sae.W_dec[4]
    torch.testing.assert_close(with_bags[0], expected + sae.b_dec)
