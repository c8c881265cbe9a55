"""The parts of a Stable Diffusion pipeline: text encoder, noise predictor and image autoencoder."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from core.arguments import as_items
from core.components import check_autoencoder, check_components
from core.diffusion.hookpoints import check_hookpoints, nearest_hookpoints
from core.diffusion.latents import LatentCodec
from core.diffusion.predictor import Conditions
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.text_encoder import TEXT, TextEncoder
from core.diffusion.unet_predictor import UNetPredictor, sampler_notes, uncompiled
from core.diffusion.vocabulary import Vocabulary
from core.errors import ModelError
from core.hardware.batch_sizer import BatchSizer, memory_format_for
from core.hardware.graphs import CallGraphs
from core.hardware.memory import DEFAULT_LIMIT, DeviceMemory
from core.spec import ModelSpec

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


class PipelineParts:
    """Text to conditions, conditions and latents to noise, images to latents and back; no sampler."""

    spec: ModelSpec
    """The model's settings; hookpoints and image size as found in the loaded weights."""
    predictor: UNetPredictor
    """Predicts the noise."""
    text_encoder: TextEncoder
    """Makes the conditions of the predictor."""
    codec: LatentCodec
    """Encodes and decodes images."""
    notes: tuple[str, ...]
    """What of the pipeline is not used as it is, and what is in its place: parts of sentences about the model."""
    sizer: BatchSizer
    """Decides how many latents or images fit into a call."""

    def __init__(
        self,
        pipeline: "StableDiffusionPipeline",
        spec: ModelSpec,
        *,
        device: torch.device | None = None,
        memory_limit: int = DEFAULT_LIMIT,
    ) -> None:
        """Wrap a pipeline.

        Args:
            pipeline: Its U-Net, VAE, text encoder, tokenizer and scheduler are used.
            spec: The model's settings.
            device: Where parts compute that wait in main memory until then; None: all compute where they are.
            memory_limit: As for `DeviceMemory`, in bytes.

        Raises:
            ModelError: The parts do not fit together, or the U-Net needs more than a text; it predicts neither noise
                nor v, lacks a hookpoint of the spec, or has another image size.
        """
        unet, vae, text_module = pipeline.unet.eval(), pipeline.vae.eval(), pipeline.text_encoder.eval()
        check_autoencoder(type(vae).__name__)
        check_components(unet.config, vae.config, text_module.config.to_dict())
        for module in (unet, vae, text_module):
            module.requires_grad_(False)
        where = device or torch.device(unet.device)
        for module in (unet, vae):
            module.to(memory_format=memory_format_for(where))
        self.sizer = BatchSizer(DeviceMemory(where, memory_limit))
        self.text_encoder = TextEncoder(text_module, pipeline.tokenizer, device)
        self.predictor = UNetPredictor(
            unet, pipeline.scheduler, self.text_encoder.window_length, device=device, sizer=self.sizer
        )
        self.codec = LatentCodec(vae, self.predictor.latent_shape[-1], where, self.sizer)
        if spec.image_size is not None and spec.image_size != self.image_size:
            raise ModelError(f"{spec.name!r} should draw {spec.image_size} pixels, its weights {self.image_size}.")
        self._unet = uncompiled(unet)
        hookpoints = spec.hookpoints or nearest_hookpoints(self._unet)
        check_hookpoints(self._unet, hookpoints)
        self.spec = replace(spec, hookpoints=hookpoints, image_size=self.image_size)
        self.notes = tuple(sampler_notes(pipeline.scheduler))

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Names of the cross-attention blocks to record and edit, first to last."""
        return self.spec.hookpoints

    @property
    def unet(self) -> torch.nn.Module:
        """The U-Net, for hooks."""
        unet: torch.nn.Module = self._unet
        return unet

    @property
    def schedule(self) -> NoiseSchedule:
        """The trained noise schedule, and the sampler's steps through it."""
        return self.predictor.schedule

    @property
    def vocabulary(self) -> Vocabulary:
        """The words that the text encoder can read."""
        return self.text_encoder.vocabulary

    @property
    def image_size(self) -> int:
        """Side of its images in pixels."""
        return self.codec.image_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of its latents."""
        return self.predictor.latent_shape

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.predictor.device

    @property
    def dtype(self) -> torch.dtype:
        """What the noise predictor computes in at present."""
        return self.predictor.dtype

    @property
    def n_unet_calls(self) -> int:
        """Forward calls of the U-Net so far."""
        return self.predictor.n_calls

    @property
    def n_unet_rows(self) -> int:
        """Latents evaluated by the U-Net so far: the sum of the calls' batch sizes."""
        return self.predictor.n_rows

    @property
    def graphs(self) -> CallGraphs:
        """Replays small calls of the U-Net on a GPU, unless `model.graphs.enabled = False`."""
        return self.predictor.graphs

    def unknown_words(self, prompt: str) -> dict[str, list[str]]:
        """Each word of the prompt that the model does not know, with the nearest known words."""
        return self.vocabulary.unknown_words(prompt)

    def check_prompt(self, prompt: str) -> None:
        """Raise a `PromptError` for a prompt that is empty, too long, or has unknown words."""
        self.vocabulary.check(prompt)

    def encode_text(self, texts: str | Sequence[str]) -> Conditions:
        """Conditions for `predict_noise`, one row a text; the empty text is allowed. Encoded texts are cached."""
        return self.text_encoder.encode(as_items(texts))

    def text_embeddings(self, texts: str | Sequence[str]) -> Tensor:
        """Embeddings [N, L, D] of texts. Where another of them has more tokens, a text's last rows are zeros."""
        return self.encode_text(texts).tensors[TEXT]

    def encode(self, image: Image.Image | str | Path) -> Tensor:
        """Latents [1, C, h, w], float32, of an image of any size: the posterior's mean times the scaling factor."""
        return self.codec.encode(image)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of latents [N, C, h, w], as many at once as fit into memory."""
        return self.codec.decode(latents)

    def in_float32(self) -> AbstractContextManager[None]:
        """A context in which the noise is predicted in float32; for whoever holds the model."""
        return self.predictor.in_float32()

    def computing_in(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """A context in which the noise is predicted in another precision; for whoever holds the model."""
        return self.predictor.computing_in(dtype)

    def predict_noise(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        """Predicted noise, [B, C, h, w] float32, in noisy latents x [B, C, h, w] at log_snr [B]; without guidance.

        Between trained timesteps, the timestep is interpolated on their grid of log-SNR.
        """
        return self.predictor.predict_noise(x, log_snr, conditions)

    def latents_at_once(self, n: int, conditions: Conditions | None = None) -> int:
        """How many of n latents fit into one call of the U-Net; all while there are hooks, which expect whole batches.

        `predict_noise` splits a larger batch by itself.
        """
        return self.predictor.latents_at_once(n, conditions)
