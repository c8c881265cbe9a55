"""What the page shows: a scene (a picture and how it came about), and what can be said of its attribution."""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.arrays import Floats
from core.diffusion.schedule import stage_at, step_times
from core.information.results import Attribution, t_quantile
from core.spec import STAGES, Stage


@dataclass(frozen=True)
class Scene:
    """One picture with its prompt, and what it looked like on the way."""

    image: Image.Image
    """Square RGB picture."""
    prompt: str
    """What it was drawn from, or the caption of a picture that somebody brought."""
    seed: int
    """Seed of the first noise; of a brought picture, of its attribution alone."""
    steps: int
    """Sampler steps."""
    guidance: float
    """Scale of classifier-free guidance."""
    frames: tuple[str, ...] = ()
    """The picture as foreseen at each step, [S] small WebP pictures as data URLs; none for a brought picture."""
    own: bool = False
    """Whether somebody brought the picture."""

    @cached_property
    def key(self) -> str:
        """A name for the picture's content and prompt, for looking up attributions."""
        digest = hashlib.sha256(f"{self.prompt}\0{self.image.size}{self.steps}{self.seed}".encode())
        digest.update(self.image.tobytes())
        return digest.hexdigest()[:24]


def step_stages(n_steps: int, stages: tuple[Stage, ...] = STAGES) -> list[str]:
    """The stage of each sampler step, by name, [S]."""
    return [stage_at(float(t), stages).name for t in step_times(n_steps)]


@lru_cache(maxsize=256)
def t95(n_replicates: int) -> float:
    """Half the width of a 95 % interval, in standard errors over so many replicates."""
    return t_quantile(0.975, n_replicates - 1)


def half_width(a: Attribution) -> Floats:
    """Half the 95 % interval of the words' bits, [W]."""
    return a.stderr * t95(a.n_replicates)


def direct_half_width(a: Attribution) -> Floats:
    """Half the 95 % interval of the words' direct bits, [W]."""
    return a.direct_stderr * t95(a.n_replicates)


def contradicts(a: Attribution) -> NDArray[np.bool_]:
    """Words that changed much of what the model expects, yet made this picture clearly less likely, [W].

    "Much" is beyond the error and at least a tenth of the largest word.
    """
    much = (a.bits > 0.1 * a.bits.max(initial=0.0)) & (a.bits > half_width(a))
    return np.asarray(much & a.contradicts)


def unsure(a: Attribution) -> NDArray[np.bool_]:
    """Words whose error is as large as their bits, [W]."""
    return np.asarray(half_width(a) >= a.bits)


def stage_shares(a: Attribution, stages: tuple[Stage, ...] = STAGES) -> Floats:
    """Which part of each word's bits falls into each stage, [W, 3]."""
    per_bin = a.timeline.bits * np.diff(a.timeline.edges)
    names = step_stages(per_bin.shape[1], stages)
    parts = np.stack([per_bin[:, [n == s.name for n in names]].sum(axis=1) for s in stages], axis=1)
    total = parts.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(parts, total, out=np.zeros_like(parts), where=total > 0))


def target(a: Attribution) -> float:
    """The relative error at which its sampling was to stop."""
    return float(a.settings["rel_error"])
