"""What all measurements of information share: one image, comparisons of texts, a budget and a stopping rule.

`attribute`, `decompose`, `rank_captions` and `likelihood` differ in the texts they compare and in what they compute
from the replicates; `measure` is the run in between.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from core.arrays import Floats
from core.diffusion.predictor import PromptedModel
from core.errors import Cancelled, ImageError
from core.information.estimator import Comparison, Cost, Estimate, Estimator, cost
from core.information.precision import FLOOR
from core.information.quadrature import MANY, Sampler
from core.information.results import Measurement, Progress
from core.job import Callback, Job

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation

BATCH_SIZE = 32
"""Default number of latents in a U-Net call. More gains little on a CPU, and makes cancelling slower."""
MAX_REPLICATES = 128
"""Default budget."""
CAUTION = 3.0
"""How many times smaller than the target the error has to look while there are fewer than `MANY` replicates. By chance,
the spread of so few is often far too small."""

ImageLike = Image.Image | str | Path | Tensor
MeasurementT = TypeVar("MeasurementT", bound=Measurement)
ProgressT = TypeVar("ProgressT", bound=Progress[Any])


@dataclass(frozen=True)
class Budget:
    """How a measurement samples, how exact it has to be, and the most that it may cost."""

    seed: int = 0
    """Seed of the noise."""
    rel_error: float = 0.1
    """Sampling stops at this value of the result's `rel_error`; the measurement says what that is."""
    max_evals: int | None = None
    """Maximum number of latents through the U-Net; None: as many as `MAX_REPLICATES` take."""
    batch_size: int | None = None
    """Maximum number of latents in a U-Net call; None: `BATCH_SIZE`."""
    sampler: Sampler = field(default_factory=Sampler)
    """How noise and log-SNR are drawn."""

    def __post_init__(self) -> None:
        if not 0 < self.rel_error < math.inf:
            raise ValueError(f"rel_error has to be a positive number, such as 0.1, not {self.rel_error}.")


