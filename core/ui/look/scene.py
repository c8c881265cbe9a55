"""The scene that the page shows (an image and how it was made), and figures derived from its attribution."""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image

from core.arrays import Bools, Floats
from core.diffusion.schedule import stage_at, step_times
from core.information.results import Attribution, t_quantile
from core.spec import STAGES, Stage


@dataclass(frozen=True)
class Scene:
    """An image with its prompt, settings and previews."""

    image: Image.Image
    """Square RGB image."""
    prompt: str
    """The prompt it was generated from, or the caption of an uploaded image."""
    seed: int
    """Seed of the initial noise and of the attribution; for an uploaded image, of the attribution alone."""
    steps: int
    """Sampler steps."""
    guidance: float
    """Scale of classifier-free guidance."""
    frames: tuple[str, ...] = ()
    """[S] denoised previews, small WebP images as data URLs; empty for an uploaded image."""
    uploaded: bool = False
    """Whether a visitor uploaded the image."""

    @cached_property
    def key(self) -> str:
        """A hash of the image, prompt and settings, for looking up cached results."""
        digest = hashlib.sha256(f"{self.prompt}\0{self.image.size}{self.steps}{self.seed}".encode())
        digest.update(self.image.tobytes())
        return digest.hexdigest()[:24]


def step_stages(n_steps: int, stages: tuple[Stage, ...] = STAGES) -> list[str]:
    """The stage of each sampler step, by name, [S]."""
    return [stage_at(float(t), stages).name for t in step_times(n_steps)]


@lru_cache(maxsize=256)
def t95(n_replicates: int) -> float:
    """Half-width of a 95 % interval, in standard errors over `n_replicates` replicates."""
    return t_quantile(0.975, n_replicates - 1)


def half_width(a: Attribution) -> Floats:
    """Half-widths of the 95 % intervals of the words' bits, [W]."""
    return a.stderr * t95(a.n_replicates)


def direct_half_width(a: Attribution) -> Floats:
    """Half-widths of the 95 % intervals of the words' direct bits, [W]."""
    return a.direct_stderr * t95(a.n_replicates)


def contradicts(a: Attribution) -> Bools:
    """Whether each word changes the prediction a lot and yet makes this image clearly less likely, [W].

    A lot: more than the error, and at least a tenth of the largest word.
    """
    much = (a.bits > 0.1 * a.bits.max(initial=0.0)) & (a.bits > half_width(a))
    return np.asarray(much & a.contradicts)


def unsure(a: Attribution) -> Bools:
    """Whether each word's error is as large as its bits, [W]."""
    return np.asarray(half_width(a) >= a.bits)


def stage_shares(a: Attribution, stages: tuple[Stage, ...] = STAGES) -> Floats:
    """Fraction of each word's bits in each stage, [W, 3]."""
    per_bin = a.timeline.bits * np.diff(a.timeline.edges)
    names = step_stages(per_bin.shape[1], stages)
    parts = np.stack([per_bin[:, [n == s.name for n in names]].sum(axis=1) for s in stages], axis=1)
    total = parts.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(parts, total, out=np.zeros_like(parts), where=total > 0))


def requested_rel_error(a: Attribution) -> float:
    """The relative error at which the measurement was to stop."""
    return float(a.settings["rel_error"])
