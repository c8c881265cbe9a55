"""What all measurements of information share: one picture, some comparisons of texts, and when to stop.

`attribute`, `decompose` and `rank_captions` differ in the texts that they compare and in what they make of the
replicates; `measure` is the run in between.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from core.arrays import Floats
from core.errors import Cancelled, ImageError
from core.information.estimator import Comparison, Cost, Estimate, Estimator, NoisePredictor, cost
from core.information.quadrature import Sampler
from core.information.results import Measurement, Progress
from core.information.rounding import MOST, Rounding, is_rounded

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation

BATCH_SIZE = 32
"""Latents in a U-Net call unless told otherwise. More gains little on a CPU, and makes a cancel wait longer."""
MAX_REPLICATES = 64
"""The budget unless told otherwise."""
FLOOR = 0.1
"""What is smaller than this share of the largest is measured to within rel_error of that share, not of itself."""

ImageLike = Image.Image | str | Path | Tensor
Measured = TypeVar("Measured", bound=Measurement)
Told = TypeVar("Told", bound=Progress[Any])


@dataclass(frozen=True)
class Plan:
    """Which texts to compare, and how much to spend on it; checked."""

    comparisons: Sequence[Comparison]
    """Their distinct texts are what a noise sample costs."""
    seed: int
    sampler: Sampler
    batch_size: int | None
    """Most latents in a U-Net call; None: `BATCH_SIZE`."""
    max_evals: int | None
    """Most latents through the U-Net; None: what `MAX_REPLICATES` take."""
    what: str
    """What is measured, for the message when `max_evals` is too small for it: `3 words`."""
    cost: Cost = field(init=False)
    max_replicates: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cost", cost(self.comparisons, self.sampler))
        least = self.evals(self.sampler.min_replicates)
        if self.max_evals is not None and self.max_evals < least:
            raise ValueError(
                f"{self.max_evals} U-Net evaluations are too few for an error: {self.what} need at least "
                f"{least}. Raise max_evals, or ask for fewer {self.what.split()[-1]}."
            )
        spent = None if self.max_evals is None else (self.max_evals - self.cost.pilot) // self.cost.replicate
        object.__setattr__(self, "max_replicates", MAX_REPLICATES if spent is None else spent)

    def evals(self, n_replicates: int) -> int:
        """Latents through the U-Net that so many replicates take."""
        return self.cost.pilot + n_replicates * self.cost.replicate

    @property
    def looks(self) -> list[int]:
        """Numbers of replicates at which the error is looked at: two to a doubling, and last the budget.

        More looks would stop runs a little earlier, and more of them at a moment when the error happens to look small.
        """
        least = self.sampler.min_replicates
        grid = (least * 2**power * half // 2 for power in count() for half in (2, 3))
        return [*takewhile(lambda look: look < self.max_replicates, grid), self.max_replicates]

    def expected_evals(self, n_replicates: int, excess: float) -> int:
        """Evaluations at the look where an error should be small enough that is now `excess` times too large."""
        needed = n_replicates * excess**2
        return self.evals(next((look for look in self.looks if look >= needed), self.looks[-1]))


def sampler_for(model: NoisePredictor, sampler: Sampler | None) -> Sampler:
    """The sampler asked for, or the default one, which looks where the model's words mostly speak, if that is known."""
    return sampler or Sampler(profile=getattr(getattr(model, "spec", None), "log_snr_profile", ()))


def integrated_range(model: NoisePredictor, sampler: Sampler) -> tuple[float, float]:
    """The log-SNRs between which a sampler integrates."""
    density = sampler.density(model.schedule.log_snr_range)
    return density.low, density.high


def measure(
    model: NoisePredictor,
    image: "ImageLike | Generation",
    plan: Plan,
    edges: Floats,
    summarise: Callable[[Estimate], Measured],
    excess: Callable[[Measured], float],
    progress: Callable[..., Told],
) -> Generator[Told | Measured, None, None]:
    """Estimate until the error is small enough: a `progress` after every U-Net call, and last the result.

    Closing the generator stops the work within one U-Net call and frees the model.

    Args:
        model: Is held for as long as the generator lives.
        image: A PIL picture, the path of one, a `Generation`, or latents [1, C, h, w].
        plan: What to compare.
        edges: [S + 1] the timeline's bins of log-SNR, between the ends of the integrated range.
        summarise: The result as it stands, after every new replicate from the second on; `stopped` says "cancelled".
        excess: How many times larger the error is than wanted; at most 1, and the work is done.
        progress: Makes a `Progress`, of that class or another, from its fields in order.

    A model in half precision is first asked what rounding alone would tell (`core.information.rounding`). Where that is
    too much, it measures in float32; the result's settings say which, and how much.
    """
    batch_size = plan.batch_size or BATCH_SIZE
    with model.busy(), ExitStack() as precision:
        x = latents_of(model, image)
        estimator = Estimator(
            model, x, plan.comparisons, seed=plan.seed, sampler=plan.sampler, edges=edges, batch_size=batch_size
        )
        events = _estimate(estimator, plan, summarise, excess, progress)
        if not is_rounded(model):
            yield from events
            return
        rounding = Rounding(model, x, plan.comparisons, seed=plan.seed, batch_size=batch_size)
        budget, least = plan.evals(plan.max_replicates), plan.evals(plan.looks[0])
        for _ in rounding.run():
            n = rounding.n_evals
            yield progress(n, n + budget, 0, math.inf, None, n + least)
        narrow: Any = model
        if rounding.share > MOST:
            precision.enter_context(narrow.in_float32())
        told = {"dtype": str(narrow.dtype).removeprefix("torch."), "rounding": rounding.share}
        for event in events:
            yield _after(rounding.n_evals, told, event)