@dataclass(frozen=True)
class Plan:
    """The texts to compare, and what that costs.

    Raises:
        ValueError: The budget's `max_evals` is too small to estimate an error.
    """

    comparisons: Sequence[Comparison]
    """A noise sample costs one evaluation per distinct text."""
    budget: Budget
    what: str
    """What is measured, for the message about a small `max_evals`: `3 words`."""
    cost: Cost = field(init=False)
    """In latents through the U-Net."""
    max_replicates: int = field(init=False)
    """What the budget allows."""

    def __post_init__(self) -> None:
        sampler, max_evals = self.budget.sampler, self.budget.max_evals
        object.__setattr__(self, "cost", cost(self.comparisons, sampler))
        least = self.evals(sampler.min_replicates)
        if max_evals is not None and max_evals < least:
            raise ValueError(
                f"{max_evals} U-Net evaluations are too few for an error: {self.what} need at least "
                f"{least}. Raise max_evals, or ask for fewer {self.what.split()[-1]}."
            )
        affordable = None if max_evals is None else (max_evals - self.cost.pilot) // self.cost.replicate
        object.__setattr__(self, "max_replicates", MAX_REPLICATES if affordable is None else affordable)

    def evals(self, n_replicates: int) -> int:
        """Latents through the U-Net that this many replicates take."""
        return self.cost.pilot + n_replicates * self.cost.replicate

    @property
    def checks(self) -> list[int]:
        """Numbers of replicates at which the error is checked: two per doubling, and last the budget.

        More checks would stop a few runs earlier, more of them because their error happens to be underestimated.
        """
        least = self.budget.sampler.min_replicates
        grid = (least * 2**power * half // 2 for power in count() for half in (2, 3))
        return [*takewhile(lambda n: n < self.max_replicates, grid), self.max_replicates]

    def expected_evals(self, n_replicates: int, excess: float) -> int:
        """Expected total, if the error after `n_replicates` is `excess` times the target and falls as 1 / sqrt(n)."""
        needed, while_few = (n_replicates * (factor * excess) ** 2 for factor in (1.0, CAUTION))
        needed = while_few if while_few < MANY else max(needed, MANY)
        return self.evals(next((n for n in self.checks if n >= needed), self.checks[-1]))


def sampler_for(model: PromptedModel, sampler: Sampler | None) -> Sampler:
    """The given sampler, or the default one with the model's own profile over log-SNR, if its spec has one."""
    return sampler or Sampler(profile=getattr(getattr(model, "spec", None), "log_snr_profile", ()))


def integrated_range(model: PromptedModel, sampler: Sampler) -> tuple[float, float]:
    """The log-SNRs between which a sampler integrates."""
    density = sampler.density(model.schedule.log_snr_range)
    return density.low, density.high


def measure(
    model: PromptedModel,
    image: "ImageLike | Generation",
    plan: Plan,
    edges: Floats,
    summarise: Callable[[Estimate], MeasurementT],
    excess: Callable[[MeasurementT], float],
    progress: Callable[..., ProgressT],
    callback: Callback[ProgressT] | None = None,
) -> Job[ProgressT, MeasurementT]:
    """Estimate until the error is small enough: a job with progress after every U-Net call.

    Where half precision is faster, most predictions are made in it, and corrected by a few in float32; `dtype`,
    `rounding` and `exact_every` in the result's settings record this (`core.information.precision`).

    Args:
        model: Held for as long as the job lives.
        image: A PIL image, the path of one, a `Generation`, or latents [1, C, h, w].
        plan: What to compare.
        edges: [S + 1] edges of the timeline's log-SNR bins, from end to end of the integrated range.
        summarise: Makes the result so far, after every new replicate from the second on; with `stopped="cancelled"`.
        excess: The error of a result over the target; the run ends at 1 or less.
        progress: `Progress` or a subclass of it.
        callback: Called with every progress; if it returns False, the job ends with the result so far, or raises
            `Cancelled` where there is none.
    """
    return Job(_measure(model, image, plan, edges, summarise, excess, progress), callback, _partial_result)


def _partial_result(progress: Progress[MeasurementT]) -> MeasurementT:
    if progress.partial is None:
        raise Cancelled("Stopped before there was anything to show.")
    return progress.partial


def _measure(
    model: PromptedModel,
    image: "ImageLike | Generation",
    plan: Plan,
    edges: Floats,
    summarise: Callable[[Estimate], MeasurementT],
    excess: Callable[[MeasurementT], float],
    progress: Callable[..., ProgressT],
) -> Generator[ProgressT, None, MeasurementT]:
    seed, sampler, batch_size = plan.budget.seed, plan.budget.sampler, plan.budget.batch_size or BATCH_SIZE
    with model.busy():
        x = latents_of(model, image)
        estimator = Estimator(
            model, x, plan.comparisons, seed=seed, sampler=sampler, edges=edges, batch_size=batch_size
        )
        return (yield from _estimate(estimator, plan, summarise, excess, progress))


def _estimate(
    estimator: Estimator,
    plan: Plan,
    summarise: Callable[[Estimate], MeasurementT],
    excess: Callable[[MeasurementT], float],
    progress: Callable[..., ProgressT],
) -> Generator[ProgressT, None, MeasurementT]:
    partial: MeasurementT | None = None
    too_large, seen = math.inf, 1

    def summary() -> MeasurementT:
        estimate = estimator.result()
        result = summarise(estimate)
        return replace(result, settings={**result.settings, **estimate.precision})

    for n_replicates in plan.checks:
        for _ in estimator.run(n_replicates):
            n = estimator.n_replicates
            if n > seen:
                partial, seen = summary(), n
                too_large = excess(partial)
            extra = estimator.n_repeats
            yield progress(
                estimator.n_evals,
                plan.evals(plan.max_replicates) + extra,
                n,
                partial.rel_error if partial else math.inf,
                partial,
                extra + (plan.expected_evals(n, too_large) if partial else plan.evals(plan.checks[0])),
            )
        # Only now all is known of the precisions; and the last replicates may have needed no further call.
        partial, seen = summary(), n_replicates
        too_large = excess(partial) * (CAUTION if partial.n_replicates < MANY else 1.0)
        if too_large <= 1:
            break
    if partial is None:
        raise AssertionError("there is at least one check")
    return replace(partial, stopped="converged" if too_large <= 1 else "budget")


def check_text(model: PromptedModel, text: str) -> None:
    """Raise a `PromptError` for a text that the model cannot read, if the model can tell."""
    check_prompt = getattr(model, "check_prompt", None)
    if check_prompt is not None:
        check_prompt(text)


def relative_errors(bits: Floats, stderr: Floats) -> Floats:
    """[W] standard errors over the bits, or over `FLOOR` of the largest bits if that is more; 0 if all are 0.

    Infinite for what is no number: it is never small enough.
    """
    scale = np.maximum(bits, FLOOR * bits.max(initial=0.0))
    errors = np.divide(stderr, scale, out=np.zeros_like(stderr), where=scale > 0)
    return np.where(np.isfinite(bits) & np.isfinite(stderr), errors, np.inf)


def settings_of(model: PromptedModel, budget: Budget, **others: Any) -> dict[str, Any]:
    """The settings that repeat a measurement, JSON-able; `others` are the measurement's own."""
    return {
        "model": getattr(getattr(model, "spec", None), "name", type(model).__name__),
        "max_evals": budget.max_evals,
        "log_snr_range": list(integrated_range(model, budget.sampler)),
        "sampler": asdict(budget.sampler),
        **others,
    }


def n_bins_for(model: PromptedModel, image: object, num_inference_steps: int | None) -> int:
    """Bins of a timeline, one a sampler step: as given, else the generation's steps, else the model's default."""
    return num_inference_steps or int(getattr(image, "num_inference_steps", 0)) or default_steps(model)


def default_steps(model: PromptedModel) -> int:
    """The default number of sampler steps of the model."""
    return int(getattr(getattr(model, "spec", None), "num_inference_steps", 50))


def latents_of(model: PromptedModel, image: "ImageLike | Generation") -> Tensor:
    """Clean latents [C, h, w] of an image, float32, on the model's device.

    Raises:
        ImageError: Latents of another shape than the model's, or an image where the model cannot encode one.
    """
    image = getattr(image, "latents", image)
    if not isinstance(image, Tensor):
        encode = getattr(model, "encode", None)
        if encode is None:
            raise ImageError(f"{type(model).__name__} cannot encode an image; give it latents.")
        latents: Tensor = encode(image)[0]
        return latents
    latents = image[0] if image.ndim == 4 and len(image) == 1 else image
    if tuple(latents.shape) != tuple(model.latent_shape):
        raise ImageError(f"Latents of shape {tuple(image.shape)} were given; the model has {model.latent_shape}.")
    if not latents.isfinite().all():
        raise ImageError("The latents that were given are not finite: they have NaN or infinite values.")
    return latents.to(model.device).float()
