"""The denoiser: a text encoder and a U-Net, trained together to tell the noise in latents from a caption."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from training.loop import Batch
from training.picturebook.latents import Latents, draw_batch
from training.picturebook.tokens import MAX_TOKENS, build_tokenizer


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape and loss of the denoiser."""

    block_out_channels: tuple[int, int] = (64, 192)
    """Channels at 16 x 16 and at 8 x 8 cells: most of the width where it is cheap."""
    n_heads: tuple[int, int] = (1, 4)
    """Attention heads at the two levels."""
    layers_per_block: int = 1
    """Residual blocks a level on the way down; one more on the way up."""
    text_width: int = 128
    """Width of the text encoder, and of the cross-attention's keys."""
    text_layers: int = 3
    """Layers of the text encoder."""
    snr_gamma: float = 5.0
    """Loss weight min(snr, gamma) / snr of the noise's error (Hang et al. 2023, Min-SNR)."""


N_TIMESTEPS = 1000
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": N_TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
"""Stable Diffusion's noise schedule."""


def build_unet(config: DenoiserConfig, latent_channels: int, size: int) -> UNet2DConditionModel:
    """An untrained U-Net of two levels with cross-attention at both and in the middle."""
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.text_width,
        # In diffusers this argument has always meant the number of heads.
        attention_head_dim=config.n_heads,
        norm_num_groups=16,
    )


def build_text_encoder(config: DenoiserConfig) -> CLIPTextModel:
    """An untrained CLIP text encoder for the captions' vocabulary."""
    tokenizer = build_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class DenoiserLoss(nn.Module):
    """Squared error of the predicted noise, weighted by signal-to-noise ratio."""

    abar: Tensor

    def __init__(self, config: DenoiserConfig, latent_channels: int, size: int) -> None:
        super().__init__()
        self.config = config
        self.unet = build_unet(config, latent_channels, size)
        self.text_encoder = build_text_encoder(config)
        self.register_buffer("abar", DDIMScheduler(**SCHEDULE).alphas_cumprod.float(), persistent=False)

    def forward(self, latents: Tensor, tokens: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Loss of latents and noise [B, C, h, w], tokens [B, L] and timesteps [B]."""
        abar = self.abar[timesteps][:, None, None, None]
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        text = self.text_encoder(tokens)[0]
        predicted = self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        snr = (abar / (1 - abar)).flatten()
        loss: Tensor = (error * snr.clamp(max=self.config.snr_gamma) / snr).mean()
        return loss


class DenoiserTask:
    """Training of the denoiser on latents computed before."""

    name = "denoiser"

    def __init__(
        self,
        config: DenoiserConfig,
        data: Latents,
        held_out: Latents,
        draw: Callable[["DenoiserLoss"], Image.Image],
    ) -> None:
        self.data, self.held_out, self.draw = data, held_out, draw
        model = DenoiserLoss(config, data.latents.shape[1], data.latents.shape[-1])
        if not torch.cuda.is_available():
            # On a CPU, the backward pass of torch's fused attention is slower than that of plain matrix products.
            model.unet.set_attn_processor(AttnProcessor())
        self.model: nn.Module = model

    def batch_maker(self, n: int) -> Callable[[int], Batch]:
        """Batches of latents, captions, noise and timesteps."""
        return partial(draw_batch, self.data, n=n, timesteps=N_TIMESTEPS)

    def show(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Loss on held-out scenes with fixed noise; a sheet of drawn captions."""
        assert isinstance(model, DenoiserLoss)
        device = next(model.parameters()).device
        losses = []
        for number in range(4):
            batch = draw_batch(self.held_out, number, 64, N_TIMESTEPS)
            losses.append(model(**{key: value.to(device) for key, value in batch.items()}).float())
        self.draw(model).save(path, quality=90)
        return {"held_out_loss": float(torch.stack(losses).mean())}