def _estimate(
    estimator: Estimator,
    plan: Plan,
    summarise: Callable[[Estimate], Measured],
    excess: Callable[[Measured], float],
    progress: Callable[..., Told],
) -> Generator[Told | Measured, None, None]:
    budget = plan.evals(plan.max_replicates)
    partial: Measured | None = None
    reached, too_large, expected = math.inf, math.inf, plan.evals(plan.looks[0])
    for look in plan.looks:
        for _ in estimator.run(look):
            n = estimator.n_replicates
            if n > max(1, partial.n_replicates if partial else 0):
                partial = summarise(estimator.result())
                reached, too_large = partial.rel_error, excess(partial)
                expected = plan.expected_evals(n, too_large)
            yield progress(estimator.n_evals, budget, n, reached, partial, expected)
        if too_large <= 1:
            break
    if partial is None:
        raise AssertionError("the first look needs at least two replicates")
    yield replace(partial, stopped="converged" if too_large <= 1 else "budget")


def _after(n_evals: int, told: dict[str, Any], event: Any) -> Any:
    """An event of an estimate before which there were other evaluations, with what they told."""
    if event is None:
        return None
    if isinstance(event, Measurement):
        return replace(event, n_evals=n_evals + event.n_evals, settings={**event.settings, **told})
    counted = {name: n_evals + getattr(event, name) for name in ("n_evals", "max_evals", "expected_evals")}
    return event._replace(partial=_after(n_evals, told, event.partial), **counted)


def last_of(
    run: Generator[Progress[Measured] | Measured, None, None],
    callback: Callable[[Any], bool | None] | None,
) -> Measured:
    """The result at the end of a `measure`, or so far, if the callback returns False on its progress."""
    for event in run:
        if isinstance(event, Measurement):
            return event
        if callback is not None and callback(event) is False:
            run.close()
            if event.partial is None:
                raise Cancelled("Stopped before there was anything to show.")
            return event.partial
    raise AssertionError("a measurement ends with its result")


def check_rel_error(rel_error: float) -> float:
    """The error to stop at, if it is one."""
    if not 0 < rel_error < math.inf:
        raise ValueError(f"rel_error has to be a positive number, such as 0.1, not {rel_error}.")
    return float(rel_error)


def check_text(model: NoisePredictor, text: str) -> None:
    """Raise a `PromptError` for a text that the model cannot take, where it can tell."""
    check_prompt = getattr(model, "check_prompt", None)
    if check_prompt is not None:
        check_prompt(text)


def relative_errors(bits: Floats, stderr: Floats) -> Floats:
    """[W] each standard error over what its bits are measured against; 0 where nothing says anything."""
    scale = np.maximum(bits, FLOOR * bits.max(initial=0.0))
    return np.asarray(np.divide(stderr, scale, out=np.zeros_like(stderr), where=scale > 0))


def settings_of(model: NoisePredictor, plan: Plan, **others: Any) -> dict[str, Any]:
    """What it takes to repeat a measurement, JSON-able."""
    return {
        "model": getattr(getattr(model, "spec", None), "name", type(model).__name__),
        "max_evals": plan.max_evals,
        "log_snr_range": list(integrated_range(model, plan.sampler)),
        "sampler": asdict(plan.sampler),
        **others,
    }


def default_steps(model: NoisePredictor) -> int:
    """Steps of the model's sampler."""
    return int(getattr(getattr(model, "spec", None), "num_inference_steps", 50))


def latents_of(model: NoisePredictor, image: "ImageLike | Generation") -> Tensor:
    """Clean latents [C, h, w] on the model's device."""
    image = getattr(image, "latents", image)
    if not isinstance(image, Tensor):
        encode = getattr(model, "encode", None)
        if encode is None:
            raise ImageError(f"{type(model).__name__} cannot encode a picture; give it latents.")
        latents: Tensor = encode(image)[0]
        return latents
    latents = image[0] if image.ndim == 4 and len(image) == 1 else image
    if tuple(latents.shape) != tuple(model.latent_shape):
        raise ImageError(f"Latents of shape {tuple(image.shape)} were given; the model has {model.latent_shape}.")
    device = getattr(model, "device", latents.device)
    return latents.to(device).float()
