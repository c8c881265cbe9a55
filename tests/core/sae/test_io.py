import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import core
from core.errors import ArtifactError
from core.sae import collection as sae_source
from core.sae import io as sae_files
from core.sae.autoencoder import Architecture, SaeConfig, SaeId, SparseAutoencoder
from core.sae.collection import list_saes, load_sae, write_index
from core.sae.io import read_sae, save_sae

MIDDLE = SaeId("mid_block.attentions.0", "cond", "all")


def make_sae(architecture: Architecture = "topk") -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(6, 24, 3, architecture), generator=generator, metadata={"model": "small"})
    with torch.no_grad():
        sae.encoder.bias.copy_(torch.randn(24, generator=generator))
        sae.b_dec.copy_(torch.randn(6, generator=generator))
        if sae.threshold is not None:
            sae.threshold.fill_(1.25)
    return sae


def positions() -> torch.Tensor:
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_round_trip_through_files_is_exact(tmp_path: Path, architecture: Architecture) -> None:
    sae = make_sae(architecture)
    save_sae(sae, tmp_path, {"t": "all", "fvu": 0.25})
    again = read_sae(tmp_path)
    code, same = sae.encode(positions()), again.encode(positions())
    assert torch.equal(code.indices, same.indices)
    assert torch.equal(code.values, same.values)
    assert torch.equal(sae.decode(code), again.decode(same))
    assert again.cfg == sae.cfg
    assert again.metadata == {"model": "small", "t": "all", "fvu": 0.25, "k": 3}


def test_the_files_are_saelens_v6(tmp_path: Path) -> None:
    sae = make_sae()
    save_sae(sae, tmp_path, dtype=torch.float16)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert {key: cfg[key] for key in ("architecture", "d_in", "d_sae", "k", "dtype")} == {
        "architecture": "topk",
        "d_in": 6,
        "d_sae": 24,
        "k": 3,
        "dtype": "float32",  # over fp16 weights too
    }
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert {name: (tuple(value.shape), value.dtype) for name, value in weights.items()} == {
        "W_enc": ((6, 24), torch.float16),
        "b_enc": ((24,), torch.float16),
        "W_dec": ((24, 6), torch.float16),
        "b_dec": ((6,), torch.float16),
    }
    # As SAELens computes it: the k largest of (x - b_dec) W_enc + b_enc.
    full = {name: value.float() for name, value in weights.items()}
    pre = (positions() - full["b_dec"]) @ full["W_enc"] + full["b_enc"]
    again = read_sae(tmp_path)
    assert again.W_dec.dtype == torch.float32
    assert torch.equal(again.encode(positions()).indices, pre.topk(3).indices)


def test_batchtopk_is_saved_as_jumprelu_with_a_threshold(tmp_path: Path) -> None:
    save_sae(make_sae("batchtopk"), tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"].tolist() == [1.25] * 24


def test_tensors_that_share_their_memory_are_saved_whole(tmp_path: Path) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.encoder.weight = sae.W_dec  # type: ignore[assignment]
    save_sae(sae, tmp_path)
    assert torch.equal(read_sae(tmp_path).encoder.weight, sae.W_dec)


def test_a_sparsify_folder_is_read_and_its_training_keys_ignored(tmp_path: Path) -> None:
    sae = make_sae()
    save_file({name: value.clone() for name, value in sae.state_dict().items()}, tmp_path / "sae.safetensors")
    cfg = {"activation": "topk", "expansion_factor": 4, "num_latents": 0, "k": 3, "d_in": 6, "signed": False}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    again = read_sae(tmp_path)
    assert torch.equal(again.encode(positions()).values, sae.encode(positions()).values)
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "skip_connection": True}))
    with pytest.raises(ArtifactError, match="not a plain TopK"):
        read_sae(tmp_path)


