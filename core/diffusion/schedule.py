"""Conversions between log-SNR, timestep, sampler step, normalised time and stage. Imports no torch.

With abar the cumulative product of a trained schedule, log-SNR is a = log(abar / (1 - abar)) and the noisy latent is
x_a = sqrt(sigmoid(a)) x + sqrt(sigmoid(-a)) eps, eps standard normal. a falls as the timestep grows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from core.arrays import Floats, Ints
from core.spec import STAGES, Stage

STEPS_OFFSET = 1
"""Added to every timestep of the "leading" spacing, as Stable Diffusion does."""
Spacing = Literal["leading", "trailing", "linspace"]
"""How the sampler's steps lie among the trained timesteps (Lin et al. 2024, arXiv 2305.08891, table 2)."""
_SMALLEST = 2.0**-40
"""Smallest abar. Schedules rescaled to zero terminal SNR end in 0; log-SNR has to stay finite, and latents are the same
to a millionth."""
_LARGEST = 1 - 2.0**-24
"""Largest abar before the last step's."""


def scaled_linear_betas(beta_start: float = 0.00085, beta_end: float = 0.012, n: int = 1000) -> Floats:
    """Stable Diffusion's noise schedule: the square root of beta grows linearly."""
    return np.linspace(beta_start**0.5, beta_end**0.5, n) ** 2


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A trained noise schedule, and the DDIM steps through it (eta 0)."""

    alphas_cumprod: Floats
    """abar at each trained timestep, [T], falling."""
    final_alpha_cumprod: float
    """abar after the last sampler step: abar[0], or 1 where a folder's scheduler says `set_alpha_to_one`."""
    spacing: Spacing = "leading"
    """Where the sampler's steps lie."""
    steps_offset: int = STEPS_OFFSET
    """Added to every timestep of the leading spacing."""

    @classmethod
    def from_alphas_cumprod(
        cls,
        alphas_cumprod: ArrayLike,
        set_alpha_to_one: bool = False,
        spacing: Spacing = "leading",
        steps_offset: int = STEPS_OFFSET,
    ) -> "NoiseSchedule":
        """A schedule from its abar, [T].

        Raises:
            ValueError: There is no such spacing.
        """
        if spacing not in get_args(Spacing):
            raise ValueError(f"Timesteps are spaced {', '.join(get_args(Spacing))}, not {spacing!r}.")
        abar = np.asarray(alphas_cumprod, dtype=np.float64).clip(_SMALLEST, _LARGEST)
        return cls(abar, 1.0 if set_alpha_to_one else float(abar[0]), spacing, steps_offset)

    @classmethod
    def from_scheduler(cls, alphas_cumprod: ArrayLike, config: Mapping[str, Any]) -> "NoiseSchedule":
        """The schedule of a scheduler of diffusers, as its `DDIMScheduler` reads that scheduler's configuration.

        Raises:
            ValueError: It spaces its timesteps in another way.
        """
        abar = np.array(alphas_cumprod, dtype=np.float64)
        if config.get("rescale_betas_zero_snr"):
            abar[-1] = 0  # some schedulers keep it a little above
        return cls.from_alphas_cumprod(
            abar,
            bool(config.get("set_alpha_to_one", True)),
            config.get("timestep_spacing", "leading"),
            int(config.get("steps_offset", 0)),
        )

    @classmethod
    def stable_diffusion(cls) -> "NoiseSchedule":
        """The schedule that Stable Diffusion 1.x and 2.x and `picturebook` were trained on."""
        return cls.from_alphas_cumprod(np.cumprod(1 - scaled_linear_betas()))

    @property
    def log_snrs(self) -> Floats:
        """Log-SNR at each trained timestep, [T], falling."""
        return np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """Smallest and largest log-SNR that the model was trained on."""
        log_snrs = self.log_snrs
        return float(log_snrs[-1]), float(log_snrs[0])

    def timestep_at(self, log_snr: ArrayLike) -> Floats:
        """The (fractional) timestep at a log-SNR: interpolated on the trained grid, clipped at its ends."""
        log_snrs = self.log_snrs
        return np.interp(np.asarray(log_snr, np.float64), log_snrs[::-1], np.arange(len(log_snrs))[::-1])

    def sampler_timesteps(self, n_steps: int) -> Ints:
        """Timesteps of the sampler from noise to image, [S]; 50 of 1000, leading, are 981, 961, ..., 1."""
        n_trained = len(self.alphas_cumprod)
        if not 1 <= n_steps < n_trained:
            raise ValueError(f"The number of steps must be between 1 and {n_trained - 1}, not {n_steps}.")
        if self.spacing == "linspace":
            return np.linspace(0, n_trained - 1, n_steps).round()[::-1].astype(np.int64)
        if self.spacing == "trailing":
            return np.round(n_trained - np.arange(n_steps) * (n_trained / n_steps)).astype(np.int64) - 1
        timesteps = np.arange(n_steps)[::-1] * (n_trained // n_steps) + self.steps_offset
        if timesteps[0] >= n_trained:
            raise ValueError(
                f"{n_steps} steps with an offset of {self.steps_offset} begin after the trained timesteps."
            )
        return timesteps

    def sampler_log_snrs(self, n_steps: int) -> Floats:
        """Log-SNR at each step of the sampler, [S], rising."""
        return self.log_snrs[self.sampler_timesteps(n_steps)]

    def sampler_alphas(self, n_steps: int) -> tuple[Floats, Floats]:
        """Abar before and after each step of DDIM, [S] each.

        Abar after a step is that of the timestep one stride back: the abar before the next step, except for the last
        one.
        """
        timesteps = self.sampler_timesteps(n_steps)
        back = timesteps - len(self.alphas_cumprod) // n_steps
        after = np.where(back >= 0, self.alphas_cumprod[back.clip(0)], self.final_alpha_cumprod)
        return self.alphas_cumprod[timesteps], after

    def bin_edges(self, n_steps: int, low: float, high: float) -> Floats:
        """Edges [S + 1] of one bin of log-SNR per sampler step: half-way between steps, clipped to [low, high].

        A step outside the range has a bin of width 0.
        """
        log_snrs = self.sampler_log_snrs(n_steps)
        middles = (log_snrs[1:] + log_snrs[:-1]) / 2
        return np.concatenate([[low], middles.clip(low, high), [high]])


def step_times(n_steps: int) -> Floats:
    """Normalised time of each sampler step, [S]: 1.0 the first (noise), 0.0 the last; a single step is the first."""
    return np.linspace(1.0, 0.0, n_steps) if n_steps > 1 else np.ones(1)


def step_at(t: float, n_steps: int) -> int:
    """The step nearest to a normalised time, the earlier on a tie: t = 0.5 of 50 steps is step 24."""
    if not 0 <= t <= 1:
        raise ValueError(f"Normalised time lies between 0 (the last step) and 1 (the first), not at {t}.")
    # Rounded first, so that a tie is a tie: 0.7 * 5 is a hair above 3.5 in binary.
    return int(np.ceil(round((1 - t) * (n_steps - 1), 9) - 0.5))


def stage_at(t: float, stages: Sequence[Stage] = STAGES) -> Stage:
    """The stage of a normalised time: `low <= t < high`, and t = 1 belongs to the first."""
    for stage in stages:
        if stage.low - 1e-9 <= t < stage.high or t == stage.high == 1:
            return stage
    raise ValueError(f"No stage holds t = {t}.")


def stage_steps(stage: Stage, n_steps: int, stages: Sequence[Stage] = STAGES) -> range:
    """The sampler steps of a stage."""
    inside = [step for step, t in enumerate(step_times(n_steps)) if stage_at(float(t), stages) == stage]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def named_steps(name: str, n_steps: int, stages: Sequence[Stage] = STAGES) -> range:
    """The sampler steps of a stage by its name, or of those from one to a later one, such as `middle to late`; none
    where a stage has none.

    Raises:
        ValueError: There is no such stage.
    """
    names = [stage.name for stage in stages]
    first, _, last = name.partition(" to ") if isinstance(name, str) else ("", "", "")
    last = last or first
    if first not in names or last not in names[names.index(first) :]:
        raise ValueError(
            f"The stage is one of {', '.join(names)}, or as {names[0]} to {names[-1]}, not {str(name)[:40]!r}."
        )
    named = stages[names.index(first) : names.index(last) + 1]
    steps = [step for stage in named for step in stage_steps(stage, n_steps, stages)]
    return range(steps[0], steps[-1] + 1) if steps else range(0)
