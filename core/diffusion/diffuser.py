"""A Stable Diffusion pipeline as one object: encode, decode, predict noise at any log-SNR, sample, generate."""

import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from core.arguments import as_items, as_seed
from core.diffusion.pipeline import PipelineParts
from core.diffusion.sampler import DdimSampler, SamplingRun
from core.diffusion.sampling import Generation, Preview, SamplerState, StepContext, is_guided
from core.diffusion.schedule import stage_at
from core.errors import Cancelled, NotFiniteError
from core.hardware.finite import NAMES, SAMPLER
from core.hardware.memory import DEFAULT_LIMIT
from core.job import Callback, Job, JobLock, finished
from core.spec import ModelSpec

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


class Edit(Protocol):
    """An edit that a run of the sampler can be given, such as those of `core.edits`."""

    def bind(self, model: "Diffuser", edits: "Sequence[Edit]", n_steps: int) -> AbstractContextManager[object]:
        """A context for one run of `n_steps` steps; called on the first of the run's `edits`, on behalf of them all.

        Raises:
            ValueError: An edit that cannot be applied.
        """
        ...


class Diffuser(PipelineParts):
    """A text-to-image model: the parts of a pipeline, and the sampler.

    It does one job at a time: generation and attribution hold `busy()` for as long as they live.
    """

    sampler: DdimSampler
    """Denoises with the noise predictor."""

    def __init__(
        self,
        pipeline: "StableDiffusionPipeline",
        spec: ModelSpec,
        *,
        device: torch.device | None = None,
        memory_limit: int = DEFAULT_LIMIT,
    ) -> None:
        """Wrap a pipeline; arguments and errors are those of `PipelineParts`."""
        super().__init__(pipeline, spec, device=device, memory_limit=memory_limit)
        self.sampler = DdimSampler(self.predictor, self.predictor.predict_v if self.predictor.predicts_v else None)
        self._lock = JobLock()

    @property
    def step_context(self) -> StepContext | None:
        """The sampler's present step, while it calls the U-Net; None for any other call."""
        return self.sampler.step_context

    def busy(self) -> AbstractContextManager[None]:
        """Hold the model for one job; another one waits here. May be entered and left in different threads."""
        return self._lock.held(lambda: log.info("the model is busy; waiting for the present job to end or be closed"))

    def lend(self) -> Callable[[], None]:
        """Let others hold the model while the job that holds it is suspended between two of its steps.

        Only for jobs whose hooks and settings of the model are not in place between two steps: measurements of
        information, with a model in float32. Returns what takes the model back; see `JobLock.lend`.
        """
        return self._lock.lend()

    def in_parts(
        self,
        n: int,
        compute: Callable[[slice], ResultT],
        *,
        max_size: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[ResultT]:
        """Results of `compute` for consecutive slices of n prompts, as many prompts at once as fit into memory.

        For runs of the sampler with hooks, whose calls cannot be split.

        Args:
            n: Prompts.
            compute: Runs the sampler with the prompts of a slice, and enters its recordings anew at each call; is
                called again with half as many prompts when memory runs out.
            max_size: Maximum number of prompts at once.
            guidance_scale: Of the runs; by default the model's. With guidance a prompt takes two latents.

        Raises:
            OutOfMemory: Not even one prompt fits.
        """
        scale = self.spec.guidance_scale if guidance_scale is None else guidance_scale
        return self.predictor.in_parts(n, compute, rows_per_item=2 if is_guided(scale) else 1, max_size=max_size)

    def generate_iter(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        previews: bool = True,
        edits: Edit | Sequence[Edit] = (),
        contexts: Sequence[AbstractContextManager[Any]] = (),
        callback: Callback[Preview] | None = None,
    ) -> Job[Preview, Generation]:
        """Generate an image of a prompt.

        `generate` returns the `Generation`; `generate_iter` a `Job`, which yields a `Preview` after every sampler step.
        Arguments are checked before the job starts.

        Args:
            prompt: The text.
            seed: Seed of the initial noise.
            num_inference_steps: Sampler steps; by default the model's.
            guidance_scale: Scale of classifier-free guidance; 1 or less is none; by default the model's.
            previews: Decode the predicted image after every step.
            edits: Edits by the model's own concepts, such as `core.SpatialEdit`.
            contexts: Recordings and edits, as for `sample`; entered before `edits`. A recording must not stop the run.
            callback: Called after every step. If it returns False, `Cancelled` is raised.

        Raises:
            PromptError: The model cannot read the prompt.
            ValueError: A number of steps that the sampler does not have, no seed, or an edit that does not apply.
        """
        self.check_prompt(prompt)
        run = self._run(prompt, seed, num_inference_steps, guidance_scale, contexts=contexts)
        if edits := as_items(edits):
            bound = edits[0].bind(self, edits, run.num_inference_steps)
            run = replace(run, contexts=[*contexts, bound])
        return Job(self._generate(run, previews), callback, _cancel)

    generate = finished(generate_iter)

    def sample(
        self,
        prompts: str | Iterable[str],
        *,
        seeds: int | Iterable[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        last_step: int | None = None,
        after: SamplerState | None = None,
        contexts: Sequence[AbstractContextManager[Any]] = (),
    ) -> Generator[SamplerState, None, None]:
        """Denoise a batch of prompts together: a `SamplerState` after each step.

        Arguments are checked at once. The model is held from the first step until the generator ends or is closed.

        Args:
            prompts: N texts, or one; may be empty.
            seeds: N seeds of the initial noise, from 0 to 2**64 - 1.
            num_inference_steps: Sampler steps; by default the model's.
            guidance_scale: Scale of classifier-free guidance; 1 or less is none; by default the model's.
            last_step: Ends the run early; by default the last of all.
            after: Go on from a state of another run of this batch, in place of the seeds' noise.
            contexts: Recordings and edits, entered in this order once the model is held, and left before it is free.

        Raises:
            PromptError: The model cannot read a prompt.
            ValueError: Not one seed per prompt; no seed; a step that the sampler does not have; an unfit state in
                `after`.
        """
        run = self._run(prompts, seeds, num_inference_steps, guidance_scale, last_step, after, contexts)
        for prompt in run.prompts:
            if prompt:
                self.check_prompt(prompt)
        return self._sample(run)

    def _run(
        self,
        prompts: str | Iterable[str],
        seeds: int | Iterable[int],
        num_inference_steps: int | None,
        guidance_scale: float | None,
        last_step: int | None = None,
        after: SamplerState | None = None,
        contexts: Sequence[AbstractContextManager[Any]] = (),
    ) -> SamplingRun:
        """A checked run, with the model's defaults."""
        n_steps = self.spec.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.schedule.sampler_timesteps(n_steps)
        return SamplingRun(
            prompts=as_items(prompts),
            seeds=tuple(as_seed(seed) for seed in as_items(seeds)),
            num_inference_steps=n_steps,
            guidance_scale=float(self.spec.guidance_scale if guidance_scale is None else guidance_scale),
            last_step=n_steps - 1 if last_step is None else last_step,
            after=after,
            contexts=contexts,
        )

    def _sample(self, run: SamplingRun) -> Generator[SamplerState, None, None]:
        with self.busy(), ExitStack() as stack:
            for context in run.contexts:
                stack.enter_context(context)
            yield from self.sampler.run(run, self.encode_text(run.texts))

    def _generate(self, run: SamplingRun, previews: bool) -> Generator[Preview, None, Generation]:
        with self.busy(), ExitStack() as stack:
            for context in run.contexts:
                stack.enter_context(context)
            try:
                return (yield from self._denoise(run, previews))
            except NotFiniteError as error:
                if self.dtype == torch.float32 or error.part not in (NAMES["unet"], SAMPLER):
                    raise
                log.warning("%s: the U-Net's values are not finite in %s: again in float32", self.spec.name, self.dtype)
                with self.in_float32():
                    return (yield from self._denoise(run, previews))

    def _denoise(self, run: SamplingRun, previews: bool) -> Generator[Preview, None, Generation]:
        shown: list[Preview] = []
        for state in self.sampler.run(run, self.encode_text(run.texts)):
            step, n_steps, t, _ = state.step_context
            image = self.decode(state.x0)[0] if previews else None
            preview = Preview(step, n_steps, t, stage_at(t, self.spec.stages).name, image)
            shown.append(preview)
            yield preview
        return Generation(
            image=self.decode(state.x)[0],
            latents=state.x.cpu(),
            prompt=run.prompts[0],
            seed=run.seeds[0],
            num_inference_steps=run.num_inference_steps,
            guidance_scale=run.guidance_scale,
            previews=tuple(shown) if previews else (),
        )


def _cancel(preview: Preview) -> Generation:
    raise Cancelled(f"Stopped after step {preview.step + 1} of {preview.n_steps}.")
