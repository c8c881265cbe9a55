"""Maps of words on an image: information, and cross-attention along the sampler or under any noise schedule."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

import core
from core.activations.attention import record_attention, word_maps
from core.activations.hooks import ActivationKey
from core.diffusion.diffuser import Diffuser
from core.diffusion.hookpoints import cross_attention_blocks
from core.diffusion.sampling import Generation
from core.information.counterfactual import Inversion, redraw
from core.information.estimator import noisy
from core.information.quadrature import Sampler, draw
from training.evaluate.common.scenes import NO_TARGET


def information(model: Diffuser, x: Tensor, prompt: str, words: Sequence[str], sampler: Sampler, seed: int) -> Tensor:
    """[W, h, w] bits of each word given the rest of the prompt, of latents x [1, C, h, w]."""
    found = core.attribute(model, x, prompt, words=words, rel_error=NO_TARGET, sampler=sampler, seed=seed)
    order = [found.words.index(word) for word in words]
    return torch.from_numpy(found.maps[order]).float()


def attention_along_sampler(model: Diffuser, x: Tensor, prompt: str, words: Sequence[str], n_steps: int) -> Tensor:
    """[W, h, w] attention while a given image is regenerated from its inverted noise (DAAM for real images)."""
    inversion = core.invert(model, x, prompt, num_inference_steps=n_steps, n_fixed_point_iterations=1)
    return attended_redraw(model, inversion, words, [])[0]


def attended_redraw(
    model: Diffuser, inversion: Inversion, words: Sequence[str], others: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """[W, h, w] attention while an image is regenerated from its inverted noise, and the latents [1 + N, C, h, w] of it
    and of N images from the same noise under other prompts."""
    with _summed_attention(model, rows=slice(1)) as total:
        latents = redraw(model, inversion, [inversion.prompt, *others])
    return total.of_words(model, inversion.prompt, words), latents


def attended_drawing(
    model: Diffuser, prompt: str, words: Sequence[str], seed: int, n_steps: int
) -> tuple[Generation, Tensor]:
    """An image of a prompt, and the conditional branch's attention [W, h, w] while it was sampled (DAAM)."""
    with _summed_attention(model) as total:
        drawn = model.generate(prompt, seed=seed, num_inference_steps=n_steps, previews=False)
    return drawn, total.of_words(model, prompt, words)


def attention_at(
    model: Diffuser, x: Tensor, prompt: str, words: Sequence[str], sampler: Sampler, seed: int, batch_size: int
) -> Tensor:
    """[W, h, w] attention summed over fresh noise at the log-SNRs of one draw of a sampler."""
    samples = draw(sampler, sampler.density(model.schedule.log_snr_range), model.latent_shape, (seed, 0))
    x_a = noisy(x[0], samples.log_snr, samples.noise)
    with _summed_attention(model) as total:
        for at in range(0, len(x_a), batch_size):
            part = slice(at, at + batch_size)
            conditions = model.encode_text([prompt] * len(x_a[part]))
            model.predict_noise(x_a[part], samples.log_snr[part], conditions)
    return total.of_words(model, prompt, words)


@contextmanager
def _summed_attention(model: Diffuser, rows: slice = slice(None)) -> "Iterator[_AttentionSum]":
    """Sum the conditional branch's attention in all blocks inside the `with`, over some rows of each batch."""
    total = _AttentionSum(rows)
    with record_attention(model, cross_attention_blocks(model.unet), branches=["cond"], sink=total):
        yield total


class _AttentionSum:
    """A sink that sums attention maps block by block."""

    def __init__(self, rows: slice) -> None:
        self._rows = rows
        self._sums: dict[str, Tensor] = {}

    def __call__(self, key: ActivationKey, maps: Tensor) -> None:
        before = self._sums.get(key.hookpoint, torch.zeros(()))
        self._sums[key.hookpoint] = before + maps[self._rows].sum(0).cpu()

    def of_words(self, model: Diffuser, prompt: str, words: Sequence[str]) -> Tensor:
        """[W, h, w] sum over blocks for each word, on the latents' grid."""
        total = torch.zeros(len(words), *model.latent_shape[1:])
        for maps in self._sums.values():
            found = word_maps(model, prompt, maps)
            total += enlarged(found.maps[[found.words.index(word) for word in words]], model.latent_shape[1:])
        return total


def enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [W, h, w] resized bilinearly."""
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def normalised(maps: Tensor) -> Tensor:
    """Each of the maps [W, h, w] scaled to the range 0 to 1; a constant map becomes 1."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 1.0)
