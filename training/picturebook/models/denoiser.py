"""The denoiser: a text encoder and a U-Net, trained together to predict the noise in latents given a caption."""

from collections.abc import Callable, Sequence
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

from training.picturebook.models.latents import Latents, LayoutRows, draw_batch, draw_captions
from training.picturebook.models.loop import Batch
from training.picturebook.world.tokens import MAX_TOKENS, build_tokenizer
from training.picturebook.world.world import NOUNS, OBJECTS


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape and loss of the denoiser."""

    block_out_channels: tuple[int, int] = (64, 192)
    """Channels at 16 x 16 and at 8 x 8 cells: most of the width where it is cheap."""
    n_heads: tuple[int, int] = (1, 4)
    """Attention heads at the two levels."""
    layers_per_block: int = 1
    """Residual blocks per level on the way down; one more on the way up."""
    text_width: int = 128
    """Width of the text encoder, and of the cross-attention's keys."""
    text_layers: int = 3
    """Layers of the text encoder."""
    snr_gamma: float = 5.0
    """Loss weight min(snr, gamma) / snr of the noise's error (Hang et al. 2023, Min-SNR)."""
    noisy: float = 0.4
    """Fraction of samples moved to the noisiest third of the timesteps, where layout is decided; their captions name
    three objects or state a relation."""
    crowded: float = 0.4
    """Fraction of these whose captions name three objects."""
    layout_weight: float = 0.1
    """Weight of an auxiliary loss of the text encoder, before and during the U-Net's training: predicting the layout
    from the caption alone.

    The order of two objects is worth one or two bits of an image, too little for the noise loss to find in so short a
    training: after 230,000 samples, reversing a relation did not change that loss. Stable Diffusion's text encoder,
    too, was pretrained on images.
    """


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


