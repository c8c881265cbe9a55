"""Batches of residual updates from images that are sampled for them; nothing is written to disk.

Buffer r holds the activations of images r * G ... r * G + G - 1; image n is prompt n, denoised from the noise of (seed,
n). For every SAE, each image gives P cells, drawn without replacement from (step, position) by (seed, n, SAE) and in
random order; a cell's update [d_in] is one sample. The B batches of a buffer take P / B cells in turn from every image,
so each batch holds all images of its buffer equally: a shuffle that leaves nothing to chance between images.

Batch b therefore depends on the seed and b alone. Resuming at b makes one buffer again. Of W processes, rank w samples
images w, w + W, ... of each buffer and holds their samples: all have equally many batches, and together those of one
process. The set of SAEs trained together changes nothing; which images are denoised together changes only the rounding.
"""

import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.activations.hooks import ActivationKey, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import is_guided
from core.diffusion.schedule import step_at
from core.sae.autoencoder import SaeId
from training.prompts.sources import Prompts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamConfig:
    """How images become batches."""

    batch_size: int = 4096
    """Samples of each SAE in a batch, over all processes."""
    images_per_buffer: int = 256
    """Images in a buffer, over all processes; divides the batch size."""
    batches_per_buffer: int = 4
    """Batches made of one buffer: each image gives each SAE this times batch_size / images_per_buffer samples."""
    sampler_batch_size: int = 8
    """Most images that a process denoises together; fewer where memory is short."""
    num_inference_steps: int | None = None
    """Steps of the sampler; None: the model's own."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; None: the model's own."""
    shared_steps: tuple[int, ...] = ()
    """Sampler steps that SAEs shared by all times are trained on, equally often; empty: every step."""
    seed: int = 0
    """Seed of the noise and of the choice of cells."""
    max_buffer_gib: float = 8.0
    """Most memory of a buffer in one process, in GiB; a larger one is an error."""


class StreamBatch(NamedTuple):
    """Samples for every SAE at once."""

    number: int
    """Number of the batch, from 0."""
    samples: dict[SaeId, Tensor]
    """[n, d_in] float32 each, on the model's device; n is the same for all."""
    prompts: tuple[str, ...]
    """Prompts of this process's images, the same for all SAEs."""

    def prompt_of(self, row: int) -> str:
        """The prompt of the image that gave row `row` of any SAE's samples."""
        return self.prompts[row % len(self.prompts)]


