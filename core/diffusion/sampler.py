"""The DDIM sampler with classifier-free guidance, on any noise predictor."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.diffusion.predictor import Conditions, NoisePredictor
from core.diffusion.sampling import Branch, SamplerState, StepContext, ddim_step, ddim_step_of_v, is_guided
from core.diffusion.schedule import step_times
from core.hardware.finite import NAMES, check_finite


@dataclass(frozen=True, eq=False, kw_only=True)
class SamplingRun:
    """One run of the sampler: a batch of N prompts that are denoised together.

    Raises:
        ValueError: Not one seed per prompt; a scale that is no number; a last step that the run does not have; a state
            to go on from that is of another batch, of another number of steps, or not before the last step.
    """

    prompts: tuple[str, ...]
    """[N] prompts; may be empty texts."""
    seeds: tuple[int, ...]
    """[N] seeds of the initial noise."""
    num_inference_steps: int
    """S, steps from noise to image."""
    guidance_scale: float
    """Scale of classifier-free guidance; 1 or less evaluates the conditional branch only."""
    last_step: int
    """The run ends after this step; S - 1 is the last of all."""
    after: SamplerState | None = None
    """Go on from this state of another run, in place of the seeds' noise; steps before it cost nothing then."""
    contexts: Sequence[AbstractContextManager[Any]] = ()
    """Recordings and edits, entered in this order for as long as the run holds the model."""

    def __post_init__(self) -> None:
        n_prompts, n_seeds, n_steps = len(self.prompts), len(self.seeds), self.num_inference_steps
        if n_prompts != n_seeds or not n_prompts:
            raise ValueError(f"{n_prompts} prompts and {n_seeds} seeds were given; there must be one seed each.")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"The guidance scale is a number such as 7.5, not {self.guidance_scale}.")
        if not 0 <= self.last_step < n_steps:
            raise ValueError(f"The last step must be between 0 and {n_steps - 1}, not {self.last_step}.")
        if self.after is None:
            return
        step, its_steps, n_rows = self.after.step_context.step, self.after.step_context.n_steps, len(self.after.x)
        if its_steps != n_steps or step >= self.last_step or n_rows != n_prompts:
            raise ValueError(
                f"A run of {n_steps} steps up to step {self.last_step} with {n_prompts} prompts cannot go on after "
                f"step {step} of {its_steps} with {n_rows}."
            )

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches of guidance that are evaluated, in the order of the batch."""
        return ("uncond", "cond") if is_guided(self.guidance_scale) else ("cond",)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of all rows of the batch, branch by branch."""
        return ("",) * (len(self.prompts) * (len(self.branches) - 1)) + self.prompts


class DdimSampler:
    """Deterministic sampling (Song et al. 2021, arXiv 2010.02502, eta 0)."""

    step_context: StepContext | None
    """The present step, while the noise predictor is called; None otherwise. Hooks in the network read it."""

    def __init__(
        self, predictor: NoisePredictor, predict_v: Callable[[Tensor, Tensor, Conditions], Tensor] | None = None
    ) -> None:
        """`predict_v` is for a network that predicts v: in place of `predict_noise`, which says nothing about the image
        where there is only noise, as at the first step of a schedule with zero terminal SNR."""
        self._predictor = predictor
        self._predict = predict_v or predictor.predict_noise
        self._step = ddim_step_of_v if predict_v else ddim_step
        self.step_context = None

    def run(self, run: SamplingRun, conditions: Conditions) -> Generator[SamplerState, None, None]:
        """Denoise: a state after each step. `conditions` are those of `run.texts`; `run.contexts` are not entered.

        Raises:
            NotFiniteError: The latents after the last step are not finite.
        """
        schedule, n_steps = self._predictor.schedule, run.num_inference_steps
        first = 0 if run.after is None else run.after.step_context.step + 1
        x = self._initial_noise(run.seeds) if run.after is None else run.after.x.to(self._predictor.device)
        times, log_snrs = step_times(n_steps), schedule.sampler_log_snrs(n_steps)
        alphas, alphas_after = schedule.sampler_alphas(n_steps)
        for step in range(first, run.last_step + 1):
            step_context = StepContext(step, n_steps, float(times[step]), run.branches)
            self.step_context = step_context
            try:
                predicted = self._guided(x, float(log_snrs[step]), conditions, run.guidance_scale)
            finally:
                self.step_context = None
            x0, x = self._step(x, predicted, float(alphas[step]), float(alphas_after[step]))
            if step == run.last_step:  # once a run: NaN stays, and reading it waits for the device
                check_finite(x, NAMES["unet"], getattr(self._predictor, "dtype", x.dtype))
            yield SamplerState(step_context, x, x0)

    def _initial_noise(self, seeds: Sequence[int]) -> Tensor:
        """[N, C, h, w] standard normal, drawn on the CPU: a seed gives the same image on every device."""
        shape = self._predictor.latent_shape
        noise = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat(noise).to(self._predictor.device)

    def _guided(self, x: Tensor, log_snr: float, conditions: Conditions, guidance_scale: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022): e_uncond + s (e_cond - e_uncond), in one batch; v likewise."""
        n = len(conditions)
        rows = x.repeat(n // len(x), 1, 1, 1)
        predicted = self._predict(rows, torch.full((n,), log_snr, dtype=torch.float64), conditions)
        if n == len(x):
            return predicted
        uncond, cond = predicted.chunk(2)
        return uncond + guidance_scale * (cond - uncond)
