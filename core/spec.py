"""What a model is, apart from its weights: where it is, how it samples, where one looks inside it. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Stage(NamedTuple):
    """A stretch of the denoising, in normalised time: 1.0 is the first step (noise), 0.0 the last."""

    name: str
    """`early`, `middle` or `late`."""
    low: float
    """Smallest t of the stage, inclusive."""
    high: float
    """Largest t, exclusive; of the first stage, inclusive."""


STAGES = (Stage("early", 0.6, 1.0), Stage("middle", 0.2, 0.6), Stage("late", 0.0, 0.2))


@dataclass(frozen=True)
class ModelSpec:
    """A model's name, source and settings. Two are built in; others get theirs from `spec_of_folder`'s defaults."""

    name: str
    """What the user calls it."""
    source: str
    """A folder on disk, or a Hub id `owner/name`."""
    revision: str | None = None
    """Commit, tag or branch of the Hub repository; None for a folder."""
    hookpoints: tuple[str, ...] = ()
    """Cross-attention blocks to look into, first to last; empty: those nearest the bottleneck are found on loading."""
    num_inference_steps: int = 50
    """Steps of the DDIM sampler, one U-Net evaluation each."""
    guidance_scale: float = 7.5
    """Scale of classifier-free guidance; 1 is none."""
    stages: tuple[Stage, ...] = STAGES
    """Early, middle and late, in that order, without gaps."""
    log_snr_profile: tuple[float, ...] = ()
    """How often information is looked for in each of equal pieces of log-SNR from -5 to 7, in any unit, set by
    `python -m training benchmark density`; none: equally often. No result depends on it but for its error."""
    image_size: int | None = None
    """Side of the square picture in pixels; None: taken from the loaded U-Net and autoencoder."""
    half: bool = True
    """Whether it computes in float16 on CUDA unless told otherwise."""
    gigabytes: float | None = None
    """Size of its weights in float32, as far as they are used here."""


BUILT_IN = {
    "picturebook": ModelSpec(
        name="picturebook",
        source=str(Path(__file__).parent / "picturebook" / "model"),
        # Styles come in through the two blocks above the bottleneck alone (README, what an edit changes).
        hookpoints=(
            "down_blocks.0.attentions.0",
            "mid_block.attentions.0",
            "up_blocks.0.attentions.0",
            "up_blocks.0.attentions.1",
        ),
        num_inference_steps=25,
        guidance_scale=4.0,
        log_snr_profile=(1.1, 1.42, 2.33, 1.98, 1.01, 0.71, 0.57, 0.55, 0.56, 0.63, 0.6, 0.53),
        image_size=128,
        half=False,
    ),
    "sd-v1-4": ModelSpec(
        name="sd-v1-4",
        source="CompVis/stable-diffusion-v1-4",
        revision="133a221b8aa7292a167afc5127cb63fb5005638b",
        hookpoints=("down_blocks.2.attentions.1", "mid_block.attentions.0", "up_blocks.1.attentions.0"),
        num_inference_steps=50,
        guidance_scale=7.5,
        image_size=512,
        gigabytes=4.3,
    ),
}
