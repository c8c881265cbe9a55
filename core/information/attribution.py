"""How many bits each word of a prompt tells a picture: `attribute`, and the same as a generator, `attribute_iter`."""

import difflib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from core.errors import Cancelled, ImageError, PromptError, WordNotInPromptError
from core.information.estimator import Comparison, Cost, Estimate, Estimator, NoisePredictor, cost
from core.information.quadrature import Sampler
from core.information.results import Attribution, AttributionProgress, Floats, Given, Stopped, Timeline
from core.text import delete_words, distinct_words, only_words

if TYPE_CHECKING:
    from core.sampling import Generation

BATCH_SIZE = 32
"""Latents in a U-Net call unless told otherwise. More gains little on a CPU, and makes a cancel wait longer."""
MAX_REPLICATES = 64
"""The budget unless told otherwise."""
FLOOR = 0.1
"""A word smaller than this share of the largest is measured to within rel_error of that share, not of itself."""

Picture = Image.Image | str | Path | Tensor
Event = AttributionProgress | Attribution


def attribute(
    model: NoisePredictor,
    image: "Picture | Generation",
    prompt: str,
    *,
    seed: int = 0,
    words: Sequence[str] | None = None,
    given: Given = "rest",
    rel_error: float = 0.1,
    max_evals: int | None = None,
    batch_size: int | None = None,
    whole_prompt: bool = False,
    num_inference_steps: int | None = None,
    sampler: Sampler | None = None,
    callback: Callable[[AttributionProgress], bool | None] | None = None,
) -> Attribution:
    """How many bits each word of `prompt` tells `image`, where, and when in the denoising.

    image: a PIL picture, the path of one, a `Generation`, or latents [1, C, h, w].
    words: those asked for; all of the prompt's by default. A word that occurs twice counts as one.
    given: `rest` measures a word given the rest of the prompt (CMI), `nothing` the word alone (MI).
    rel_error: sampling stops when every word's standard error is at most this share of its bits (of a tenth of the
        largest word's, for smaller words), or when `max_evals` latents have gone through the U-Net.
    batch_size: most latents in a U-Net call; results do not depend on it.
    whole_prompt: also measure the whole prompt against the empty text; one more prompt a noise sample.
    num_inference_steps: how many bins the timeline has; the generation's, or the model's default.
    callback: sees an `AttributionProgress` after every U-Net call; if it returns False, the result so far is returned
        (`stopped` says "cancelled"), or `Cancelled` raised where there is none yet.
    """
    run = attribute_iter(
        model,
        image,
        prompt,
        seed=seed,
        words=words,
        given=given,
        rel_error=rel_error,
        max_evals=max_evals,
        batch_size=batch_size,
        whole_prompt=whole_prompt,
        num_inference_steps=num_inference_steps,
        sampler=sampler,
    )
    for event in run:
        if isinstance(event, Attribution):
            return event
        if callback is not None and callback(event) is False:
            run.close()
            if event.partial is None:
                raise Cancelled("Stopped before there was anything to show.")
            return event.partial
    raise AssertionError("attribute_iter ends with an Attribution")


def attribute_iter(
    model: NoisePredictor,
    image: "Picture | Generation",
    prompt: str,
    *,
    seed: int = 0,
    words: Sequence[str] | None = None,
    given: Given = "rest",
    rel_error: float = 0.1,
    max_evals: int | None = None,
    batch_size: int | None = None,
    whole_prompt: bool = False,
    num_inference_steps: int | None = None,
    sampler: Sampler | None = None,
) -> Generator[Event, None, None]:
    """`attribute`, with an `AttributionProgress` after every U-Net call, and last the `Attribution`.

    Words and settings are checked here, before the first `next()`. Closing the generator stops the work within one
    U-Net call and frees the model.
    """
    check_prompt = getattr(model, "check_prompt", None)
    if check_prompt is not None:
        check_prompt(prompt)
    if given not in ("rest", "nothing"):
        raise ValueError(f"given is 'rest' (CMI) or 'nothing' (MI), not {given!r}.")
    if not 0 < rel_error < math.inf:
        raise ValueError(f"rel_error has to be a positive number, such as 0.1, not {rel_error}.")
    job = _Job(
        prompt=prompt,
        words=choose_words(prompt, words),
        given=given,
        seed=int(seed),
        rel_error=float(rel_error),
        whole_prompt=whole_prompt,
        batch_size=batch_size or BATCH_SIZE,
        n_bins=num_inference_steps or int(getattr(image, "num_inference_steps", 0)) or _default_steps(model),
        max_evals=max_evals,
        sampler=sampler or Sampler(),
    )
    return _run(model, image, job)


def choose_words(prompt: str, words: Sequence[str] | None) -> tuple[str, ...]:
    """The words asked for, lower case, in the prompt's order; all of them by default."""
    present = distinct_words(prompt)
    if not present:
        raise PromptError("The prompt has no word to attribute anything to.")
    wanted = {word.strip().lower() for word in ([words] if isinstance(words, str) else words or present)}
    for word in sorted(wanted.difference(present)):
        raise WordNotInPromptError(word, difflib.get_close_matches(word, present, n=1) or present)
    return tuple(word for word in present if word in wanted)


def compare(prompt: str, words: Sequence[str], given: Given) -> list[Comparison]:
    """The texts to compare, one pair a word: without and with it."""
    if given == "rest":
        return [Comparison(delete_words(prompt, [word]), prompt) for word in words]
    return [Comparison("", only_words(prompt, [word])) for word in words]


