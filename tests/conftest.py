"""A small StableDiffusionPipeline with random weights: the embedded model's classes and shapes, untrained."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.hub import Hub, point_client_at, serve

if TYPE_CHECKING:  # the process that hands out the tests has no use for torch, and waits seconds for it
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from core.diffusion.diffuser import Diffuser

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: more threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, which reads it then

DEAR = (
    "tests/browser/",
    "tests/test_types.py",
    "tests/training/pipeline/",
    "tests/training/test_first_hour.py",
    "tests/training/sae/test_trainer.py",
    "tests/core/ui/",
)
"""What takes longest runs first, so that no process is left alone with it in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((n for n, start in enumerate(DEAR) if item.nodeid.startswith(start)), len(DEAR))

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: the order above, and all browser tests in one process, which share a page."""
    from xdist.scheduler import LoadFileScheduling

    class InOrder(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return DEAR[0] if nodeid.startswith(DEAR[0]) else str(super()._split_scope(nodeid))

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # by the number of tests, which says little about their time
    return InOrder(config, log)


TEXT = """moon desert photo a the and on in of cat dog whale ship house tree sun apple cake grass sea sky snow city
watercolour painting left right above below at night red blue green big small"""
MAX_LENGTH = 24


def word_tokenizer(words: list[str]) -> "CLIPTokenizer":
    """A CLIP tokenizer that knows whole words alone; its merges build each from its letters."""
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", ",</w>", ".</w>"]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        tokens += pieces
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            tokens.append(pieces[0])
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=MAX_LENGTH)
    # A merge made for one word can fire inside another; the order of the words above is one where none does.
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    return tokenizer


def make_pipeline(
    channels: int = 16, vae_channels: tuple[int, ...] = (8, 8, 16, 16), prediction_type: str = "epsilon"
) -> "StableDiffusionPipeline":
    """128x128 pixels, latents 8x16x16, U-Net levels 16x16 and 8x8 with cross-attention at the hookpoints."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = word_tokenizer(TEXT.split())
    n_tokens = len(tokenizer.get_vocab())
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=n_tokens,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=32,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=vae_channels,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=0.7,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(channels, 2 * channels),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    with torch.no_grad():  # random keys and values hardly tell one text from another; these do
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_k" in name:
                weight.mul_(8)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small pipeline on disk."""
    folder = tmp_path_factory.mktemp("models") / "small"
    make_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def model(model_folder: Path) -> "Diffuser":
    """The small model, loaded as a user would load it."""
    from core.diffusion.loading import load_model

    return load_model(model_folder, device="cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this computer, which the client in this process uses, with an empty cache and a token."""
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pause(min(seconds, 0.002)))  # between the client's attempts
    with serve() as running:
        point_client_at(running, tmp_path / "cache", monkeypatch)
        yield running
