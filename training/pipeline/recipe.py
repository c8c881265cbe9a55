"""Recipe of the embedded model and of everything that is made from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.common.recipe import read_recipe
from training.labels.labeller import LabelConfig
from training.picturebook.models.autoencoder import AutoencoderConfig
from training.picturebook.models.denoiser import DenoiserConfig
from training.picturebook.models.judges import JudgeConfig
from training.picturebook.models.loop import LoopConfig
from training.picturebook.world.dropout import WordDropout
from training.picturebook.world.world import BACKGROUNDS, NOUNS, STYLES
from training.sae.command import RECIPE as SAE_RECIPE
from training.sae.command import SaeRecipe

RECIPE = Path(__file__).parents[1] / "recipes" / "picturebook.json"


def _synonyms() -> dict[str, tuple[str, ...]]:
    """The words of the grammar for each object and background."""
    words = {background.name: background.words for background in BACKGROUNDS}
    for noun in NOUNS:
        words |= dict.fromkeys(noun.objects, noun.words)
    return words


@dataclass(frozen=True)
class PicturebookLabels(LabelConfig):
    """How the latents of the embedded model's autoencoders get names: the classes and words are those of its world."""

    backgrounds: tuple[str, ...] = tuple(background.name for background in BACKGROUNDS)
    """Classes that are backgrounds; all others are objects."""
    styles: tuple[str, ...] = tuple(style for style in STYLES if style != "plain")
    """Words that name a style."""
    words: Mapping[str, Sequence[str]] = field(default_factory=_synonyms)
    """By class, other words for it, for searching."""


@dataclass(frozen=True)
class PicturebookConfig:
    """Recipe of the embedded model."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Architecture of the autoencoder."""
    autoencoder_loop: LoopConfig = field(default_factory=lambda: LoopConfig(1200, 16, 2e-3))
    """Training of the autoencoder."""
    n_scenes: int = 65536
    """Scenes that autoencoder and denoiser are trained on, in every epoch with other crops, captions and noise."""
    dropout: WordDropout = field(default_factory=WordDropout)
    """What half of their texts lack."""
    n_held_out: int = 512
    """Held-out scenes on which its loss and the judges are measured at each checkpoint."""
    n_drawn: int = 16
    """Captions sampled at each checkpoint."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """Architecture of the denoiser."""
    text_loop: LoopConfig = field(default_factory=lambda: LoopConfig(700, 512, 2e-3))
    """Training of the text encoder alone, before the denoiser."""
    denoiser_loop: LoopConfig = field(default_factory=lambda: LoopConfig(4000, 32, 1.5e-3))
    """Training of the denoiser."""
    judges: JudgeConfig = field(default_factory=JudgeConfig)
    """Architectures of the segmenters and the style classifier."""
    judges_loop: LoopConfig = field(default_factory=lambda: LoopConfig(1500, 32, 1.5e-3))
    """Training of the judges."""
    saes: SaeRecipe = field(default_factory=lambda: read_recipe(SaeRecipe, SAE_RECIPE))
    """Its sparse autoencoders; by default those of `python -m training sae`."""
    labels: PicturebookLabels = field(default_factory=PicturebookLabels)
    """Labelling of their latents."""
    seed: int = 0
    """Seed of the initial weights."""


def read_config(path: Path) -> PicturebookConfig:
    """Read a recipe: JSON with fields of `PicturebookConfig`; the others have their defaults.

    Raises:
        ValueError: A name in it is not a field.
    """
    return read_recipe(PicturebookConfig, path)