class ActivationStream:
    """Batches of residual updates for many SAEs from one pass of the sampler.

    Holds `buffer_bytes` between batches, plus one batch in float32 at a time.
    """

    buffer_bytes: int
    """Size of a buffer in this process: cells x images x d_in in the model's precision, summed over the SAEs."""

    def __init__(
        self,
        model: Diffuser,
        prompts: Prompts,
        sae_ids: Sequence[SaeId],
        config: StreamConfig,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Check the settings, with one U-Net call to find the hookpoints' shapes.

        Raises:
            ModelError: A hookpoint that the model does not have.
            ValueError: Settings that do not fit each other; the message says which.
        """
        self._model, self._prompts, self._config = model, prompts, config
        self._rank, self._world = rank, world
        self.sae_ids = tuple(sae_ids)
        n_steps = model.spec.num_inference_steps if config.num_inference_steps is None else config.num_inference_steps
        _check(self.sae_ids, config, rank, world)
        if any(sae_id.branch == "uncond" for sae_id in self.sae_ids) and not is_guided(self._guidance_scale):
            raise ValueError(
                "A guidance_scale of 1 or less runs no uncond branch; leave its SAEs out or choose another scale."
            )
        self._steps = {sae_id: _steps(sae_id, config, n_steps) for sae_id in self.sae_ids}
        self._n_steps = n_steps
        self._shapes = self._measure()
        self._per_batch = config.batch_size // config.images_per_buffer
        self._per_image = self._per_batch * config.batches_per_buffer
        for sae_id, steps in self._steps.items():
            _, height, width = self._shapes[sae_id.hookpoint]
            if self._per_image > len(steps) * height * width:
                raise ValueError(
                    f"{sae_id.path} has {len(steps) * height * width} cells an image; batches of {config.batch_size} "
                    f"x {config.batches_per_buffer} want {self._per_image} of each of {config.images_per_buffer} "
                    f"images. Raise images_per_buffer, or lower batches_per_buffer."
                )
        n_values = (
            self._per_image * (config.images_per_buffer // world) * sum(self.d_in(i.hookpoint) for i in self.sae_ids)
        )
        self.buffer_bytes = n_values * model.dtype.itemsize
        if self.buffer_bytes > config.max_buffer_gib * 2**30:
            raise ValueError(
                f"A buffer would hold {self.buffer_bytes / 2**30:.1f} GiB, more than max_buffer_gib "
                f"{config.max_buffer_gib}. Lower batches_per_buffer."
            )

    def d_in(self, hookpoint: str) -> int:
        """Channels of a hookpoint's update."""
        return self._shapes[hookpoint][0]

    def batches(self, start: int = 0) -> Iterator[StreamBatch]:
        """Batches without end, from number `start` on. The model is held only while a buffer is filled."""
        per_buffer = self._config.batches_per_buffer
        number = start
        while True:
            buffer, prompts = self._fill_buffer(number // per_buffer)
            for at in range(number % per_buffer, per_buffer):
                rows = slice(at * self._per_batch, (at + 1) * self._per_batch)
                # Copies: a view in the consumer's hands would keep this buffer alive while the next one is filled.
                samples = {i: cells[rows].flatten(0, 1).to(torch.float32, copy=True) for i, cells in buffer.items()}
                yield StreamBatch(number, samples, prompts)
                number += 1
            del buffer, samples

    @property
    def _guidance_scale(self) -> float:
        scale = self._config.guidance_scale
        return self._model.spec.guidance_scale if scale is None else scale

    def _measure(self) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of every hookpoint's update."""
        model = self._model
        with model.busy(), record(model, {sae_id.hookpoint for sae_id in self.sae_ids}, stop=True) as recording:
            model.predict_noise(torch.zeros(1, *model.latent_shape), torch.zeros(1), model.encode_text([""]))
        return {key.hookpoint: (x.shape[1], x.shape[2], x.shape[3]) for key, x in recording.items()}

    def _fill_buffer(self, number: int) -> tuple[dict[SaeId, Tensor], tuple[str, ...]]:
        """The cells [cells an image, images, d_in] of each SAE, and the images' prompts."""
        config = self._config
        images = range(
            number * config.images_per_buffer + self._rank, (number + 1) * config.images_per_buffer, self._world
        )
        prompts = tuple(self._prompts.prompt(image) for image in images)
        buffer = {
            sae_id: torch.empty(
                (self._per_image, len(images), self.d_in(sae_id.hookpoint)),
                dtype=self._model.dtype,
                device=self._model.device,
            )
            for sae_id in self.sae_ids
        }

        def denoise(some: slice) -> None:
            # A run that runs out of memory starts again and overwrites its cells.
            self._denoise(images[some], prompts[some], {i: cells[:, some] for i, cells in buffer.items()})

        self._model.in_parts(
            len(images), denoise, max_size=config.sampler_batch_size, guidance_scale=self._guidance_scale
        )
        log.debug("buffer %d: %d images", number, len(images))
        return buffer, prompts

    def _denoise(self, images: Sequence[int], prompts: Sequence[str], out: dict[SaeId, Tensor]) -> None:
        """Denoise some images as far as needed, and write their cells into `out`, [cells, images, d_in] each."""
        wanted = sorted(set().union(*self._steps.values()))
        chosen = {sae_id: self._choose_cells(sae_id, images) for sae_id in self.sae_ids}

        def keep(key: ActivationKey, update: Tensor) -> None:
            height, width = update.shape[2:]
            for sae_id, cells in chosen.items():
                steps = self._steps[sae_id]
                if sae_id[:2] != key[:2] or key.step not in steps:
                    continue
                here = cells // (height * width) == steps.index(key.step)
                cell, image = here.nonzero(as_tuple=True)
                position = cells[here] % (height * width)
                cell, image, position = (index.to(update.device) for index in (cell, image, position))
                out[sae_id][cell, image] = update[image, :, position // width, position % width]

        run = self._model.sample(
            prompts,
            seeds=[_seed(self._config.seed, image) for image in images],
            num_inference_steps=self._n_steps,
            guidance_scale=self._guidance_scale,
            last_step=wanted[-1],
        )
        hookpoints = {sae_id.hookpoint for sae_id in self.sae_ids}
        branches = {sae_id.branch for sae_id in self.sae_ids}
        with record(self._model, hookpoints, branches=branches, steps=wanted, sink=keep, stop=True):
            for _ in run:
                pass

    def _choose_cells(self, sae_id: SaeId, images: Sequence[int]) -> Tensor:
        """Distinct cells [cells an image, images], each (index of the step) * H * W + position, in random order."""
        _, height, width = self._shapes[sae_id.hookpoint]
        n = len(self._steps[sae_id]) * height * width
        name = zlib.crc32(sae_id.path.encode())
        drawn = [
            np.random.default_rng([self._config.seed, image, name]).choice(n, self._per_image, replace=False)
            for image in images
        ]
        return torch.from_numpy(np.stack(drawn, axis=1))


def _check(sae_ids: tuple[SaeId, ...], config: StreamConfig, rank: int, world: int) -> None:
    """Check what does not depend on the model."""
    if not sae_ids or len(set(sae_ids)) < len(sae_ids):
        raise ValueError(
            f"One or more SAEs are needed, each once; given: {', '.join(i.path for i in sae_ids) or 'none'}."
        )
    sizes = (config.batch_size, config.images_per_buffer, config.batches_per_buffer, config.sampler_batch_size)
    if min(sizes) < 1 or config.batch_size % config.images_per_buffer:
        raise ValueError(
            f"batch_size {config.batch_size} must be a multiple of images_per_buffer {config.images_per_buffer}, and "
            f"both, batches_per_buffer and sampler_batch_size at least 1."
        )
    if not 0 <= rank < world or config.images_per_buffer % world:
        raise ValueError(f"{world} processes cannot share {config.images_per_buffer} images a buffer evenly.")


def _steps(sae_id: SaeId, config: StreamConfig, n_steps: int) -> tuple[int, ...]:
    """The sampler steps that an SAE is trained on."""
    if sae_id.t != "all":
        return (step_at(sae_id.t, n_steps),)
    steps = tuple(sorted(set(config.shared_steps))) or tuple(range(n_steps))
    if steps[0] < 0 or steps[-1] >= n_steps:
        raise ValueError(f"shared_steps must lie between 0 and {n_steps - 1}; {steps} were given.")
    return steps


def _seed(seed: int, image: int) -> int:
    """Seed of an image's noise; streams with different seeds share none."""
    return int(np.random.SeedSequence([seed, image]).generate_state(1, np.uint64)[0])