def test_a_damaged_folder_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cfg\.json does not exist"):
        read_sae(tmp_path)
    save_sae(make_sae(), tmp_path)
    weights, config = tmp_path / "sae_weights.safetensors", tmp_path / "cfg.json"
    whole, cfg = weights.read_bytes(), json.loads(config.read_text())
    for n_bytes in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:n_bytes])
        with pytest.raises(ArtifactError, match=r"sae_weights\.safetensors is damaged or truncated"):
            read_sae(tmp_path)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"sae_weights\.safetensors does not exist"):
        read_sae(tmp_path)
    weights.write_bytes(whole)
    for change, message in (
        ({"d_sae": 23}, r"W_dec is \[24, 6\]; cfg\.json asks for \[23, 6\]"),
        ({"k": 25}, r"k is 25"),
        ({"k": "3"}, "cfg.json"),
        ({"architecture": "gated"}, "'gated' SAE; only topk and jumprelu"),
        ({"normalize_activations": "layer_norm"}, "only 'none' can be read"),
    ):
        config.write_text(json.dumps({**cfg, **change}))
        with pytest.raises(ArtifactError, match=message):
            read_sae(tmp_path)
    for text in ("{", "[]"):
        config.write_text(text)
        with pytest.raises(ArtifactError, match="JSON"):
            read_sae(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_sae(make_sae(), tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    del weights["b_dec"]
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ArtifactError, match="b_dec is not there"):
        read_sae(tmp_path)


def test_a_kill_while_an_sae_is_replaced_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def killed(*_: object) -> None:
        raise Killed

    save_sae(make_sae(), tmp_path)
    old = read_sae(tmp_path)
    other = make_sae()
    with torch.no_grad():
        other.W_dec.neg_()
    with monkeypatch.context() as patch:
        patch.setattr(sae_files, "save_file", killed)
        with pytest.raises(Killed):
            save_sae(other, tmp_path)
    assert torch.equal(read_sae(tmp_path).W_dec, old.W_dec)
    with monkeypatch.context() as patch:
        patch.setattr("core.files.os.replace", killed)
        with pytest.raises(Killed):
            save_sae(other, tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_sae(tmp_path)
    save_sae(other, tmp_path)
    assert torch.equal(read_sae(tmp_path).W_dec, other.W_dec)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_weights_that_fp16_cannot_hold_are_not_saved(tmp_path: Path) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.b_dec[0] = 1e6
    with pytest.raises(ArtifactError, match="b_dec"):
        save_sae(sae, tmp_path, dtype=torch.float16)


# --- finding one ------------------------------------------------------------------------------------------------------


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    root = tmp_path / "saes"
    for sae_id in (MIDDLE, MIDDLE._replace(t=0.5), MIDDLE._replace(branch="uncond")):
        save_sae(make_sae(), root / sae_id.path, {"path": sae_id.path})
    return root


def test_a_collection_is_found_with_an_index_or_without(collection: Path) -> None:
    sae = core.load_sae(collection, "mid_block.attentions.0", "cond", 0.5)
    assert sae.metadata["path"] == "mid_block.attentions.0/cond/t0.5"
    found = list_saes(collection)
    assert len(found) == 3
    write_index(collection, found[:1], model="small")
    assert list_saes(collection) == found[:1]
    assert json.loads((collection / "config.json").read_text())["model"] == "small"


def test_an_sae_that_is_not_there_is_answered_with_what_is(collection: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Did you mean mid_block\.attentions\.0/cond/tall.*uncond/tall"):
        load_sae(collection, "mid_block.attention.0", "cond", "all")
    with pytest.raises(ArtifactError, match=r"no SAE mid_block\.attentions\.0/cond/t1\.0"):
        load_sae(collection, "mid_block.attentions.0", "cond", 1)
    shutil.rmtree(collection / "mid_block.attentions.0")
    with pytest.raises(ArtifactError, match="has no SAEs"):
        load_sae(collection, "mid_block.attentions.0", "cond", 1)


@pytest.mark.parametrize("source", ["picturbook", "./nowhere", "/nowhere/at/all", "sd-v1-4"])
def test_an_unknown_source_says_what_one_is(source: str) -> None:
    with pytest.raises(ArtifactError, match=r"neither built in \(picturebook\), nor a folder"):
        load_sae(source, "mid_block.attentions.0", "cond")


def test_embedded_saes_that_are_not_made_yet_say_how_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sae_source.EMBEDDED, "picturebook", tmp_path / "saes")
    with pytest.raises(ArtifactError, match="python -m training sae"):
        load_sae("picturebook", "mid_block.attentions.0", "cond")
