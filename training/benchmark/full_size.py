"""Stable Diffusion v1.4 with its published configuration, but with random weights and a byte-level tokenizer; and
stand-ins for its prompts and its segmenter.

Shapes, memory and time are those of the real model; the images are noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core.segmentation.semantic import Segmentation

N_TOKENS = 49408
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """Widths and depths of the model; the defaults are those of Stable Diffusion v1.4."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of the U-Net's four levels."""
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of the autoencoder's four levels."""
    text_width: int = 768
    """Width of the text encoder, a multiple of its head size 64."""
    text_layers: int = 12
    """Layers of the text encoder."""
    latent_side: int = 64
    """Height and width of the latents; images are 8 times as large."""

    @property
    def updates(self) -> tuple[tuple[int, int, int], ...]:
        """(C, H, W) of the residual updates at v1.4's hookpoints: third down block, middle block, second up block."""
        third, middle = self.latent_side // 4, self.latent_side // 8
        return (
            (self.channels[2], third, third),
            (self.channels[3], middle, middle),
            (self.channels[2], third, third),
        )


FULL = Size()
SMALL = Size((32, 64, 64, 64), (32, 32, 32, 32), 64, 2, 16)
"""The same blocks with few channels, for quick checks."""


def components(size: Size = FULL) -> dict[str, torch.nn.Module]:
    """Text encoder, VAE and U-Net with new weights, on the default device (set by `with torch.device(...)`)."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=N_TOKENS,
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_width // 64,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=size.text_width,
            bos_token_id=N_TOKENS - 2,
            eos_token_id=N_TOKENS - 1,
            pad_token_id=N_TOKENS - 1,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=size.vae_channels,
        layers_per_block=2,
        latent_channels=4,
        sample_size=8 * size.latent_side,
        scaling_factor=0.18215,
    )
    unet = UNet2DConditionModel(
        sample_size=size.latent_side,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=size.channels,
        layers_per_block=2,
        cross_attention_dim=size.text_width,
        attention_head_dim=8,
    )
    return {"text_encoder": text_encoder, "vae": vae, "unet": unet}


def make_pipeline(
    size: Size = FULL,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    tokenizer: CLIPTokenizer | None = None,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """A pipeline with random weights.

    Args:
        size: Size of the model.
        dtype: Data type of the weights, which are initialised in float32 and then converted.
        device: Device on which they are initialised.
        tokenizer: Tokenizer of the prompts; by default `byte_tokenizer()`.
        seed: Seed of the weights.
    """
    torch_device = torch.device(device)
    # The libraries initialise weights from the global generators, whose state is restored afterwards.
    with torch.random.fork_rng(devices=[torch_device] if torch_device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch_device:
            modules: Mapping[str, Any] = {
                name: torch.nn.Module.to(module, dtype=dtype) for name, module in components(size).items()
            }
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        **modules,
        tokenizer=tokenizer or byte_tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(folder: Path, dtype: torch.dtype, size: Size = FULL, seed: int = 0) -> None:
    """Write the pipeline to a folder that `core.load_model` can read; at full size 2.1 GB in half precision."""
    make_pipeline(size, dtype=dtype, seed=seed).save_pretrained(folder, safe_serialization=True)


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with v1.4's vocabulary size but no merges: every byte of a word is a token."""
    letters = list(_bytes_to_unicode().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters)]
    fillers = [f"<|unused{i}|>" for i in range(N_TOKENS - len(pieces) - 2)]
    vocab = {piece: i for i, piece in enumerate([*pieces, *fillers, START, END])}
    return CLIPTokenizer(vocab=vocab, merges=[], bos_token=START, eos_token=END, pad_token=END, model_max_length=77)


def _bytes_to_unicode() -> dict[int, str]:
    """The printable character that byte-level BPE uses for each byte: itself, or a character from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class ConstantPrompt:
    """A prompt source that always gives the same prompt."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    def prompt(self, number: int) -> str:
        """The prompt, whatever the number."""
        del number
        return self._prompt


class HalvesSegmenter:
    """A stand-in for a segmenter: it finds one class in the left half of every image and another in the right half."""

    def class_names(self) -> tuple[str, ...]:
        """The names of the two classes."""
        return ("left", "right")

    def segment(self, images: Sequence[Image.Image]) -> Segmentation:
        """The same two masks for every image, with scores of 1."""
        width, height = images[0].size
        left = torch.zeros(height, width, dtype=torch.bool)
        left[:, : width // 2] = True
        return Segmentation(torch.stack([left, ~left]).repeat(len(images), 1, 1, 1), torch.ones(len(images), 2))
