"""What a word does to concepts, beside the same worked out by a change of the prompt during a whole run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.activations.hooks import ActivationKey, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.sae.autoencoder import SaeConfig, SaeId, SparseAutoencoder
from training.evaluate.interventions.arms import switched
from training.labels.effects import Pair, pairs_of, word_effects

MIDDLE, UP = SaeId("mid_block.attentions.0", "cond", "all"), SaeId("up_blocks.1.attentions.0", "cond", 0.5)
STEPS = {MIDDLE: [0, 2], UP: [2]}
PAIRS = [Pair("a blue cat on the grass", "a cat on the grass", 0), Pair("a blue ship", "a ship", 1)]
SEEDS = [3, 4]


class Listed:
    """Prompts from a list, again and again."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def prompt(self, number: int) -> str:
        return self._texts[number % len(self._texts)]


@pytest.fixture(scope="module")
def saes() -> dict[SaeId, SparseAutoencoder]:
    generator = torch.Generator().manual_seed(0)
    sizes = {MIDDLE: SaeConfig(32, 64, 8), UP: SaeConfig(16, 48, 5)}
    return {sae_id: SparseAutoencoder(cfg, generator=generator).requires_grad_(False) for sae_id, cfg in sizes.items()}


def mean_code(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    code = sae.encode(x)
    return torch.zeros(len(code.values), sae.cfg.d_sae).scatter_(1, code.indices, code.values).mean(0)


def seen(model: Diffuser, step: int, prompts: Sequence[str] | None) -> dict[str, Tensor]:
    """The updates at a step of the run without the word; from that step on, with other prompts."""
    contexts = [] if prompts is None else [switched(model, prompts, step)]
    with record(model, [MIDDLE.hookpoint, UP.hookpoint], branches=["cond"], steps=[step]) as updates:
        for _ in model.sample([pair.without for pair in PAIRS], seeds=SEEDS, last_step=step, contexts=contexts):
            pass
    found = {
        hookpoint: updates[ActivationKey(hookpoint, "cond", step)] for hookpoint in (MIDDLE.hookpoint, UP.hookpoint)
    }
    return {hookpoint: update.permute(0, 2, 3, 1).flatten(0, 2) for hookpoint, update in found.items()}


def test_the_effect_is_that_of_the_word_at_one_moment(model: Diffuser, saes: dict[SaeId, SparseAutoencoder]) -> None:
    found = word_effects(model, saes, STEPS, PAIRS, SEEDS)
    for sae_id, sae in saes.items():
        values, update = torch.zeros(sae.cfg.d_sae), torch.zeros(sae.cfg.d_in)
        for step in STEPS[sae_id]:
            with_word, without = seen(model, step, [pair.with_word for pair in PAIRS]), seen(model, step, None)
            x, y = with_word[sae_id.hookpoint], without[sae_id.hookpoint]
            values += (mean_code(sae, x) - mean_code(sae, y)) / len(STEPS[sae_id])
            update += (x.mean(0) - y.mean(0)) / len(STEPS[sae_id])
        decoded = values @ sae.W_dec
        expected = values * float(torch.linalg.lstsq(decoded[:, None], update[:, None]).solution)
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(found[sae_id].float(), expected, atol=1e-5, rtol=1e-3)


def test_the_effect_does_not_depend_on_how_many_pictures_fit_together(
    model_folder: Path, saes: dict[SaeId, SparseAutoencoder]
) -> None:
    model = load_model(model_folder, device="cpu")
    pairs, seeds = [*PAIRS, Pair("a blue sun", "a sun", 2)], [*SEEDS, 5]
    together = word_effects(model, saes, STEPS, pairs, seeds)
    plain, sizes = model._predict, []

    def predict(x: Tensor, *args: Any) -> Tensor:
        sizes.append(len(x))
        if len(x) > 2 and len(sizes) > 3:  # in the first run with hooks, after one without
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(x, *args)

    model._predict = predict  # type: ignore[method-assign]
    for sae_id, effect in word_effects(model, saes, STEPS, pairs, seeds).items():
        torch.testing.assert_close(effect, together[sae_id], rtol=1e-4, atol=1e-6)
    assert sizes[:4] == [6] * 4
    assert set(sizes[4:]) == {2}


def test_a_word_that_is_not_there_does_nothing(model: Diffuser, saes: dict[SaeId, SparseAutoencoder]) -> None:
    same = [Pair("a cat", "a cat", 0)]
    for effect in word_effects(model, saes, STEPS, same, [0]).values():
        assert float(effect.abs().max()) == 0


def test_pairs_are_the_first_prompts_with_the_word() -> None:
    prompts = Listed("a blue cat", "a bluebird", "Blue", "a ship, blue")
    assert pairs_of(prompts, "blue", 2, 100) == [Pair("a blue cat", "a cat", 0), Pair("a ship, blue", "a ship", 3)]
    assert pairs_of(prompts, "blue", 2, 2) == [Pair("a blue cat", "a cat", 0)]
    assert pairs_of(prompts, "red", 2, 100) == []
