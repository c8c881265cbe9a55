"""Export of trained weights to a `StableDiffusionPipeline` folder that plain diffusers loads."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from core.diffusion.diffuser import Diffuser
from core.files import write_text
from core.spec import BUILT_IN
from training.picturebook.models.denoiser import SCHEDULE
from training.picturebook.world.tokens import build_tokenizer

SHEET_CAPTIONS = (
    "a cat on the grass",
    "a whale in the sea",
    "a castle in the desert, sepia style",
    "a penguin on the snow",
    "a tree in the forest",
    "a balloon above a house",
    "a car left of a tree on the street",
    "a boat in the ocean, watercolour style",
    "a strawberry and a cake in the kitchen",
    "a pixel picture of a mushroom in the forest",
    "a butterfly and a sunflower on the grass",
    "a crab on the beach, poster style",
    "a night picture of a tent and a moon",
    "a dog right of a cactus in the desert",
    "a rocket above a pig",
    "a cat, a star and a train on the snow",
)
"""Captions of the sheets sampled during training, always the same so that sheets can be compared."""


@torch.no_grad()
def standardise(autoencoder: AutoencoderKL, latents: Tensor) -> None:
    """Standardise each channel of the autoencoder's latents, given its posterior means `latents` [N, C, h, w].

    Mean 0 and standard deviation 1 are folded into the weights, so that every channel has the same signal-to-noise
    ratio at every diffusion step.
    """
    mean, spread = latents.double().mean((0, 2, 3)), latents.double().std((0, 2, 3))
    mean, spread = mean.to(autoencoder.quant_conv.weight), spread.to(autoencoder.quant_conv.weight)
    n = len(mean)
    after, before = autoencoder.post_quant_conv, autoencoder.quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= spread[None, :, None, None]
    before.weight[:n] /= spread[:, None, None, None]
    before.bias[:n] = (before.bias[:n] - mean) / spread
    before.bias[n:] -= 2 * spread.log()


def assemble(
    autoencoder: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, scaling_factor: float
) -> StableDiffusionPipeline:
    """Assemble a pipeline from its components."""
    autoencoder.register_to_config(scaling_factor=scaling_factor)
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save a pipeline as fp16 safetensors that load as float32 if no dtype is given."""
    halves = {name: deepcopy(module) for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    for module in halves.values():
        nn.Module.to(module, torch.float16)
    half = StableDiffusionPipeline(**{**pipeline.components, **halves}, requires_safety_checker=False)
    half.save_pretrained(folder, safe_serialization=True)
    # transformers loads in the dtype of the config, diffusers in float32: without this the two would not match.
    set_json(folder / "text_encoder" / "config.json", dtype="float32")
    strip_paths(folder)


def strip_paths(folder: Path) -> None:
    """Remove from every configuration under a folder what names folders of this computer.

    The libraries write the folder that a module was loaded from, `_name_or_path`, into its configuration.
    """
    for path in (*folder.rglob("*config.json"), *folder.rglob("model_index.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(_without_paths(content), indent=2) + "\n", encoding="utf-8")


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: v for key, v in value.items() if key != "_name_or_path" and not _is_path(v)}
        return {key: _without_paths(v) for key, v in kept.items()}
    return value


def _is_path(value: object) -> bool:
    return isinstance(value, str) and Path(value).expanduser().is_absolute()


def set_json(path: Path, **values: object) -> None:
    """Set entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(values)
    write_text(path, json.dumps(content, indent=2) + "\n")


def diffuser_of(pipeline: StableDiffusionPipeline) -> Diffuser:
    """A Diffuser of a copy of a pipeline, because it freezes the weights it wraps."""
    copies = {name: deepcopy(module) for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    copy = StableDiffusionPipeline(**{**pipeline.components, **copies}, requires_safety_checker=False)
    return Diffuser(copy, BUILT_IN["picturebook"])


def draw_sheet(model: Diffuser, captions: tuple[str, ...], columns: int = 8) -> Image.Image:
    """A grid of images of captions, the i-th with seed i."""
    side = model.image_size
    sheet = Image.new("RGB", (columns * side, -(-len(captions) // columns) * side))
    for i, caption in enumerate(captions):
        image = model.generate(caption, seed=i, previews=False).image
        sheet.paste(image, (i % columns * side, i // columns * side))
    return sheet


def entries_under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