def relative_errors(bits: Floats, stderr: Floats) -> Floats:
    """[W] each word's standard error over what it is measured against; 0 where nothing says anything."""
    scale = np.maximum(bits, FLOOR * bits.max(initial=0.0))
    return np.asarray(np.divide(stderr, scale, out=np.zeros_like(stderr), where=scale > 0))


@dataclass(frozen=True)
class _Job:
    """One attribution as asked for, checked."""

    prompt: str
    words: tuple[str, ...]
    given: Given
    seed: int
    rel_error: float
    whole_prompt: bool
    batch_size: int
    n_bins: int
    max_evals: int | None
    sampler: Sampler
    comparisons: list[Comparison] = field(init=False)
    """One a word, and one more for the whole prompt where that is asked for."""
    cost: Cost = field(init=False)
    max_replicates: int = field(init=False)

    def __post_init__(self) -> None:
        whole = [Comparison("", self.prompt)] if self.whole_prompt else []
        object.__setattr__(self, "comparisons", compare(self.prompt, self.words, self.given) + whole)
        object.__setattr__(self, "cost", cost(self.comparisons, self.sampler))
        least = self.evals(self.sampler.min_replicates)
        if self.max_evals is not None and self.max_evals < least:
            raise ValueError(
                f"{self.max_evals} U-Net evaluations are too few for an error: {len(self.words)} words need at least "
                f"{least}. Raise max_evals, or ask for fewer words."
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


def _run(model: NoisePredictor, image: "Picture | Generation", job: _Job) -> Generator[Event, None, None]:
    with model.busy():
        density = job.sampler.density(model.schedule.log_snr_range)
        edges = model.schedule.bin_edges(job.n_bins, density.low, density.high)
        x = _latents(model, image)
        estimator = Estimator(
            model,
            x,
            job.comparisons,
            seed=job.seed,
            sampler=job.sampler,
            edges=edges,
            batch_size=job.batch_size,
        )
        settings = _settings(model, job, (density.low, density.high))
        budget = job.evals(job.max_replicates)
        partial: Attribution | None = None
        for look in job.looks:
            for _ in estimator.run(look):
                n = estimator.n_replicates
                if n > max(1, partial.n_replicates if partial else 0):
                    partial = summarise(estimator.result(), edges, job, "cancelled", settings)
                reached = partial.rel_error if partial else math.inf
                expected = _expected_evals(partial, job)
                yield AttributionProgress(estimator.n_evals, budget, n, reached, partial, expected)
            if partial is not None and partial.rel_error <= job.rel_error:
                break
        if partial is None:
            raise AssertionError("the first look needs at least two replicates")
        yield replace(partial, stopped="converged" if partial.rel_error <= job.rel_error else "budget")


def summarise(estimate: Estimate, edges: Floats, job: _Job, stopped: Stopped, settings: dict[str, Any]) -> Attribution:
    """Means over replicates and their standard errors."""
    n_words = len(job.words)
    maps, map_stderr = mean_and_stderr(estimate.maps)
    totals, stderr = mean_and_stderr(estimate.maps.sum((2, 3)))
    direct, direct_stderr = mean_and_stderr(estimate.direct)
    widths = np.diff(edges)
    per_width = np.divide(1.0, widths, out=np.zeros_like(widths), where=widths > 0)
    when, when_stderr = mean_and_stderr(estimate.timeline * per_width)
    return Attribution(
        words=job.words,
        bits=totals[:n_words],
        stderr=stderr[:n_words],
        maps=maps[:n_words],
        map_stderr=map_stderr[:n_words],
        direct_bits=direct[:n_words],
        direct_stderr=direct_stderr[:n_words],
        timeline=Timeline(edges, when[:n_words], when_stderr[:n_words]),
        prompt_bits=float(totals[-1]) if job.whole_prompt else None,
        prompt_stderr=float(stderr[-1]) if job.whole_prompt else None,
        n_evals=estimate.n_evals,
        n_replicates=len(estimate.maps),
        stopped=stopped,
        rel_error=float(relative_errors(totals[:n_words], stderr[:n_words]).max()),
        prompt=job.prompt,
        given=job.given,
        seed=job.seed,
        settings=settings,
    )


def mean_and_stderr(replicates: Floats) -> tuple[Floats, Floats]:
    """Mean over the first axis, and its standard error from the spread."""
    return replicates.mean(0), replicates.std(0, ddof=1) / math.sqrt(len(replicates))


def _expected_evals(partial: Attribution | None, job: _Job) -> int:
    """Evaluations at the look where the error should be small enough, if the spread stays what it is."""
    needed = partial.n_replicates * (partial.rel_error / job.rel_error) ** 2 if partial else 0.0
    return job.evals(next((look for look in job.looks if look >= needed), job.looks[-1]))


def _settings(model: NoisePredictor, job: _Job, log_snr_range: tuple[float, float]) -> dict[str, Any]:
    return {
        "model": getattr(getattr(model, "spec", None), "name", type(model).__name__),
        "rel_error": job.rel_error,
        "max_evals": job.max_evals,
        "whole_prompt": job.whole_prompt,
        "num_inference_steps": job.n_bins,
        "log_snr_range": list(log_snr_range),
        "sampler": asdict(job.sampler),
    }


def _default_steps(model: NoisePredictor) -> int:
    return int(getattr(getattr(model, "spec", None), "num_inference_steps", 50))


def _latents(model: NoisePredictor, image: "Picture | Generation") -> Tensor:
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
