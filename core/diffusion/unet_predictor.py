"""A U-Net of diffusers as a noise predictor: log-SNR in place of timesteps, and batches that fit into memory."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from core.components import latent_side
from core.diffusion.predictor import Conditions
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.text_encoder import MASK, TEXT
from core.errors import ModelError
from core.hardware.batch_sizer import REMEDY, BatchSizer, Load, has_hooks, memory_format_for
from core.hardware.graphs import CallGraphs

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel

ResultT = TypeVar("ResultT")

_MAPS_PER_LATENT = 26
"""Memory that a latent takes, in feature maps of the U-Net's first level, where attention never stores its scores:
counted over all allocations of a call of Stable Diffusion v1.4 (64 MiB in float16; 32 latents on an H200 took that)."""


class UNetPredictor:
    """A `NoisePredictor`. A batch that does not fit into memory is evaluated in parts."""

    schedule: NoiseSchedule
    """The noise schedule that the U-Net was trained on."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of its latents."""
    device: torch.device
    """Where it computes."""
    dtype: torch.dtype
    """What it computes in."""
    predicts_v: bool
    """Whether the U-Net predicts v = sqrt(abar) eps - sqrt(1 - abar) x0, and not eps."""
    n_calls: int
    """Forward calls of the U-Net so far."""
    n_rows: int
    """Latents evaluated so far: the sum of the calls' batch sizes."""
    graphs: CallGraphs
    """Replays small calls on a GPU."""

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        scheduler: "DDIMScheduler",
        window_length: int,
        device: torch.device | None,
        sizer: BatchSizer,
    ) -> None:
        """Wrap a U-Net.

        Args:
            unet: Predicts the noise, or v.
            scheduler: The pipeline's, for the trained noise schedule and the spacing of the sampler's steps; its
                sampling method is not used.
            window_length: Rows of the embedding of a usual text, for the estimate of memory.
            device: Where the U-Net computes, if it waits in main memory between calls; None: where it is.
            sizer: Decides how many latents go into a call.

        Raises:
            ModelError: The U-Net predicts something else, draws images that are not square, or has no noise schedule
                of the DDPM type.
        """
        self._unet, self._window_length, self._sizer = unet, window_length, sizer
        self.schedule, self.predicts_v = _read_scheduler(scheduler)
        side = latent_side(unet.config.get("sample_size"))
        self.latent_shape = (int(unet.config.in_channels), side, side)
        self.device, self.dtype = device or torch.device(unet.device), unet.dtype
        self._memory_format = memory_format_for(self.device)
        self._hooked = uncompiled(unet)
        self._modules = tuple(self._hooked.modules())
        self.n_calls = self.n_rows = 0
        self.graphs = CallGraphs(unet, enabled=self.device.type == "cuda" and device is None)

    def predict_noise(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        """Predictions of eps, [B, C, h, w] float32, for latents x [B, C, h, w] at log_snr [B] under B conditions."""
        return self._in_calls(lambda *part: self.call(*part), x, log_snr, conditions)

    def predict_v(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        """What a U-Net that predicts v says, [B, C, h, w] float32; arguments as for `predict_noise`."""
        return self._in_calls(self._output, x, log_snr, conditions)

    def _in_calls(
        self,
        call: Callable[[Tensor, Tensor, Conditions], Tensor],
        x: Tensor,
        log_snr: Tensor,
        conditions: Conditions,
    ) -> Tensor:
        """The rows of `call`, as many at once as fit."""
        n = len(x)
        # Hooks expect whole batches: of one in parts, a recording would keep the last part, and an edit miss its rows.
        whole = n > 1 and self.has_hooks()
        rows = n if whole else self.latents_at_once(n, conditions)

        def compute(part: slice) -> Tensor:
            counted = self.n_calls, self.n_rows
            try:
                return call(x[part], log_snr[part], conditions[part])
            except RuntimeError:
                self.n_calls, self.n_rows = counted
                self.graphs.clear()  # memory may have run out, and theirs is better spent on the call
                raise

        parts = self._sizer.run(self._load(conditions), n, rows, compute, whole=whole, remedy=REMEDY)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def call(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        """`predict_noise` in one call of the U-Net."""
        out = self._output(x, log_snr, conditions)
        if not self.predicts_v:
            return out
        abar = self._on_device(torch.sigmoid(log_snr.double().cpu()))[:, None, None, None]
        return abar.sqrt() * out + (1 - abar).sqrt() * x.to(self.device, torch.float32)

    @torch.no_grad()
    def _output(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        """What the U-Net predicts, in one call."""
        self.n_calls += 1
        self.n_rows += len(x)
        timesteps = torch.from_numpy(np.atleast_1d(self.schedule.timestep_at(log_snr.double().cpu().numpy())))
        with _full_convolutions(), self.graphs.replaying(len(x)), self._hooks_seen():
            out: Tensor = self._unet(
                x.to(self.device, self.dtype, memory_format=self._memory_format),
                self._on_device(timesteps),
                encoder_hidden_states=conditions.tensors[TEXT].to(self.device, self.dtype),
                encoder_attention_mask=self._mask(conditions),
                return_dict=False,
            )[0].float()
        return out

    def _on_device(self, values: Tensor) -> Tensor:
        """In float32 on the device. Without waiting for a GPU, which may still be at work on the last call."""
        return values.float().to(self.device, non_blocking=self.device.type == "cuda")

    def _mask(self, conditions: Conditions) -> Tensor | None:
        """[B, L] which rows of the embeddings are of the text; None where all are."""
        mask = conditions.tensors.get(MASK)
        return None if mask is None or mask.all() else mask.to(self.device)

    def _hooks_seen(self) -> AbstractContextManager[object]:
        """A context in which a compiled U-Net calls the hooks of its modules; compiled code knows those alone that were
        there when it was compiled."""
        compiled = self._unet is not self._hooked or any(m._compiled_call_impl is not None for m in self._modules)
        return torch.compiler.set_stance("force_eager") if compiled and self.has_hooks() else nullcontext()

    def has_hooks(self) -> bool:
        """Whether there is a hook on any module of the U-Net."""
        return has_hooks(self._modules)

    def latents_at_once(self, n: int, conditions: Conditions | None = None) -> int:
        """How many of n latents fit into one call, under conditions of this length; all while there are hooks.

        `predict_noise` splits a larger batch by itself. With hooks it does not, since they expect a whole batch.
        """
        if n == 1 or self.has_hooks():
            return n
        load = self._load(conditions)
        width, side = int(self._unet.config.block_out_channels[0]), self.latent_shape[-1]
        estimate = _MAPS_PER_LATENT * width * side**2 * self.dtype.itemsize
        return self._sizer.fits(load, n, estimate, lambda n: self._probe(n, load.n_tokens))

    def in_parts(
        self, n: int, compute: Callable[[slice], ResultT], *, rows_per_item: int, max_size: int | None = None
    ) -> list[ResultT]:
        """Results of `compute` for consecutive slices of n items, as many at once as fit into memory.

        Args:
            n: Items.
            compute: Calls the U-Net with `rows_per_item` latents per item of the slice; is called again with half as
                many items when memory runs out.
            rows_per_item: Latents in a call for one item.
            max_size: Maximum number of items at once.

        Raises:
            OutOfMemory: Not even one item fits.
        """
        items = n if max_size is None else min(n, max_size)
        items = max(1, self.latents_at_once(rows_per_item * items) // rows_per_item)
        load = self._load()._replace(what="the sampler")
        return self._sizer.run(load, n, self._sizer.learned(load, items), compute, remedy=REMEDY)

    def in_float32(self) -> AbstractContextManager[None]:
        """Compute in float32 inside the block. Afterwards the weights are what they were, to the bit."""
        return self.computing_in(torch.float32)

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute in another precision inside the block. Afterwards the weights are what they were, to the bit."""
        before = self.dtype
        if dtype == before:
            yield
            return
        # What was made wider becomes narrow again without loss; what is made narrower does not come back.
        is_wider = torch.finfo(dtype).bits > torch.finfo(before).bits
        weights = [*self._unet.parameters(), *self._unet.buffers()]
        kept = [] if is_wider else [weight.data for weight in weights]
        self.dtype = dtype
        self.graphs.clear()  # they are of weights that are about to move, and their memory is needed
        try:
            load = Load(f"the U-Net in {str(dtype).removeprefix('torch.')}", dtype)
            # torch's own `to`: that of diffusers warns
            self._sizer.run(load, 1, 1, lambda _: torch.nn.Module.to(self._unet, dtype), remedy=REMEDY)
            yield
        finally:
            self.dtype = before
            self.graphs.clear()
            if is_wider:
                torch.nn.Module.to(self._unet, before)
            for weight, data in zip(weights, kept, strict=False):
                weight.data = data

    def _load(self, conditions: Conditions | None = None) -> Load:
        n_tokens = self._window_length if conditions is None else conditions.tensors[TEXT].shape[1]
        return Load("the U-Net", self.dtype, n_tokens)

    def _probe(self, n: int, n_tokens: int) -> None:
        """A call that measures memory and is not counted."""
        calls, rows = self.n_calls, self.n_rows
        text = torch.ones(n, n_tokens, int(self._unet.config.cross_attention_dim), device=self.device)
        conditions = {TEXT: text}
        if n_tokens > self._window_length:  # among longer texts, a shorter one has a mask
            conditions[MASK] = torch.arange(n_tokens).expand(n, -1) < self._window_length
        x = torch.zeros(n, *self.latent_shape, device=self.device)
        replays, self.graphs.enabled = self.graphs.enabled, False  # a graph takes other memory than a call
        try:
            self.call(x, torch.zeros(n), Conditions(conditions))
        finally:
            self.graphs.enabled = replays
            self.n_calls, self.n_rows = calls, rows


@contextmanager
def _full_convolutions() -> Iterator[None]:
    """Convolve in full float32: by default, recent GPUs round the inputs to TF32, with no more digits than float16."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """The module that `torch.compile` has wrapped, or the module itself; it has the parts' own names."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, torch.nn.Module) else module


def sampler_notes(scheduler: "DDIMScheduler") -> list[str]:
    """Sentences on what of a pipeline's scheduler is not kept, and what is used in its place."""
    name, config = type(scheduler).__name__, scheduler.config
    if name != "DDIMScheduler":
        spacing = config.get("timestep_spacing", "leading")
        return [
            f"its sampler, {name}, is not used: DDIM (deterministic) samples in its place, with the noise schedule and "
            f"the {spacing} spacing of timesteps that its configuration names."
        ]
    lost = [name for name in ("thresholding", "clip_sample") if config.get(name)]
    return [f"{name} of its DDIMScheduler is not used: latents are never clipped." for name in lost]


def _read_scheduler(scheduler: "DDIMScheduler") -> tuple[NoiseSchedule, bool]:
    """The trained noise schedule with the sampler's steps, and whether the U-Net predicts v."""
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None:
        raise ModelError(f"{type(scheduler).__name__} has no cumulative alphas; only DDPM-type models are supported.")
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(f"The U-Net predicts {prediction_type!r}; only 'epsilon' and 'v_prediction' are supported.")
    try:
        schedule = NoiseSchedule.from_scheduler(abar.double().cpu().numpy(), scheduler.config)
    except ValueError as error:
        raise ModelError(f"{type(scheduler).__name__}: {error}") from error
    from_noise = scheduler.config.get("rescale_betas_zero_snr") and schedule.spacing != "leading"
    if from_noise and prediction_type == "epsilon":
        raise ModelError(
            f"Sampling starts at pure noise (rescale_betas_zero_snr with {schedule.spacing} spacing), where a U-Net "
            f"that predicts the noise says nothing about the image. Such models predict v: if this one does, write "
            f'"prediction_type": "v_prediction" into scheduler/scheduler_config.json.'
        )
    return schedule, prediction_type == "v_prediction"
