"""Files of SAELens, sparsify and SAeUron, against the formulas that these libraries publish; here written out again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from core.errors import ArtifactError
from core.sae.autoencoder import Code
from core.sae.io import read_sae, save_sae

D_IN, D_SAE, K = 16, 64, 4
GENERATOR_SEED = 3


def weights() -> dict[str, Tensor]:
    """W_enc [d_sae, d_in], b_enc, W_dec [d_sae, d_in] and b_dec."""
    g = torch.Generator().manual_seed(GENERATOR_SEED)
    return {
        "W_enc": torch.randn(D_SAE, D_IN, generator=g),
        "b_enc": 0.1 * torch.randn(D_SAE, generator=g),
        "W_dec": F.normalize(torch.randn(D_SAE, D_IN, generator=g), dim=1),
        "b_dec": 0.3 * torch.randn(D_IN, generator=g),
    }


def positions(n: int = 30) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(9))


def saelens(folder: Path, cfg: Mapping[str, Any] | None = None, **tensors: Tensor) -> Path:
    w, folder = weights(), folder / "saelens"
    folder.mkdir(parents=True)
    values = {
        "architecture": "topk",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": "6.18.0"},
    }
    values = {name: value for name, value in {**values, **(cfg or {})}.items() if value is not ...}
    (folder / "cfg.json").write_text(json.dumps(values))
    save_file({**w, "W_enc": w["W_enc"].T.contiguous()} | tensors, folder / "sae_weights.safetensors")
    return folder


def sparsify(folder: Path, cfg: Mapping[str, Any] | None = None, **tensors: Tensor) -> Path:
    w, folder = weights(), folder / "sparsify"
    folder.mkdir(parents=True)
    values = {
        "expansion_factor": 4,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": K,
        "multi_topk": False,
        "d_in": D_IN,
    }
    (folder / "cfg.json").write_text(json.dumps({**values, **(cfg or {})}))
    own = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    save_file(own | tensors, folder / "sae.safetensors")
    return folder


def pre_activations(x: Tensor) -> Tensor:
    w = weights()
    return (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]


def dense(code: Code) -> Tensor:
    """[N, d_sae] values; empty entries of the code have the index -1."""
    values = code.values.masked_fill(code.indices < 0, 0)
    return torch.zeros(len(values), D_SAE).scatter_add(1, code.indices.clamp_min(0), values)


def test_topk_of_both_libraries_is_their_formula(tmp_path: Path) -> None:
    values, indices = pre_activations(positions()).relu().topk(K)
    expected = torch.zeros(30, D_SAE).scatter(1, indices, values)
    for sae in (read_sae(saelens(tmp_path, {"k": 4.0})), read_sae(sparsify(tmp_path, {"multi_topk": True}))):
        code = sae.encode(positions())
        assert torch.allclose(dense(code), expected, atol=1e-6)
        assert torch.allclose(sae.decode(code), expected @ weights()["W_dec"] + weights()["b_dec"], atol=1e-5)
        assert sae.cfg.k == K
        assert type(sae.cfg.k) is int


def test_saelens_own_batchtopk_has_thresholds_and_no_k(tmp_path: Path) -> None:
    threshold = torch.linspace(-0.5, 3, D_SAE)
    folder = saelens(
        tmp_path, {"architecture": "jumprelu", "k": ..., "rescale_acts_by_decoder_norm": ...}, threshold=threshold
    )
    pre = pre_activations(positions())
    expected = pre.relu() * (pre > threshold.relu())
    sae = read_sae(folder)
    code = sae.encode(positions())
    assert torch.allclose(dense(code), expected, atol=1e-6)
    assert (code.values >= 0).all()
    save_sae(sae, tmp_path / "again")
    assert torch.equal(dense(read_sae(tmp_path / "again").encode(positions())), dense(code))


def test_saeurons_batch_topk_selects_over_all_positions_of_a_call(tmp_path: Path) -> None:
    latents = pre_activations(positions()).relu().flatten()
    values, places = latents.topk(K * 30)
    expected = torch.zeros_like(latents).scatter(0, places, values).view(30, D_SAE)
    sae = read_sae(sparsify(tmp_path, {"batch_topk": True, "sample_topk": False, "input_unit_norm": False}))
    code = sae.encode(positions())
    assert torch.allclose(dense(code), expected, atol=1e-6)
    per_position = (dense(code) > 0).sum(1)
    assert per_position.sum() == K * 30
    assert per_position.min() < K < per_position.max()
    assert sae.encode(positions()[:0]).values.shape == (0, 0)
    with pytest.raises(ArtifactError, match="BatchTopK without a threshold"):
        save_sae(sae, tmp_path / "again")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("signed", True),
        ("sample_topk", True),
        ("input_unit_norm", True),
        ("skip_connection", True),
        ("transcode", True),
        ("activation", "groupmax"),
        ("encoder_pkm", True),  # of a branch of sparsify: no field may be dropped
        ("k", 4.5),
        ("k", True),
        ("d_in", 16.5),
        ("num_latents", "64"),
        ("reads", "input"),
    ],
)
def test_a_field_of_sparsify_that_is_not_obeyed_is_named(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ArtifactError, match="output, not 'input'" if field == "reads" else field):
        read_sae(sparsify(tmp_path, {field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "standard"),
        ("architecture", "gated"),
        ("architecture", "transcoder"),
        ("architecture", "matryoshka_batchtopk"),
        ("architecture", "batchtopk"),
        ("rescale_acts_by_decoder_norm", True),
        ("normalize_activations", "layer_norm"),
        ("normalize_activations", "expected_average_only_in"),
        ("apply_b_dec_to_input", False),
        ("reshape_activations", "hook_z"),
        ("finetuning_scaling_factor", True),
        ("k", 4.5),
        ("d_sae", 10**18),
        ("metadata", [1]),
    ],
)
def test_a_field_of_saelens_that_is_not_obeyed_is_named(tmp_path: Path, field: str, value: object) -> None:
    shown = str(value) if field in ("architecture", "d_sae") else field
    with pytest.raises(ArtifactError, match=shown):
        read_sae(saelens(tmp_path, {field: value}))


def test_a_tensor_that_is_not_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'W_skip'"):
        read_sae(sparsify(tmp_path, W_skip=torch.zeros(D_IN, D_IN)))
    with pytest.raises(ArtifactError, match="'threshold'"):
        read_sae(saelens(tmp_path, threshold=torch.zeros(D_SAE)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_with_their_dtype(tmp_path: Path, value: float) -> None:
    bad = weights()["W_dec"].half()
    bad[5, 3] = value
    with pytest.raises(ArtifactError, match=r"W_dec has values that are not finite, stored as torch\.float16"):
        read_sae(sparsify(tmp_path, W_dec=bad))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_of_another_kind_are_named(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ArtifactError, match=f"b_dec is {dtype}"):
        read_sae(saelens(tmp_path, b_dec=torch.zeros(D_IN, dtype=dtype)))


def test_what_an_sae_reads_is_what_its_library_hooks(tmp_path: Path) -> None:
    assert read_sae(sparsify(tmp_path / "a")).cfg.reads == "output"
    assert read_sae(sparsify(tmp_path / "b"), reads="update").cfg.reads == "update"
    assert read_sae(saelens(tmp_path / "c")).cfg.reads == "update"
    hooked = read_sae(saelens(tmp_path / "d", {"metadata": {"hook_name": "unet.mid_block.attentions.0"}}))
    assert hooked.cfg.reads == "output"
    save_sae(hooked, tmp_path / "again")
    assert read_sae(tmp_path / "again").cfg.reads == "output"
