"""One wrapper round a StableDiffusionPipeline: encode, decode, predict noise at any log-SNR, generate."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core.diffusion.graphs import CallGraphs
from core.diffusion.hookpoints import check_hookpoints, nearest_hookpoints
from core.diffusion.images import prepare_image
from core.diffusion.memory import DEFAULT_LIMIT, BatchSizer, DeviceMemory, Load, has_hooks
from core.diffusion.sampling import Branch, Generation, Preview, SamplerState, StepContext, ddim_step
from core.diffusion.schedule import NoiseSchedule, stage_at, step_times
from core.diffusion.vocabulary import Vocabulary
from core.errors import Cancelled, ModelError
from core.spec import ModelSpec

if TYPE_CHECKING:
    from core.edits import ConceptEdit

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_MAPS_A_LATENT = 26
"""What a latent takes in the U-Net, in feature maps of its first level, where attention never holds its scores: counted
over all that a call of Stable Diffusion v1.4 allocates (64 MiB in float16; 32 latents on an H200 took that)."""
_MAPS_AN_IMAGE = 6
"""The same of the decoder, in maps of its last level: 384 MiB in float16, plus the workspace of its convolutions."""
_REMEDY = (
    "Close what else uses this memory, or load the model in half precision (dtype='float16'), with offload=True or on "
    "another device."
)

_TEXTS_KEPT = 1024
"""Text embeddings kept: 236 kB each on SD v1.4 in float32, a quarter of a gigabyte in all."""


class Diffuser:
    """A text-to-image model. One job at a time: generation and attribution hold `busy()` for as long as they live."""

    spec: ModelSpec
    """The model's settings; hookpoints and image size as found in the loaded weights."""
    schedule: NoiseSchedule
    """Its noise schedule and sampler steps."""
    image_size: int
    """Side of its pictures in pixels."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of its latents."""
    device: torch.device
    """Where the model computes."""
    dtype: torch.dtype
    """What it computes in."""
    n_unet_calls: int
    """Forward calls of the U-Net so far."""
    n_unet_rows: int
    """Latents that went through the U-Net so far: the sum of the calls' batch sizes."""
    step_context: StepContext | None
    """Set while the sampler calls the U-Net; None for any other call."""
    graphs: CallGraphs
    """Replays small calls of the U-Net on a GPU; with `model.graphs.enabled = False` every call is made anew."""

    def __init__(
        self,
        pipeline: Any,
        spec: ModelSpec,
        *,
        device: torch.device | None = None,
        memory_limit: int = DEFAULT_LIMIT,
    ) -> None:
        """`device` is where the parts compute that wait in main memory until then; None: all compute where they are.

        `memory_limit` is as for `DeviceMemory`, in bytes.
        """
        self._unet, self._vae = pipeline.unet.eval(), pipeline.vae.eval()
        self._text_encoder = pipeline.text_encoder.eval()
        for module in (self._unet, self._vae, self._text_encoder):
            module.requires_grad_(False)
        self.schedule, self._prediction_type = _read_scheduler(pipeline.scheduler)
        self.vocabulary = Vocabulary(pipeline.tokenizer)
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        side = int(self._unet.config.sample_size)
        self.image_size = side * factor
        if spec.image_size is not None and spec.image_size != self.image_size:
            raise ModelError(f"{spec.name!r} should draw {spec.image_size} pixels, its weights {self.image_size}.")
        self.latent_shape = (int(self._unet.config.in_channels), side, side)
        hookpoints = spec.hookpoints or nearest_hookpoints(self._unet)
        check_hookpoints(self._unet, hookpoints)
        self.spec = replace(spec, hookpoints=hookpoints, image_size=self.image_size)
        self.device, self.dtype = device or torch.device(self._unet.device), self._unet.dtype
        self._text_device = device or torch.device(self._text_encoder.device)
        fits = self.device.type in ("cpu", "cuda")  # a CPU convolves a batch of 28 a fifth faster this way
        self._memory_format = torch.channels_last if fits else torch.contiguous_format
        for module in (self._unet, self._vae):
            module.to(memory_format=self._memory_format)
        self.n_unet_calls = self.n_unet_rows = 0
        self.step_context = None
        self._sizer = BatchSizer(DeviceMemory(self.device, memory_limit))
        self._unet_modules = tuple(self._unet.modules())
        self.graphs = CallGraphs(self._unet, enabled=self.device.type == "cuda" and device is None)
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()
        # Not an RLock: each next() of a job may run in another thread, and any of them has to be able to free it.
        self._lock = threading.Lock()

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Cross-attention blocks to look into, first to last."""
        return self.spec.hookpoints

    @property
    def unet(self) -> torch.nn.Module:
        """The U-Net, for hooks."""
        unet: torch.nn.Module = self._unet
        return unet

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Hold the model for one job; another waits here. Entered and left in different threads if need be."""
        if not self._lock.acquire(blocking=False):
            log.info("the model is busy; waiting for the present job to end or be closed")
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """The U-Net in float32, for whoever holds the model; afterwards its weights are what they were, to the bit."""
        narrow, self.dtype = self.dtype, torch.float32
        self.graphs.clear()  # of weights that are about to move; their memory is needed
        try:
            # diffusers' own `to` warns, as in loading
            load = Load("the U-Net in float32", torch.float32)
            self._sizer.run(load, 1, 1, lambda _: torch.nn.Module.to(self._unet, torch.float32), remedy=_REMEDY)
            yield
        finally:
            self.dtype = narrow
            self.graphs.clear()
            torch.nn.Module.to(self._unet, narrow)

    def unknown_words(self, prompt: str) -> dict[str, list[str]]:
        """Each word of the prompt that the model does not know, with the nearest known words."""
        return self.vocabulary.unknown_words(prompt)

    def check_prompt(self, prompt: str) -> None:
        """Raise a `PromptError` for a prompt that is empty, too long, or has words that the model does not know."""
        self.vocabulary.check(prompt)

    @torch.no_grad()
    def encode(self, image: Image.Image | str | Path) -> Tensor:
        """Latents [1, C, h, w] of a picture of any size: the posterior's mean times the scaling factor."""
        pixels = np.asarray(prepare_image(image, self.image_size), dtype=np.float32) / 127.5 - 1
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        x = x.to(self.device, self.dtype, memory_format=self._memory_format)
        load = Load("the encoder", self.dtype)
        mean: Tensor = self._sizer.run(load, 1, 1, lambda _: self._vae.encode(x).latent_dist.mean, remedy=_REMEDY)[0]
        return mean.float() * float(self._vae.config.scaling_factor)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents [N, C, h, w], as many at once as fit."""
        load = Load("the decoder", self.dtype)
        width = int(self._vae.config.block_out_channels[0])
        estimate = _MAPS_AN_IMAGE * width * self.image_size**2 * self.dtype.itemsize
        n = len(latents)
        rows = self._sizer.fits(load, n, estimate, lambda n: self._decode(latents[:n]))
        parts = self._sizer.run(load, n, rows, lambda part: self._decode(latents[part]), remedy=_REMEDY)
        return [image for part in parts for image in part]

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        x = latents.to(self.device, self.dtype, memory_format=self._memory_format) / self._vae.config.scaling_factor
        pixels = self._vae.decode(x, return_dict=False)[0].float().clamp(-1, 1)
        values = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(value) for value in values]

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, L, D] of texts; the empty text is allowed. Each distinct text is encoded once and kept.

        A text of more tokens than the text encoder reads at once is read in windows, which L counts together. Where
        another of the texts has fewer, its last rows are zeros, which the U-Net is told to leave out of account.
        """
        for text in dict.fromkeys(texts):
            if text not in self._embeddings:
                # One by one: a text's rounding would otherwise depend on which others it was first met with.
                self._embeddings[text] = self._encode_one(text)
            self._embeddings.move_to_end(text)
        embeddings = pad_sequence([self._embeddings[text] for text in texts], batch_first=True)
        while len(self._embeddings) > _TEXTS_KEPT:
            self._embeddings.popitem(last=False)
        return embeddings

    @torch.no_grad()
    def _encode_one(self, text: str) -> Tensor:
        self.vocabulary.check_length(text)
        tokens = torch.tensor(self.vocabulary.windows(text), device=self._text_encoder.device)
        embedding: Tensor = self._text_encoder(tokens)[0].flatten(0, 1)
        return embedding.to(self._text_device)

    def predict_noise(self, x: Tensor, log_snr: Tensor, embeddings: Tensor) -> Tensor:
        """The model's guess of the noise, [B, C, h, w] float32, in noisy latents x [B, C, h, w] at log_snr [B].

        embeddings is [B, L, D]. No guidance. The timestep is interpolated on the trained schedule's log-SNR grid.
        """
        a = log_snr.double().cpu()
        timesteps = torch.from_numpy(np.atleast_1d(self.schedule.timestep_at(a.numpy())))
        return self._predict_in_parts(x, timesteps, torch.sigmoid(a), embeddings)

    def latents_at_once(self, n: int, n_tokens: int | None = None) -> int:
        """How many of n latents fit into one call of the U-Net, for texts that take so many rows of the embeddings.

        `predict_noise` parts a larger batch by itself. All n while something is hooked into the U-Net: what it keeps or
        changes is a whole batch, so nothing is parted then.
        """
        if n == 1 or has_hooks(self._unet_modules):
            return n
        length = self.vocabulary.window + 2 if n_tokens is None else n_tokens
        width, side = int(self._unet.config.block_out_channels[0]), self.latent_shape[-1]
        estimate = _MAPS_A_LATENT * width * side**2 * self.dtype.itemsize
        return self._sizer.fits(self._load(length), n, estimate, lambda n: self._probe(n, length))

    def in_parts(
        self,
        n: int,
        compute: Callable[[slice], Result],
        *,
        most: int | None = None,
        guidance_scale: float | None = None,
    ) -> list[Result]:
        """Results of `compute`, which runs the sampler with some of n prompts, for as many prompts at once as fit.

        For runs that something is hooked into, which cannot be parted within. Where memory runs out, `compute` is
        called again with half as many.

        Args:
            n: Prompts.
            compute: Is given which; enters its recordings anew each time it is called.
            most: Prompts at once, however many fit.
            guidance_scale: Of the runs; the model's own by default. With guidance a prompt takes two latents.

        Raises:
            OutOfMemory: Not even one prompt fits.
        """
        scale = self.spec.guidance_scale if guidance_scale is None else guidance_scale
        n_branches = 1 if scale == 1 else 2
        rows = n if most is None else min(n, most)
        rows = max(1, self.latents_at_once(n_branches * rows) // n_branches)
        load = self._load(self.vocabulary.window + 2)._replace(what="the sampler")
        return self._sizer.run(load, n, self._sizer.learned(load, rows), compute, remedy=_REMEDY)

    def _load(self, n_tokens: int) -> Load:
        return Load("the U-Net", self.dtype, n_tokens)

    def _probe(self, n: int, n_tokens: int) -> None:
        """A call of the U-Net for its memory's sake, which counts for nothing."""
        calls, rows = self.n_unet_calls, self.n_unet_rows
        x = torch.zeros(n, *self.latent_shape, device=self.device)
        text = torch.ones(n, n_tokens, int(self._unet.config.cross_attention_dim), device=self.device)
        text[:, self.vocabulary.window + 2 :] = 0  # as of a shorter text: with a mask
        replays, self.graphs.enabled = self.graphs.enabled, False  # a graph's memory is not that of a call
        try:
            self._predict(x, torch.zeros(n), torch.full((n,), 0.5), text)
        finally:
            self.graphs.enabled = replays
            self.n_unet_calls, self.n_unet_rows = calls, rows

    def _predict_in_parts(self, x: Tensor, timesteps: Tensor, abar: Tensor, embeddings: Tensor) -> Tensor:
        """`_predict` of as many rows at once as fit."""
        n, length = len(x), embeddings.shape[1]
        # Hooks are given whole batches: of one in parts a recording would keep the last, and an edit miss its rows.
        whole = n > 1 and has_hooks(self._unet_modules)
        rows = n if whole else self.latents_at_once(n, length)

        def compute(part: slice) -> Tensor:
            counted = self.n_unet_calls, self.n_unet_rows
            try:
                return self._predict(x[part], timesteps[part], abar[part], embeddings[part])
            except RuntimeError:
                self.n_unet_calls, self.n_unet_rows = counted
                self.graphs.clear()  # memory may have run out, and theirs is better spent on the call
                raise

        parts = self._sizer.run(self._load(length), n, rows, compute, whole=whole, remedy=_REMEDY)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def _predict(self, x: Tensor, timesteps: Tensor, abar: Tensor, embeddings: Tensor) -> Tensor:
        """epsilon from the U-Net's output, whatever it was trained to predict; timesteps [B] may lie between two."""
        self.n_unet_calls += 1
        self.n_unet_rows += len(x)
        with _full_convolutions(), self.graphs.replaying(len(x)):
            out: Tensor = self._unet(
                x.to(self.device, self.dtype, memory_format=self._memory_format),
                self._on_device(timesteps),
                encoder_hidden_states=embeddings.to(self.device, self.dtype),
                encoder_attention_mask=self._shorter(embeddings),
                return_dict=False,
            )[0].float()
        if self._prediction_type == "epsilon":
            return out
        scale = self._on_device(abar)[:, None, None, None]
        return scale.sqrt() * out + (1 - scale).sqrt() * x.to(self.device, torch.float32)

    def _on_device(self, values: Tensor) -> Tensor:
        """In float32 where the model computes. A GPU is not waited for: it may still have the last call to work off."""
        return values.float().to(self.device, non_blocking=self.device.type == "cuda")

    def _shorter(self, embeddings: Tensor) -> Tensor | None:
        """[B, L] which rows of embeddings are of the text; None where all are."""
        if embeddings.shape[1] <= self.vocabulary.window + 2:
            return None
        mask = embeddings.any(-1)
        return None if mask.all() else mask.to(self.device)

    def generate(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        previews: bool = True,
        edits: "Sequence[ConceptEdit]" = (),
        contexts: Sequence[AbstractContextManager[Any]] = (),
        callback: Callable[[Preview], bool | None] | None = None,
    ) -> Generation:
        """A picture of the prompt. `callback` sees every preview; if it returns False, `Cancelled` is raised.

        `edits` and `contexts` are as for `generate_iter`.
        """
        run = self.generate_iter(
            prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            previews=previews,
            edits=edits,
            contexts=contexts,
        )
        for item in run:
            if isinstance(item, Generation):
                return item
            if callback is not None and callback(item) is False:
                run.close()
                raise Cancelled(f"Stopped after step {item.step + 1} of {item.n_steps}.")
        raise AssertionError("generate_iter ends with a Generation")

    def generate_iter(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        previews: bool = True,
        edits: "Sequence[ConceptEdit]" = (),
        contexts: Sequence[AbstractContextManager[Any]] = (),
    ) -> Generator[Preview | Generation, None, None]:
        """A `Preview` after every U-Net call, and last the `Generation`. Closing it stops the work and frees the model.

        The prompt, the settings and the `edits`, by the model's own concepts, are checked here, before the first
        `next()`. `contexts` are as for `sample`, and are entered before the edits; a recording among them must not
        stop, for the picture is wanted.
        """
        self.check_prompt(prompt)
        n_steps = self.spec.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.spec.guidance_scale if guidance_scale is None else guidance_scale
        self.schedule.sampler_timesteps(n_steps)
        if edits:
            from core.edits import load_editor  # which needs the tables of concepts

            contexts = [*contexts, load_editor(self).editing(edits, n_steps)]
        return self._generate(prompt, int(seed), n_steps, float(scale), previews, contexts)

    def _generate(
        self,
        prompt: str,
        seed: int,
        n_steps: int,
        scale: float,
        previews: bool,
        contexts: Sequence[AbstractContextManager[Any]],
    ) -> Generator[Preview | Generation, None, None]:
        with self.busy(), ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            shown: list[Preview] = []
            for state in self._sample([prompt], [seed], n_steps, scale, n_steps - 1):
                step, _, t, _ = state.step_context
                image = self.decode(state.x0)[0] if previews else None
                preview = Preview(step, n_steps, t, stage_at(t, self.spec.stages).name, image)
                shown.append(preview)
                yield preview
            kept = tuple(shown) if previews else ()
            yield Generation(self.decode(state.x)[0], state.x.cpu(), prompt, seed, n_steps, scale, kept)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        last_step: int | None = None,
        after: SamplerState | None = None,
        contexts: Sequence[AbstractContextManager[Any]] = (),
    ) -> Generator[SamplerState, None, None]:
        """Denoise a batch of prompts together: a `SamplerState` after each step, up to `last_step`.

        Prompts may be empty. Closing the generator frees the model, as does its end. `contexts`, such as recordings and
        edits, are entered in their order once the model is this job's, and left before it is another's.

        `after` goes on from a state of another run of this batch, in place of the seeds' noise: what is changed from a
        step on costs no step before it.

        Raises:
            ValueError: Not one seed a prompt, a last step that the sampler does not have, or a state of another number
                of steps, of its last one, or of another batch.
        """
        n_steps = self.spec.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.spec.guidance_scale if guidance_scale is None else guidance_scale
        last = n_steps - 1 if last_step is None else last_step
        self.schedule.sampler_timesteps(n_steps)
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds were given; there must be one seed each.")
        if not 0 <= last < n_steps:
            raise ValueError(f"The last step must be between 0 and {n_steps - 1}, not {last}.")
        if after is not None:
            step, its_steps, n_rows = after.step_context.step, after.step_context.n_steps, len(after.x)
            if its_steps != n_steps or step >= last or n_rows != len(prompts):
                raise ValueError(
                    f"A run of {n_steps} steps up to step {last} with {len(prompts)} prompts cannot go on after step "
                    f"{step} of {its_steps} with {n_rows}."
                )
        for prompt in prompts:
            if prompt:
                self.check_prompt(prompt)
        return self._sample_alone(list(prompts), list(seeds), n_steps, float(scale), last, after, contexts)

    def _sample_alone(
        self,
        prompts: list[str],
        seeds: list[int],
        n_steps: int,
        scale: float,
        last: int,
        after: SamplerState | None,
        contexts: Sequence[AbstractContextManager[Any]],
    ) -> Generator[SamplerState, None, None]:
        with self.busy(), ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            yield from self._sample(prompts, seeds, n_steps, scale, last, after)

    def _sample(
        self,
        prompts: list[str],
        seeds: list[int],
        n_steps: int,
        scale: float,
        last: int,
        after: SamplerState | None = None,
    ) -> Generator[SamplerState, None, None]:
        branches: tuple[Branch, ...] = ("uncond", "cond") if scale != 1 else ("cond",)
        embeddings = self.encode_text([""] * len(prompts) * (len(branches) - 1) + prompts)
        first = 0 if after is None else after.step_context.step + 1
        x = torch.cat([self._initial_noise(seed) for seed in seeds]) if after is None else after.x.to(self.device)
        times, timesteps = step_times(n_steps), self.schedule.sampler_timesteps(n_steps)
        alphas, alphas_after = self.schedule.sampler_alphas(n_steps)
        for step in range(first, last + 1):
            step_context = StepContext(step, n_steps, float(times[step]), branches)
            self.step_context = step_context
            try:
                eps = self._guided(x, int(timesteps[step]), float(alphas[step]), embeddings, scale)
            finally:
                self.step_context = None
            x0, x = ddim_step(x, eps, float(alphas[step]), float(alphas_after[step]))
            yield SamplerState(step_context, x, x0)

    def _initial_noise(self, seed: int) -> Tensor:
        # Drawn on the CPU, so that a seed means the same picture on every device.
        noise = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(seed))
        return noise.to(self.device)

    def _guided(self, x: Tensor, timestep: int, abar: float, embeddings: Tensor, scale: float) -> Tensor:
        n = len(embeddings)
        rows = x.repeat(n // len(x), 1, 1, 1)
        times, abars = (torch.full((n,), value, dtype=torch.float32, device=self.device) for value in (timestep, abar))
        eps = self._predict_in_parts(rows, times, abars, embeddings)
        if n == len(x):
            return eps
        uncond, cond = eps.chunk(2)
        return uncond + scale * (cond - uncond)


@contextmanager
def _full_convolutions() -> Iterator[None]:
    """On recent GPUs a convolution in float32 rounds its inputs to as few digits as float16 has, unless told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _read_scheduler(scheduler: Any) -> tuple[NoiseSchedule, str]:
    """The trained schedule and what the U-Net predicts. Whatever sampler the folder names, ours is DDIM."""
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None:
        raise ModelError(f"{type(scheduler).__name__} has no cumulative alphas; only DDPM-type models are supported.")
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(f"The U-Net predicts {prediction_type!r}; only 'epsilon' and 'v_prediction' are supported.")
    to_one = bool(scheduler.config.get("set_alpha_to_one", False))
    return NoiseSchedule.from_alphas_cumprod(abar.double().cpu().numpy(), to_one), prediction_type