class LayoutReader(nn.Module):
    """Predicts the object that covers each cell from the encoded text, as the U-Net reads it: one cross-attention from
    cells to tokens. Used in training only.
    """

    def __init__(self, width: int, n_cells: int, n_heads: int = 4) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.cells = nn.Parameter(torch.randn(n_cells, width) / width**0.5)
        self.keys, self.values = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.classes = nn.Linear(width, len(OBJECTS) + 1)

    def forward(self, text: Tensor) -> Tensor:
        """Logits [B, len(OBJECTS) + 1, n_cells] of an encoded text [B, L, width]."""
        queries = self.cells.to(text.dtype).expand(len(text), -1, -1)
        query, key, value = (
            part.reshape(len(text), part.shape[1], self.n_heads, -1).transpose(1, 2)
            for part in (queries, self.keys(text), self.values(text))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        logits: Tensor = self.classes(attended.transpose(1, 2).flatten(2))
        return logits.transpose(1, 2)


class TextLoss(nn.Module):
    """Cross-entropy of the layout predicted from the encoded caption."""

    def __init__(self, config: DenoiserConfig, size: int) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(config)
        self.layout_reader = LayoutReader(config.text_width, size**2)

    def forward(self, tokens: Tensor, layout: Tensor) -> Tensor:
        """Mean cross-entropy a cell of tokens [B, L] and layouts [B, h, w] of classes."""
        logits = self.layout_reader(self.text_encoder(tokens)[0])
        return nn.functional.cross_entropy(logits.float(), layout.flatten(1))


class TextTask:
    """The training task of the text encoder, before the U-Net's."""

    name = "text"
    draws_on_device = True
    compiled: Sequence[nn.Module] = ()

    def __init__(self, config: DenoiserConfig, data: Latents, held_out: Latents) -> None:
        self.data, self.held_out = data, held_out
        self.model: nn.Module = TextLoss(config, data.latents.shape[-1])

    def batch_maker(self, n: int) -> Callable[[int], Batch]:
        """Batches of whole captions and layouts."""
        return partial(draw_captions, self.data, n=n)

    def show(self, model: nn.Module, path: Path) -> dict[str, float]:  # noqa: ARG002 (there is nothing to draw)
        """Cross-entropy on held-out scenes, with their captions and with relations reversed."""
        device = next(model.parameters()).device
        tokens, layout = self.held_out.tokens[:, 0].long(), self.held_out.layout.long().to(device)
        as_captioned, turned = (model(words.to(device), layout) for words in (tokens, turn_relations(tokens)))
        return {"held_out_loss": float(as_captioned), "held_out_loss_turned": float(turned)}


class DenoiserLoss(nn.Module):
    """Squared error of the predicted noise, weighted by signal-to-noise ratio."""

    abar: Tensor

    def __init__(self, config: DenoiserConfig, latent_channels: int, size: int) -> None:
        super().__init__()
        self.config = config
        self.unet = build_unet(config, latent_channels, size)
        self.text_encoder = build_text_encoder(config)
        self.layout_reader = LayoutReader(config.text_width, size**2)
        self.register_buffer("abar", DDIMScheduler(**SCHEDULE).alphas_cumprod.float(), persistent=False)

    def forward(self, latents: Tensor, tokens: Tensor, noise: Tensor, timesteps: Tensor, layout: Tensor) -> Tensor:
        """Loss of latents and noise [B, C, h, w], tokens [B, L], timesteps [B], and layout [B, h, w] of classes."""
        text = self.text_encoder(tokens)[0]
        loss = self.denoising(latents, text, noise, timesteps).mean()
        if self.training and self.config.layout_weight:
            logits = self.layout_reader(text).float()
            loss = loss + self.config.layout_weight * nn.functional.cross_entropy(logits, layout.flatten(1))
        return loss

    def denoising(self, latents: Tensor, text: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Weighted error [B] of the noise's prediction for encoded texts [B, L, width]."""
        abar = self.abar[timesteps][:, None, None, None]
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        predicted = self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        snr = (abar / (1 - abar)).flatten()
        weighted: Tensor = error * snr.clamp(max=self.config.snr_gamma) / snr
        return weighted


class DenoiserTask:
    """The training task of the denoiser, on precomputed latents."""

    name = "denoiser"
    draws_on_device = True

    def __init__(
        self,
        config: DenoiserConfig,
        data: Latents,
        held_out: Latents,
        draw: Callable[["DenoiserLoss"], Image.Image],
    ) -> None:
        self.config, self.data, self.held_out, self.draw = config, data, held_out, draw
        model = DenoiserLoss(config, data.latents.shape[1], data.latents.shape[-1])
        if torch.cuda.is_available():
            model.unet.to(memory_format=torch.channels_last)
        else:
            # On a CPU, the backward pass of torch's fused attention is slower than that of plain matrix products.
            model.unet.set_attn_processor(AttnProcessor())
        self.model: nn.Module = model
        self.compiled: Sequence[nn.Module] = (model.unet,)

    def batch_maker(self, n: int) -> Callable[[int], Batch]:
        """Batches of latents, captions, noise, timesteps and layouts."""
        return partial(
            draw_batch,
            self.data,
            n=n,
            timesteps=N_TIMESTEPS,
            noisy=self.config.noisy,
            crowded=self.config.crowded,
            layout_rows=find_layout_rows(self.data.tokens[:, 0].long()),
        )

    def show(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Loss on held-out scenes with fixed noise, and accuracy on relations; a sheet of images of captions."""
        assert isinstance(model, DenoiserLoss)
        device = next(model.parameters()).device
        losses = []
        for number in range(4):
            batch = draw_batch(self.held_out, number, 64, N_TIMESTEPS)
            losses.append(model(**{key: value.to(device) for key, value in batch.items()}).float())
        self.draw(model).save(path, quality=90)
        return {
            "held_out_loss": float(torch.stack(losses).mean()),
            "relations_told_apart": relations_told_apart(model, self.held_out),
        }


def relations_told_apart(model: DenoiserLoss, data: Latents, n: int = 96) -> float:
    """Fraction of scenes whose noise is predicted better with their caption than with its relation reversed, summed
    over a few noisy timesteps. Chance is 0.5.
    """
    device = next(model.parameters()).device
    whole = data.tokens[:, 0].long()
    turned = turn_relations(whole)
    rows = (whole != turned).any(1).nonzero().flatten()[:n]
    latents = data.latents[rows].float().to(device)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(device)
    margin = torch.zeros(len(rows), device=device)
    for fraction in (0.6, 0.7, 0.8, 0.9):
        timesteps = torch.full((len(rows),), int(fraction * N_TIMESTEPS), device=device)
        right, wrong = (
            model.denoising(latents, model.text_encoder(tokens[rows].to(device))[0], noise, timesteps)
            for tokens in (whole, turned)
        )
        margin += wrong - right
    return float((margin > 0).float().mean())


def find_layout_rows(tokens: Tensor) -> LayoutRows:
    """The rows of whole captions, tokens [N, L], that state a relation, and those that name three objects."""
    tokenizer = build_tokenizer()
    nouns = tokenizer.convert_tokens_to_ids([f"{word}</w>" for noun in NOUNS for word in noun.words])
    n_objects = torch.isin(tokens, torch.tensor(nouns, device=tokens.device)).sum(1)
    related = (tokens != turn_relations(tokens)).any(1)
    return LayoutRows(related.nonzero().flatten(), (n_objects == 3).nonzero().flatten())


def turn_relations(tokens: Tensor) -> Tensor:
    """Tokens with left and right, and above and below, exchanged."""
    tokenizer = build_tokenizer()
    turned = tokens.clone()
    for first, second in (("left", "right"), ("above", "below")):
        a, b = (tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in (first, second))
        turned[tokens == a], turned[tokens == b] = b, a
    return turned
