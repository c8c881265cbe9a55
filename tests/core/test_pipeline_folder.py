"""What a folder is, told before its weights are read: each way in which one was wrong somewhere, and the remedy."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import find_model
from core.components import check_components, latent_side
from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.errors import ModelError
from core.hub import hub_answer
from core.spec import ModelSpec
from tests.conftest import make_pipeline

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 492265168\n"
UNET = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 768, "sample_size": 64}
VAE = {"latent_channels": 4}
TEXT = {"hidden_size": 768}


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(model_folder, tmp_path / "m")
    return tmp_path / "m"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda p: p.write_text(POINTER), r"Git LFS pointer in place of a file of 492 MB.*git lfs pull"),
        (lambda p: p.write_bytes(p.read_bytes()[:-5]), r"is cut short: it has \d+ bytes and its header names \d+"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "damaged, cut short or no safetensors file.*100 bytes"),
        (lambda p: p.write_bytes(b""), "cut short.*0 bytes"),
        (lambda p: p.write_text("<!DOCTYPE html><title>404</title>"), "no safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "is damaged"),
    ],
)
def test_weights_that_are_not_whole_are_told(folder: Path, part: str, damage: Callable[[Path], Any], told: str) -> None:
    damage(folder / WEIGHTS[part])
    with pytest.raises(ModelError, match=rf"(?s){part}.*{told}"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "model_index.json",
    ],
)  # fmt: skip
def test_every_small_file_is_looked_at(folder: Path, name: str) -> None:
    whole = (folder / name).read_text()
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer"):
        find_model(folder)
    (folder / name).write_text(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=rf"{name} is not JSON.*cut short"):
        find_model(folder)
    (folder / name).write_text("[1]")
    with pytest.raises(ModelError, match="not a JSON object"):
        find_model(folder)


def test_a_variant_that_is_there_is_read_where_the_other_is_a_pointer(folder: Path) -> None:
    plain = folder / WEIGHTS["unet"]
    shutil.copy(plain, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    plain.write_text(POINTER)
    assert load_model(folder, device="cpu").generate("a cat", num_inference_steps=1).latents.isfinite().all()


def test_a_missing_part_of_sharded_weights_is_named(folder: Path) -> None:
    plain = folder / WEIGHTS["vae"]
    plain.rename(plain.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    with pytest.raises(ModelError, match=r"lacks vae/.*00002-of-00002\.safetensors, one of 2 parts"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_lack_tensors_are_refused_and_not_made_up(folder: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS[part])
    lost = sorted(name for name in tensors if name.endswith("weight"))[0]
    del tensors[lost]
    save_file(tensors, folder / WEIGHTS[part], metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"weights of .*{part} lack 1 tensors, such as"):
        load_model(folder, device="cpu")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change(folder / "unet" / "config.json", block_out_channels=[8, 32])
    with pytest.raises(ModelError, match="could not be loaded from"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("components", "told"),
    [
        ({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}, "FluxPipeline"),
        ({"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "X"]}, "two text encoders"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "'text_encoder' is a T5EncoderModel; CLIPTextModel"),
        ({"tokenizer": ["transformers", "BertTokenizer"]}, "'tokenizer' is a BertTokenizer; CLIPTokenizer"),
        ({"unet": ["diffusers", "OnnxRuntimeModel"]}, "'unet' is a OnnxRuntimeModel"),
        ({"unet": [None, None]}, "has no 'unet'"),
        ({"scheduler": 3}, "has no 'scheduler'"),
    ],
)
def test_another_kind_of_pipeline_is_named(folder: Path, components: dict[str, Any], told: str) -> None:
    change(folder / "model_index.json", **components)
    with pytest.raises(ModelError, match=f"{told}.*StableDiffusionPipeline"):
        find_model(folder)


def test_a_tokenizer_without_its_files_is_told(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor vocab\.json"):
        find_model(folder)


@pytest.mark.parametrize(
    ("unet", "vae", "text", "told"),
    [
        ({"in_channels": 9}, {}, {}, "9 input channels .* have 4: it is an inpainting model"),
        ({"in_channels": 8}, {}, {}, "InstructPix2Pix"),
        ({}, {"latent_channels": 16}, {}, "have 16: they are of different models|decodes 16: they are of different"),
        ({"in_channels": 8, "out_channels": 8}, {}, {}, "draws latents of 8 channels and the autoencoder decodes 4"),
        ({"out_channels": 8}, {}, {}, "4 input and 8 output channels"),
        ({"cross_attention_dim": 1024}, {}, {}, "width 1024 .*768 .*768 is that of Stable Diffusion 1; 1024 .* 2"),
        ({"cross_attention_dim": [768, 1024]}, {}, {}, "width 768, 1024"),
        ({"encoder_hid_dim": 512}, {}, {}, "width 512"),
        ({"time_cond_proj_dim": 256}, {}, {}, "latent consistency model"),
        ({"addition_embed_type": "text_time"}, {}, {}, "Stable Diffusion XL"),
        ({"addition_embed_type": "image"}, {}, {}, "addition_embed_type 'image'"),
        ({"class_embed_type": "projection"}, {}, {}, "class labels"),
        ({"num_class_embeds": 1000}, {}, {}, "class labels"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, {}, {}, "IP-Adapter"),
    ],
)
def test_parts_that_do_not_fit_are_told(
    unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any], told: str
) -> None:
    check_components(UNET, VAE, TEXT)
    with pytest.raises(ModelError, match=told):
        check_components(UNET | unet, VAE | vae, TEXT | text)


def test_what_a_unet_can_be_given_is_let_pass() -> None:
    check_components(UNET | {"cross_attention_dim": [768, 768], "addition_embed_type": "text"}, VAE, TEXT)
    check_components(UNET | {"encoder_hid_dim": 768, "cross_attention_dim": 320}, VAE, TEXT)


def test_parts_are_checked_before_weights_are_read(folder: Path) -> None:
    change(folder / "unet" / "config.json", cross_attention_dim=48)
    (folder / WEIGHTS["unet"]).write_bytes(b"")
    with pytest.raises(ModelError, match="width 48"):
        load_model(folder)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zebra</w>"] = 9000
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="tokens up to number 9000 and the text encoder embeddings for"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(("size", "side"), [(64, 64), ([64, 64], 64), ((8, 8), 8)])
def test_a_square_is_a_number_or_an_equal_pair(size: Any, side: int) -> None:
    assert latent_side(size) == side


@pytest.mark.parametrize(("size", "told"), [([64, 96], "not square"), (None, "sample_size is None"), ("64", "'64'"),
                                            ([64], "not known"), (0, "not known"), (True, "not known")])  # fmt: skip
def test_other_sizes_are_told(size: Any, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        latent_side(size)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("models/sd.safetensors", "single-file checkpoint.*no such file.*from_single_file"),
        ("v1-5.ckpt", "a pickle that is never loaded here"),
        ("https://huggingface.co/some/model/tree/main", "named 'some/model'"),
        ("https://example.org/x", "named `owner/name`"),
    ],
)
def test_a_file_or_an_address_is_no_folder(name: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        find_model(name)


def test_a_folder_of_one_file_says_how_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "v1-5-pruned.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelError, match=r"There is no .*model_index.*v1-5-pruned\.safetensors is a whole model"):
        find_model(tmp_path)
    with pytest.raises(ModelError, match=r"single-file checkpoint; a model is a folder"):
        find_model(tmp_path / "v1-5-pruned.safetensors")


@pytest.mark.parametrize("name", ["AutoencoderTiny", "VQModel", "ConsistencyDecoderVAE"])
def test_an_autoencoder_without_a_posterior_is_refused_with_the_remedy(folder: Path, name: str) -> None:
    change(folder / "model_index.json", vae=["diffusers", name])
    with pytest.raises(ModelError, match=rf"class {name}, which.*AutoencoderKL\.from_pretrained.*model_index"):
        find_model(folder)


def test_a_tiny_autoencoder_in_a_pipeline_is_refused_too() -> None:
    from diffusers import AutoencoderTiny

    pipeline = make_pipeline()
    pipeline.vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    with pytest.raises(ModelError, match="AutoencoderTiny, which, made to look at drafts"):
        Diffuser(pipeline, ModelSpec("tiny", "nowhere"))


def answer(status: int, **headers: str) -> Exception:
    """An error of huggingface_hub at this answer."""
    error = OSError("an answer")
    error.response = type("Response", (), {"status_code": status, "headers": headers})()  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (answer(401), "does not know who asks.*hf auth login"),
        (answer(403), "refuses you.*hf auth login"),
        (answer(404), "none of this name.*Check the name"),
        (answer(429), "asked too often.*a few minutes"),
        (answer(429, **{"Retry-After": "30"}), "again in 30 seconds"),
        (answer(503), r"fault of its own \(503\)"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written.*HF_HOME"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written.*HF_HOME"),
        (OSError(errno.ENOSPC, "No space left on device"), "is full.*HF_HOME"),
        (TimeoutError("timed out"), r"not reached \(timed out\): check the network"),
    ],
)
def test_the_hubs_answer_is_told(error: Exception, told: str) -> None:
    assert re.search(told, hub_answer(error, "some/model"))
    outer = ValueError("cannot load")
    outer.__cause__ = error
    if "not reached" not in told:
        assert hub_answer(outer, "some/model") == hub_answer(error, "some/model")


def test_being_offline_and_a_wrong_revision_are_told() -> None:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RevisionNotFoundError

    assert "HF_HUB_OFFLINE is set" in hub_answer(OfflineModeIsEnabled("x"), "some/model")
    gated, revision = (kind.__new__(kind) for kind in (GatedRepoError, RevisionNotFoundError))
    assert "granted on request: ask at https://huggingface.co/some/model" in hub_answer(gated, "some/model")
    assert "no revision 'v9'" in hub_answer(revision, "some/model", "v9")
