from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core.sae.autoencoder import ENCODER_NORM, Architecture, Code, SaeConfig, SaeId, SparseAutoencoder
from core.sae.sparse_ops import batch_top_k, top_k

D_IN, D_SAE, K, N = 6, 20, 3, 9


def make_sae(architecture: Architecture = "topk", **sizes: int) -> SparseAutoencoder:
    """Every parameter is random, the biases too: a zero bias hides mistakes."""
    cfg = SaeConfig(**{"d_in": D_IN, "d_sae": D_SAE, "k": K, **sizes}, architecture=architecture)
    generator = torch.Generator().manual_seed(1)
    sae = SparseAutoencoder(cfg, generator=generator).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    sae.normalize_decoder()
    return sae


def positions(n: int = N, d_in: int = D_IN, seed: int = 2) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_loss(sae: SparseAutoencoder, x: Tensor, variance: float, dead: Tensor | None) -> Tensor:
    """The formulas of the paper, with every tensor dense."""
    pre = (x - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias
    if sae.cfg.architecture == "topk":
        keep = torch.zeros_like(pre).scatter(1, pre.topk(sae.cfg.k).indices, 1)
    else:
        keep = (pre >= pre.flatten().topk(len(x) * sae.cfg.k).values[-1]).double()
    z = pre.relu() * keep
    residual = x - (z @ sae.W_dec + sae.b_dec)
    loss = residual.square().sum() / len(x) / variance
    if dead is not None:
        again = (pre.relu()[:, dead]) @ sae.W_dec[dead]
        loss = loss + (residual.detach() - again).square().sum() / len(x) / variance / 32
    return loss


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("dead", [None, torch.tensor([1, 4, 11])])
def test_loss_and_gradients_are_those_of_the_dense_formulas(architecture: Architecture, dead: Tensor | None) -> None:
    sae, x = make_sae(architecture), positions().requires_grad_()
    inputs = [*sae.parameters(), x]
    expected = dense_loss(sae, x, 5.0, dead)
    wanted = torch.autograd.grad(expected, inputs)
    got = sae(x, 5.0, dead)
    assert got.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(got.loss, inputs), wanted, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_latent_that_is_chosen_but_negative_has_no_value_and_no_gradient() -> None:
    sae = make_sae(k=D_SAE)  # every latent is chosen, about half of them negative
    x = positions()
    wanted = torch.autograd.grad(dense_loss(sae, x, 5.0, None), list(sae.parameters()))
    out = sae(x, 5.0)
    for ours, theirs in zip(torch.autograd.grad(out.loss, list(sae.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    pre = (x - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias
    assert torch.equal(out.n_fired.double(), (pre > 0).sum(0).double())
    assert 0 < out.n_fired.sum() < N * D_SAE


def test_auxk_is_computed_by_hand_with_a_bias_that_it_must_not_add() -> None:
    sae = SparseAutoencoder(SaeConfig(d_in=2, d_sae=2, k=1)).double()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.b_dec.copy_(torch.tensor([10.0, 10.0]))
    # x - b = (3, 1): latent 0 rebuilds (3, 0), the residual is (0, 1), and latent 1 rebuilds all of it.
    out = sae(torch.tensor([[13.0, 11.0]], dtype=torch.float64), 2.0, torch.tensor([1]))
    assert out.fvu.item() == pytest.approx(1 / 2)
    assert out.auxk.item() == pytest.approx(0)
    # Latent 0, were it dead, would rebuild (3, 0) of a residual (0, 1): 3^2 + 1^2.
    out = sae(torch.tensor([[13.0, 11.0]], dtype=torch.float64), 2.0, torch.tensor([0]))
    assert out.auxk.item() == pytest.approx(10 / 2)
    assert out.loss.item() == pytest.approx(1 / 2 + 10 / 2 / 32)


def test_auxk_pulls_the_dead_and_leaves_the_living_alone() -> None:
    sae, x = make_sae(k=1), positions()
    silent = (sae(x, 5.0).n_fired == 0).nonzero().flatten()[:2]
    out = sae(x, 5.0, silent)
    (grad,) = torch.autograd.grad(out.auxk, [sae.W_dec])
    assert torch.equal((grad.abs().sum(1) > 0).nonzero().flatten(), silent)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_no_dense_tensor_is_kept_for_the_backward_pass_or_made_in_it(architecture: Architecture) -> None:
    n, d_in, d_sae, k = 50, 8, 70, 4
    sae, x = make_sae(architecture, d_in=d_in, d_sae=d_sae, k=k), positions(n, d_in)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    forward, backward = _Shapes(), _Shapes()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), forward:
        out = sae(x, 5.0, torch.tensor([3, 5]))
    with backward:
        out.loss.backward()
    assert (n * k,) in kept
    assert (n, d_sae) in forward.shapes  # the encoder's product, gone by now
    assert (d_sae, d_in) in backward.shapes
    for shape in [*kept, *backward.shapes]:
        assert torch.Size(shape).numel() != n * d_sae, shape
    for shape in [*kept, *forward.shapes, *backward.shapes]:
        assert torch.Size(shape).numel() != n * k * d_in, shape


class _Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the shape of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.shapes.append(tuple(value.shape))
        return result


def test_under_bf16_autocast_the_weights_and_the_sums_stay_float32() -> None:
    sae, x = make_sae().float(), positions(200).float()
    exact = sae(x, 5.0, torch.tensor([2]))
    exact.loss.backward()
    wanted = [parameter.grad.clone() for parameter in sae.parameters() if parameter.grad is not None]
    sae.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = sae(x, 5.0, torch.tensor([2]))
    rounded.loss.backward()
    assert rounded.loss.dtype == torch.float32
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    for parameter, grad in zip(sae.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert F.cosine_similarity(parameter.grad.flatten(), grad.flatten(), dim=0) > 0.98


def test_a_code_computed_by_hand() -> None:
    sae = SparseAutoencoder(SaeConfig(d_in=2, d_sae=3, k=2)).double()
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
        sae.encoder.bias.copy_(torch.tensor([0.5, 0, 0]))
        sae.W_dec.copy_(torch.tensor([[0.6, 0.8], [0, 1], [1, 0]]))
        sae.b_dec.copy_(torch.tensor([1.0, -1]))
    code = sae.encode(torch.tensor([[2.0, 3.0], [1.0, -2.0]], dtype=torch.float64))
    assert code.indices[0].tolist() == [1, 0]
    assert code.values.tolist() == [[4.0, 1.5], [0.5, 0.0]]  # the second row's next best, 0, is not active
    assert sae.decode(code).flatten().tolist() == pytest.approx([1.9, 4.2, 1.3, -0.6], abs=1e-6)


def test_decode_and_the_training_reconstruction_agree() -> None:
    sae, x = make_sae(), positions()
    rebuilt = sae.decode(sae.encode(x))
    assert sae(x, 1.0).fvu.item() == pytest.approx((x - rebuilt).square().sum().item() / N, rel=1e-12)


def test_a_batchtopk_code_has_as_many_latents_as_pass_the_threshold() -> None:
    sae, x = make_sae("batchtopk"), positions(40)
    assert sae.threshold is not None
    sae(x, 1.0)
    first = sae.threshold[0].item()
    pre = ((x - sae.b_dec) @ sae.encoder.weight.T + sae.encoder.bias).relu()
    assert first == pytest.approx(pre.flatten().topk(40 * K).values[-1].item())  # the smallest active value
    sae(2 * x, 1.0)
    assert sae.threshold[0].item() != first
    code = sae.encode(x)
    active = pre > sae.threshold
    assert torch.equal((code.indices >= 0).sum(1), active.sum(1))
    assert len(set(active.sum(1).tolist())) > 1  # rows differ, so some are padded
    assert (code.values[code.indices < 0] == 0).all()
    torch.testing.assert_close(sae.decode(code), (pre * active) @ sae.W_dec + sae.b_dec)
    alone = sae.encode(x[3:4])
    assert torch.equal(alone.indices[0], code.indices[3, : alone.indices.shape[1]])


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_no_position_and_no_active_latent_are_fine(architecture: Architecture) -> None:
    sae = make_sae(architecture)
    assert sae.decode(sae.encode(positions(0))).shape == (0, D_IN)
    with torch.no_grad():
        sae.encoder.bias.fill_(-1e3)
    code = sae.encode(positions(4))
    assert torch.equal(sae.decode(code), sae.b_dec.expand(4, -1))


def test_batch_top_k_shares_the_latents_out_over_the_rows() -> None:
    pre = torch.tensor([[5.0, 4, 3], [1, -1, 0.5]])
    values, pattern = batch_top_k(pre, 2)
    assert values.tolist() == [5, 4, 3, 1]
    assert pattern.rows.tolist() == [0, 0, 0, 1]
    assert pattern.latents.tolist() == [0, 1, 2, 0]
    values, pattern = top_k(pre, 2)
    assert (values.tolist(), pattern.latents.tolist()) == ([5, 4, 1, 0.5], [0, 1, 0, 2])


def test_the_decoder_keeps_unit_norm_and_loses_only_the_gradient_along_its_rows() -> None:
    sae = make_sae()
    sae(positions(), 5.0).loss.backward()
    grad = sae.W_dec.grad
    assert grad is not None
    before = grad.clone()
    sae.remove_parallel_gradient()
    assert ((grad * sae.W_dec).sum(1).abs() < 1e-12).all()
    across = before - (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    torch.testing.assert_close(grad, across)
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.normalize_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_folded_sae_reads_unscaled_activations(architecture: Architecture) -> None:
    sae, x, scale = make_sae(architecture), positions(), 0.05
    sae(x, 1.0)  # BatchTopK gets its threshold, which is the smallest active value: rounding would decide the tie
    if sae.threshold is not None:
        sae.threshold.mul_(0.999)
    folded = sae.for_unscaled_input(scale)
    code, raw = sae.encode(x), folded.encode(x / scale)
    assert torch.equal(code.indices, raw.indices)
    torch.testing.assert_close(raw.values, code.values / scale)
    torch.testing.assert_close(folded.decode(raw), sae.decode(code) / scale)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))


def test_the_initial_weights_are_a_function_of_the_generator_alone() -> None:
    first, second = (
        SparseAutoencoder(SaeConfig(4, 8, 2), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.W_dec, second.W_dec)
    assert torch.equal(first.encoder.weight, ENCODER_NORM * first.W_dec)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k is 9.*d_sae = 8"):
        SaeConfig(d_in=4, d_sae=8, k=9)
    with pytest.raises(ValueError, match="gated"):
        SaeConfig(d_in=4, d_sae=8, k=2, architecture="gated")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        SaeConfig(d_in=4, d_sae=8, k=0)
    sae = make_sae()
    with pytest.raises(ValueError, match=rf"\[N, {D_IN}\], not \[2, 5\]"):
        sae.encode(torch.zeros(2, 5))


@pytest.mark.parametrize("t", [1.0, 0.5, 0.0, "all"])
def test_an_id_and_its_folder_are_the_same(t: Any) -> None:
    sae_id = SaeId("mid_block.attentions.0", "cond", t)
    assert sae_id.path == f"mid_block.attentions.0/cond/t{t}"
    assert SaeId.parse(sae_id.path) == sae_id
    assert SaeId("m", "cond", 1).path == "m/cond/t1.0"


@pytest.mark.parametrize("path", ["", "mid", "mid/cond", "mid/both/t0.5", "mid/cond/t", "mid/cond/tx", "/cond/t1.0"])
def test_another_folder_is_no_sae(path: str) -> None:
    with pytest.raises(ValueError, match="no SAE's folder"):
        SaeId.parse(path)


def test_padding_of_a_code_decodes_to_zero() -> None:
    sae = make_sae()
    code = Code(torch.tensor([[2, -1], [5, 6]]), torch.tensor([[1.0, 9.0], [1.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(sae.decode(code)[0], sae.W_dec[2] + sae.b_dec)
