"""Effects of style words: how much a word changes each latent at one step, everything else being equal.

An image of a style has that style from its first steps on, so its latents no longer show what the word contributes.
So an image is denoised without the word up to a step, and that step is computed twice, without and with the word: the
difference is the effect of the word alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import NamedTuple

import torch
from torch import Tensor

from core.activations.hooks import ActivationKey, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import SamplerState
from core.diffusion.text import delete_words, distinct_words
from core.sae.autoencoder import SaeId, SparseAutoencoder, output_hookpoints
from training.prompts.sources import Prompts


class Pair(NamedTuple):
    """A prompt with a word and without it."""

    with_word: str
    """The prompt."""
    without: str
    """The prompt without the word."""
    number: int
    """Number of the prompt."""


def pairs_of(prompts: Prompts, word: str, n: int, n_searched: int) -> list[Pair]:
    """The first n prompts with a word, or fewer, among the first `n_searched` prompts."""

    def found() -> Iterator[Pair]:
        for number in islice(count(), n_searched):
            prompt = prompts.prompt(number)
            if word in distinct_words(prompt) and (without := delete_words(prompt, [word])):
                yield Pair(prompt, without, number)

    return list(islice(found(), n))


@torch.no_grad()
def word_effects(
    model: Diffuser,
    saes: Mapping[SaeId, SparseAutoencoder],
    steps: Mapping[SaeId, Sequence[int]],
    pairs: Sequence[Pair],
    seeds: Sequence[int],
) -> dict[SaeId, Tensor]:
    """[d_sae] float64 by SAE: the effect of a word on each latent, averaged over positions, steps and images.

    Codes shrink their input. So the effects of an SAE are scaled by one factor, the least-squares fit of their decoding
    to the change of the update itself.

    Args:
        model: The model; its default number of steps and guidance scale are used.
        saes: SAEs of branch cond, on the model's device; the other branch has no words.
        steps: The sampler steps at which each SAE is read.
        pairs: Prompts with and without the word.
        seeds: Seed of the noise for each pair.
    """

    def changes(some: slice) -> tuple[float, dict[SaeId, "_Means"]]:
        return len(pairs[some]) / len(pairs), _changes(model, saes, steps, pairs[some], seeds[some])

    total = {sae_id: _Means.none(sae) for sae_id, sae in saes.items()}
    for share, means in model.in_parts(len(pairs), changes):
        total = {sae_id: before.plus(means[sae_id].times(share)) for sae_id, before in total.items()}
    return {sae_id: total[sae_id].scaled(sae) / len(steps[sae_id]) for sae_id, sae in saes.items()}


def _changes(
    model: Diffuser,
    saes: Mapping[SaeId, SparseAutoencoder],
    steps: Mapping[SaeId, Sequence[int]],
    pairs: Sequence[Pair],
    seeds: Sequence[int],
) -> dict[SaeId, "_Means"]:
    """Changes that the word causes: means over positions and images, summed over the steps of each SAE."""
    wanted = sorted({step for own in steps.values() for step in own})
    plain = [pair.without for pair in pairs]
    states = list(model.sample(plain, seeds=seeds, last_step=wanted[-1]))
    changes = {sae_id: _Means.none(sae) for sae_id, sae in saes.items()}
    for step in wanted:
        after = states[step - 1] if step else None
        reading = {sae_id: sae for sae_id, sae in saes.items() if step in steps[sae_id]}
        with_word, without = (
            _means(model, reading, prompts, seeds, step, after)
            for prompts in ([pair.with_word for pair in pairs], plain)
        )
        for sae_id in reading:
            changes[sae_id] = changes[sae_id].plus(with_word[sae_id].less(without[sae_id]))
    return changes


class _Means(NamedTuple):
    """Means over positions and images, float64."""

    values: Tensor
    """[d_sae] mean value of each latent."""
    update: Tensor
    """[d_in] mean update."""

    @classmethod
    def none(cls, sae: SparseAutoencoder) -> "_Means":
        return cls(torch.zeros(sae.cfg.d_sae, dtype=torch.float64), torch.zeros(sae.cfg.d_in, dtype=torch.float64))

    def plus(self, other: "_Means") -> "_Means":
        return _Means(self.values + other.values, self.update + other.update)

    def less(self, other: "_Means") -> "_Means":
        return _Means(self.values - other.values, self.update - other.update)

    def times(self, factor: float) -> "_Means":
        return _Means(factor * self.values, factor * self.update)

    def scaled(self, sae: SparseAutoencoder) -> Tensor:
        """The values times the least-squares factor; 0 if they point away from the update."""
        decoded = self.values @ sae.W_dec.double().cpu()
        factor = (decoded @ self.update) / decoded.square().sum().clamp_min(1e-30)
        return self.values * factor.clamp_min(0)


def _means(
    model: Diffuser,
    saes: Mapping[SaeId, SparseAutoencoder],
    prompts: Sequence[str],
    seeds: Sequence[int],
    step: int,
    after: SamplerState | None,
) -> dict[SaeId, _Means]:
    """Mean codes and updates of some images at one step."""
    means: dict[SaeId, _Means] = {}

    def encode(key: ActivationKey, update: Tensor) -> None:
        for sae_id, sae in saes.items():
            if (sae_id.hookpoint, sae_id.branch) == (key.hookpoint, key.branch):
                x = update.float().flatten(2).transpose(1, 2).flatten(0, 1).to(sae.b_dec.device)
                code = sae.encode(x)
                total = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=x.device)
                # Empty entries have the index -1 and the value 0: added anywhere they change nothing.
                total.index_add_(0, code.indices.clamp_min(0).flatten(), code.values.double().flatten())
                means[sae_id] = _Means(total.cpu() / len(x), x.double().mean(0).cpu())

    hookpoints, outputs = {sae_id.hookpoint for sae_id in saes}, output_hookpoints(saes)
    with record(model, hookpoints, branches=["cond"], steps=[step], sink=encode, outputs=outputs):
        for _ in model.sample(list(prompts), seeds=list(seeds), last_step=step, after=after):
            pass
    return means
