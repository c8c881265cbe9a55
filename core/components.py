"""Whether the parts of a pipeline fit together and are all that is needed to draw, by their configurations.

Imports no torch: a folder can be checked before its weights are fetched or read.
"""

from collections.abc import Mapping
from typing import Any

from core.errors import ModelError

Config = Mapping[str, Any]
"""The configuration of a component, as its `config.json` has it."""

_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-to-image model such as InstructPix2Pix",
    9: "an inpainting model",
}
_AUTOENCODERS = ("AutoencoderKL", "AsymmetricAutoencoderKL")
"""Classes of autoencoders with a posterior over the latents of one image."""
_TEXT_ONLY = (None, "text")
"""Kinds of the U-Net's additional embedding that need nothing but the text."""
_NEEDED = "What is needed is a text-to-image model of the kind of Stable Diffusion 1 or 2 (StableDiffusionPipeline)."


def check_components(unet: Config, vae: Config, text_encoder: Config) -> None:
    """Check that a U-Net can be given all that it needs, by this autoencoder and this text encoder.

    Raises:
        ModelError: It cannot; the message says what was found and what is needed.
    """
    _check_channels(unet, vae)
    _check_conditions(unet)
    _check_text(unet, text_encoder)


def check_autoencoder(name: str) -> None:
    """Check the class of an autoencoder: what is measured are the latents that the U-Net was trained on.

    Raises:
        ModelError: It does not encode to a distribution of latents.
    """
    if name not in _AUTOENCODERS:
        tiny = ", made to look at drafts," if name == "AutoencoderTiny" else ""
        raise ModelError(
            f"The autoencoder (vae/) is of class {name}, which{tiny} does not encode an image to the distribution of "
            f"latents that the U-Net was trained on and that information is measured in. An AutoencoderKL is needed: "
            f"take vae/ of the model that the U-Net is from, as `AutoencoderKL.from_pretrained(model, "
            f'subfolder="vae").save_pretrained("<folder>/vae")`, and name it in model_index.json: '
            f'"vae": ["diffusers", "AutoencoderKL"].'
        )


def latent_side(sample_size: Any) -> int:
    """The side of a U-Net's square latents, from its `sample_size`: a number or an equal pair.

    Raises:
        ModelError: Its images are not square, or it does not say.
    """
    pair = sample_size if isinstance(sample_size, list | tuple) else (sample_size, sample_size)
    if len(pair) == 2 and all(type(side) is int and side > 0 for side in pair):
        if pair[0] == pair[1]:
            return int(pair[0])
        raise ModelError(
            f"The U-Net's sample_size is {list(pair)}: it draws images that are not square, and only square ones are "
            f"drawn and measured here. If it was trained on square ones too, write their side into unet/config.json."
        )
    raise ModelError(
        f"The U-Net's sample_size is {sample_size!r}, so the size of its images is not known. Write the side of its "
        f'latents into unet/config.json: "sample_size": 64 for images of 512 pixels, 96 for 768.'
    )


def _check_channels(unet: Config, vae: Config) -> None:
    found, out = unet.get("in_channels", 4), unet.get("out_channels", 4)
    latent = vae.get("latent_channels", 4)
    if found == out == latent:
        return
    if found != latent and out == latent:
        kind = _CHANNELS.get(found, "a model that is given something beside the latents") if found > latent else ""
        raise ModelError(
            f"The U-Net has {found} input channels and the autoencoder's latents have {latent}"
            + (f": it is {kind}, which needs another image as well. {_NEEDED}" if kind else _mixed(found, latent))
        )
    if found != out:
        raise ModelError(
            f"The U-Net has {found} input and {out} output channels; as many are needed, {latent}, one prediction for "
            f"each channel of the latents (a learned variance is not read). {_NEEDED}"
        )
    raise ModelError(
        f"The U-Net draws latents of {found} channels and the autoencoder decodes {latent}" + _mixed(found, latent)
    )


def _mixed(found: Any, latent: Any) -> str:
    return (
        f": they are of different models. Take the autoencoder (vae/) that the U-Net was trained with, of {found} "
        f"channels, or the U-Net of this one, of {latent}."
    )


def _check_conditions(unet: Config) -> None:
    """Refuse a U-Net that asks for more than noisy latents, a time and a text."""
    missing = None
    added, hidden = unet.get("addition_embed_type"), _hidden_type(unet)
    if unet.get("time_cond_proj_dim") is not None:
        missing = (
            "the guidance scale as an embedding (time_cond_proj_dim): it is a latent consistency model (LCM), which is "
            "no denoiser that a sampler of many steps or a measurement could use. Load the model that it was distilled "
            "from"
        )
    elif added == "text_time":
        missing = (
            "pooled text and image sizes (addition_embed_type 'text_time'): it is of Stable Diffusion XL, which has "
            "two text encoders"
        )
    elif added not in _TEXT_ONLY:
        missing = f"another embedding beside the text (addition_embed_type {added!r})"
    elif unet.get("class_embed_type") is not None or unet.get("num_class_embeds") is not None:
        missing = "class labels (class_embed_type or num_class_embeds), as upscalers and unCLIP models do"
    elif hidden not in (None, "text_proj"):
        missing = f"an image's embedding (encoder_hid_dim_type {hidden!r}), as with an IP-Adapter or Kandinsky"
    if missing:
        raise ModelError(f"The U-Net needs {missing}. {_NEEDED}")


def _hidden_type(unet: Config) -> Any:
    kind = unet.get("encoder_hid_dim_type")
    return "text_proj" if kind is None and unet.get("encoder_hid_dim") is not None else kind


def _check_text(unet: Config, text_encoder: Config) -> None:
    given = text_encoder.get("hidden_size", 512)
    read = unet.get("cross_attention_dim", 1280)
    read = unet["encoder_hid_dim"] if _hidden_type(unet) == "text_proj" else read
    widths = set(read) if isinstance(read, list | tuple) else {read}
    if widths != {given}:
        known = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
        wanted = ", ".join(str(width) for width in sorted(widths))
        hint = "; ".join(f"{w} is that of {known[w]}" for w in sorted({given, *widths}) if w in known)
        raise ModelError(
            f"The U-Net reads text embeddings of width {wanted} (cross_attention_dim) and the text encoder gives width "
            f"{given} (hidden_size{'; ' + hint if hint else ''}): they are of different models. Take the text encoder "
            f"and tokenizer that the U-Net was trained with."
        )
