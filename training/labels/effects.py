"""What a word does to concepts: how much it raises each at one and the same moment of a picture.

A picture of a style has had that style from its first steps on, and its concepts no longer show what the word asks for.
So a picture is drawn without the word up to a step, and that step is computed twice, without the word and with it: what
differs between the two is the word's doing alone.
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
from core.sae.autoencoder import SaeId, SparseAutoencoder
from training.prompts.sources import Prompts


class Pair(NamedTuple):
    """A prompt with a word and without it."""

    with_word: str
    without: str
    number: int
    """Of the prompt."""


def pairs_of(prompts: Prompts, word: str, n: int, n_searched: int) -> list[Pair]:
    """The first n prompts that have a word, among so many; possibly fewer, or none."""

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
    """[d_sae] float64 by SAE: what the word of the pairs does to each latent, mean over positions, steps and pictures.

    Codes shrink what they stand for. So the changes of an SAE's latents are scaled by the one factor with which they
    come, decoded, nearest to the change of the update itself.

    Args:
        model: The model; its own number of steps and guidance.
        saes: SAEs of the half with the prompt, on the model's device; the other half reads no word.
        steps: The sampler steps at which each reads.
        pairs: Prompts with the word and without.
        seeds: Seed of each one's noise.
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
    """What the word changes, mean over positions and pictures, summed over an SAE's steps."""
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
    """Over positions and pictures, float64."""

    values: Tensor
    """[d_sae] of each latent."""
    update: Tensor
    """[d_in] of the update."""

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
        """The values, by the factor of least squares; none if they point away from the update."""
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
    """What some SAEs see in one step of some pictures."""
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

    with record(model, {sae_id.hookpoint for sae_id in saes}, branches=["cond"], steps=[step], sink=encode):
        for _ in model.sample(list(prompts), seeds=list(seeds), last_step=step, after=after):
            pass
    return means
