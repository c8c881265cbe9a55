"""Collections of other libraries: where their SAEs lie, and what they read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import core
from core.activations.hooks import edit, record
from core.concepts.trace import CodeTracer, SaeSite, load_saes
from core.diffusion.diffuser import Diffuser
from core.errors import ArtifactError
from core.sae.autoencoder import SaeConfig, SaeId, SparseAutoencoder, output_hookpoints
from core.sae.collection import find_collection, list_saes
from core.sae.io import save_sae
from core.sae.layouts import find_saes
from tests.fakes.hub import Hub

BLOCK = "up_blocks.1.attentions.1"  # where SAeUron's autoencoders are; the small U-Net has it too
K = 3


def write_saeuron(folder: Path, channels: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """An SAE as SAeUron saves one; its weights."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * channels, channels, generator=g)
    weights = {
        "encoder.weight": rows,
        "encoder.bias": 0.1 * torch.randn(4 * channels, generator=g),
        "W_dec": F.normalize(rows, dim=1),
        "b_dec": torch.randn(channels, generator=g),
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae.safetensors")
    cfg = {"expansion_factor": 4, "num_latents": 0, "k": K, "batch_topk": True, "sample_topk": False, "d_in": channels}
    (folder / "cfg.json").write_text(json.dumps(cfg | {"input_unit_norm": False, "normalize_decoder": True}))
    return weights


@pytest.fixture
def saeuron(tmp_path: Path) -> Path:
    root = tmp_path / "SAeUron"
    write_saeuron(root / f"unet.{BLOCK}")
    (root / "config.json").write_text(json.dumps({"sae": {}, "hookpoints": [f"unet.{BLOCK}"]}))  # no index of ours
    return root


@pytest.mark.parametrize(
    ("folder", "config", "expected"),
    [
        ("mid_block.attentions.0/uncond/t0.5", {}, SaeId("mid_block.attentions.0", "uncond", 0.5)),
        ("unet.up_blocks.1.attentions.2", {}, SaeId("up_blocks.1.attentions.2", "cond", "all")),
        ("sae-ckpts/run/unet.mid_block.attentions.0/seed0", {}, SaeId("mid_block.attentions.0", "cond", "all")),
        (
            "first",
            {"metadata": {"hook_name": "unet.down_blocks.2.attentions.1"}},
            SaeId("down_blocks.2.attentions.1", "cond", "all"),
        ),
        ("first", {"hook_name": "blocks.8.hook_resid_pre"}, SaeId("blocks.8.hook_resid_pre", "cond", "all")),
        ("first", {"metadata": {"hookpoint": "mid", "branch": "uncond", "t": 0.5}}, SaeId("mid", "uncond", 0.5)),
        ("layers.5", {}, SaeId("layers.5", "cond", "all")),
        ("", {}, SaeId("root", "cond", "all")),
    ],
)
def test_an_sae_is_known_by_its_folder_or_its_configuration(
    folder: str, config: dict[str, object], expected: SaeId
) -> None:
    name = f"{folder}/cfg.json".removeprefix("/")
    assert find_saes(["README.md", name], lambda _: config, "root") == {expected: folder}


def test_the_first_of_several_for_one_hookpoint_is_used() -> None:
    names = [f"unet.{BLOCK}/seed{n}/cfg.json" for n in (1, 0)]
    assert find_saes(names, lambda _: {}, "root") == {SaeId(BLOCK, "cond", "all"): f"unet.{BLOCK}/seed0"}


def test_saeurons_folders_are_a_collection(saeuron: Path) -> None:
    assert list_saes(saeuron) == [SaeId(BLOCK, "cond", "all")]
    for source in (saeuron, saeuron / f"unet.{BLOCK}"):
        sae = core.load_sae(source, BLOCK, "cond")
        assert (sae.cfg.k, sae.cfg.architecture, sae.cfg.reads) == (K, "batchtopk", "output")
    with pytest.raises(ArtifactError, match=rf"no SAE {BLOCK}/uncond/tall. Did you mean {BLOCK}/cond/tall"):
        core.load_sae(saeuron, BLOCK, "uncond")


def test_sparsifys_format_in_our_folders_reads_updates(saeuron: Path, tmp_path: Path) -> None:
    shutil.copytree(saeuron / f"unet.{BLOCK}", tmp_path / "ours" / BLOCK / "cond" / "tall")
    assert core.load_sae(tmp_path / "ours", BLOCK, "cond").cfg.reads == "update"


def test_saeurons_repository_is_listed_and_works_offline_once_fetched(
    hub: Hub, saeuron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.relative_to(saeuron).as_posix(): path.read_bytes() for path in saeuron.rglob("*") if path.is_file()}
    hub.put("model", "some-one/SAeUron", files)
    assert find_collection("some-one/SAeUron").ids == [SaeId(BLOCK, "cond", "all")]
    once = core.load_sae("some-one/SAeUron", BLOCK, "cond")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.fail("info", 500, times=100)
    hub.fail("resolve", 500, times=100)
    again = core.load_sae("some-one/SAeUron", BLOCK, "cond")
    assert torch.equal(once.W_dec, again.W_dec)
    with pytest.raises(ArtifactError, match="could not be"):
        core.load_sae("some-one/else", BLOCK, "cond")


def test_an_sae_of_outputs_encodes_what_the_block_returns(model: Diffuser, saeuron: Path) -> None:
    weights = dict(load_weights(saeuron / f"unet.{BLOCK}"))
    saes = load_saes(saeuron, model)  # at a block that is none of the model's hookpoints
    site = SaeSite(BLOCK, "cond")
    assert list(saes) == [site]
    seen: list[torch.Tensor] = []
    handle = model.unet.get_submodule(BLOCK).register_forward_hook(lambda _m, _i, out: seen.append(out[0].clone()))
    tracer = CodeTracer(model, saes)
    try:
        model.generate("a cat", seed=1, num_inference_steps=2, contexts=[tracer.context])
    finally:
        handle.remove()
    for step, output in enumerate(seen):
        x = output[1].flatten(1).T  # the second half of the batch is the conditional branch, as SAeUron takes it
        latents = (F.linear(x - weights["b_dec"], weights["encoder.weight"], weights["encoder.bias"])).relu()
        values, places = latents.flatten().topk(K * len(x))
        expected = torch.zeros(latents.numel()).scatter(0, places, values).view_as(latents)
        code = tracer.trace().code(site, step)
        found = torch.zeros_like(latents).scatter_add(1, code.indices.clamp_min(0), code.values)
        torch.testing.assert_close(found, expected)


def test_edits_of_outputs_change_what_the_block_returns(model: Diffuser) -> None:
    hookpoint = model.hookpoints[0]
    run: Callable[[], torch.Tensor] = lambda: model.generate("a cat", seed=1, num_inference_steps=1).latents  # noqa: E731
    plain = run()
    with record(model, [hookpoint], outputs=[hookpoint]) as outputs, record(model, [hookpoint]) as updates:
        run()
    key = next(iter(outputs))
    assert not torch.equal(outputs[key], updates[key])

    def halve(_: object, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(0.5)  # in place, on a tensor of its own

    with (
        edit(model, halve, [hookpoint], outputs=[hookpoint]),
        record(model, [hookpoint], outputs=[hookpoint]) as halved,
    ):
        assert not torch.equal(run(), plain)
    torch.testing.assert_close(halved[key], outputs[key] / 2)
    with edit(model, lambda _, x: x, [hookpoint], outputs=[hookpoint]):
        assert torch.equal(run(), plain)


def test_one_hookpoint_is_read_in_one_way() -> None:
    def sae(reads: str) -> SparseAutoencoder:
        return SparseAutoencoder(SaeConfig(4, 8, 1, reads=reads))  # type: ignore[arg-type]

    both = {SaeSite("a", "cond"): sae("output"), SaeSite("b", "cond"): sae("update")}
    assert output_hookpoints(both) == {"a"}
    with pytest.raises(ValueError, match="At a one SAE reads"):
        output_hookpoints({**both, SaeSite("a", "uncond"): sae("update")})


def test_pickles_are_named_and_never_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "dl" / "trainer_0"
    folder.mkdir(parents=True)
    torch.save({"k": torch.tensor(4)}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK"}}))
    named = {
        tmp_path / "dl": "trainer_0/ae.pt, a pickle",
        folder: "ae.pt, a pickle",
        folder / "ae.pt": "it is a pickle",
    }
    for given, message in named.items():
        with pytest.raises(ArtifactError, match=message):
            core.load_sae(given, BLOCK, "cond")
    save_sae(SparseAutoencoder(SaeConfig(4, 8, 1)), tmp_path / "dl" / BLOCK / "cond" / "tall")
    weights = tmp_path / "dl" / BLOCK / "cond" / "tall" / "sae_weights.safetensors"
    weights.rename(weights.with_suffix(".pth"))
    with pytest.raises(ArtifactError, match=r"no sae_weights\.safetensors in the folder .*\.pth, a pickle"):
        core.load_sae(tmp_path / "dl", BLOCK, "cond")


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "sae.safetensors")
