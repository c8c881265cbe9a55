"""What a model is apart from its weights: its source, its sampler, the blocks to look into. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple


class Stage(NamedTuple):
    """A part of the denoising, in normalised time: 1.0 is the first step (noise), 0.0 the last."""

    name: str
    """`early`, `middle` or `late`."""
    low: float
    """Smallest t of the stage, inclusive."""
    high: float
    """Largest t, exclusive; inclusive for the first stage."""


STAGES = (Stage("early", 0.6, 1.0), Stage("middle", 0.2, 0.6), Stage("late", 0.0, 0.2))

HookpointRange = Literal["bottleneck", "from bottleneck", "all"]
"""Some of a model's hookpoints: the bottleneck, it and those after it, or all."""


def default_hookpoint(hookpoints: Sequence[str]) -> str:
    """The hookpoint to use where none is named: the bottleneck's, which is the second, or the only one; empty if none.

    Hookpoints are in the order of the forward pass, with one before the bottleneck, as in every `ModelSpec`.
    """
    return list(hookpoints[:2])[-1] if hookpoints else ""


@dataclass(frozen=True)
class ModelSpec:
    """A model's name, source and settings. Two are built in; for other models these defaults hold."""

    name: str
    """What the user calls it."""
    source: str
    """A folder on disk, or a Hub id `owner/name`."""
    revision: str | None = None
    """Commit, tag or branch of the Hub repository; None for a folder."""
    hookpoints: tuple[str, ...] = ()
    """Cross-attention blocks to look into, first to last, the second being the bottleneck's; empty: the bottleneck's
    block and its neighbours are found on loading."""
    num_inference_steps: int = 50
    """Steps of the DDIM sampler, one U-Net evaluation each."""
    guidance_scale: float = 7.5
    """Scale of classifier-free guidance; 1 means no guidance."""
    stages: tuple[Stage, ...] = STAGES
    """Early, middle and late, in that order, without gaps."""
    log_snr_profile: tuple[float, ...] = ()
    """Relative sampling density of information estimates in equal intervals of log-SNR from -5 to 7, as measured by
    `python -m training benchmark density`; empty: uniform. It affects only the error of a result."""
    image_size: int | None = None
    """Side of the square image in pixels; None: read from the loaded U-Net and autoencoder."""
    half: bool = True
    """Whether the model runs in float16 on CUDA by default."""
    gigabytes: float | None = None
    """Size of the weights that are used here, in float32."""
    assets: Path | None = None
    """Folder of what comes with the model in this package: `saes/`, `segmenter/`, `second_segmenter/`, `examples/` and
    what its words can tell (`core.information.surprisal`); None where nothing does."""

    @property
    def default_hookpoint(self) -> str:
        """The hookpoint to use where none is named: the bottleneck's; empty before the hookpoints are known."""
        return default_hookpoint(self.hookpoints)

    def edit_hookpoints(self, which: HookpointRange) -> tuple[str, ...]:
        """The hookpoints of a range, as the kinds of edits name their defaults."""
        first = self.hookpoints.index(self.default_hookpoint) if self.hookpoints else 0
        ranges = {"bottleneck": slice(first, first + 1), "from bottleneck": slice(first, None), "all": slice(None)}
        return self.hookpoints[ranges[which]]


_PICTUREBOOK = Path(__file__).parent / "picturebook"

BUILT_IN = {
    "picturebook": ModelSpec(
        name="picturebook",
        source=str(_PICTUREBOOK / "model"),
        # The up blocks are listed because styles enter only there (training/evaluate/README.md, "Changing the style").
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
        assets=_PICTUREBOOK,
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
