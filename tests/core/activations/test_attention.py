import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from core.activations.attention import attention_map, record_attention, word_maps
from core.activations.hooks import ActivationKey, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import SamplerState
from core.errors import ModelError, PromptTooLongError
from tests.conftest import MAX_LENGTH

PROMPTS = ["a cat on the grass", "a ship in the sea", "a dog"]
DOWN, MIDDLE, UP = "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0"


@pytest.fixture(autouse=True)
def left_as_found(model: Diffuser) -> Iterator[None]:
    """Whatever a test does, the model is free, unhooked, and has its own processors after it."""
    before = model.unet.attn_processors
    yield
    assert not model._lock.is_held
    assert model.step_context is None
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.unet.modules()) == 0
    after = model.unet.attn_processors
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def sample(model: Diffuser, n: int = 2, steps: int = 2, **settings: Any) -> SamplerState:
    *_, last = model.sample(PROMPTS[:n], seeds=list(range(n)), num_inference_steps=steps, **settings)
    return last


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_maps_add_up_to_one_and_the_output_stays_the_same(model: Diffuser, processor: Any) -> None:
    own = model.unet.attn_processors
    model.unet.set_attn_processor({name: processor() for name in own})
    try:
        plain = sample(model)
        with record_attention(model) as maps:
            watched = sample(model)
    finally:
        model.unet.set_attn_processor(dict(own))
    assert torch.equal(plain.x, watched.x)
    assert set(maps) == {(name, branch, step) for name in model.hookpoints for branch in ("cond", "uncond")
                         for step in (0, 1)}  # fmt: skip
    for key, value in maps.items():
        side = 8 if key.hookpoint == MIDDLE else 16
        assert value.shape == (2, MAX_LENGTH, side, side)
        torch.testing.assert_close(value.sum(1), torch.ones(2, side, side))
    cond = maps[ActivationKey(UP, "cond", 0)]
    assert float(cond.std((2, 3)).max()) > 1e-4  # neither even
    assert not torch.allclose(cond[:, 1], cond[:, 2])  # nor equal for all words
    assert not torch.allclose(cond[0], cond[1])


def test_a_map_is_the_softmax_of_queries_and_keys_by_hand(model: Diffuser) -> None:
    attention = model.unet.get_submodule(MIDDLE).transformer_blocks[0].attn2
    met: list[tuple[Tensor, Tensor]] = []
    handle = attention.register_forward_hook(
        lambda _, args, kwargs, __: met.append((args[0], kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    try:
        with record_attention(model, [MIDDLE], steps=[0]) as maps:
            sample(model, steps=1)
    finally:
        handle.remove()
    ((hidden, text),) = met
    heads = attention.heads
    assert heads > 1
    by_hand = torch.zeros(4, 64, MAX_LENGTH)
    queries, keys = hidden @ attention.to_q.weight.T, text @ attention.to_k.weight.T
    width = queries.shape[2] // heads
    for head in range(heads):
        columns = slice(head * width, (head + 1) * width)
        for row in range(4):
            products = queries[row, :, columns] @ keys[row, :, columns].T / math.sqrt(width)
            by_hand[row] += products.softmax(1) / heads
    by_hand = by_hand.transpose(1, 2).reshape(4, MAX_LENGTH, 8, 8)  # diffusers puts the empty text first
    torch.testing.assert_close(maps[ActivationKey(MIDDLE, "uncond", 0)], by_hand[:2])
    torch.testing.assert_close(maps[ActivationKey(MIDDLE, "cond", 0)], by_hand[2:])


def test_step_branch_and_shape_come_from_the_sampler(model: Diffuser) -> None:
    seen: list[ActivationKey] = []
    with record_attention(model, [UP], branches=["cond"], steps=[1], sink=lambda key, _: seen.append(key)) as maps:
        sample(model, n=1)
        sample(model, n=3, steps=3)
    assert seen == [(UP, "cond", 1)] * 2
    assert not maps
    with (
        patch("core.activations.attention.attention_map", side_effect=attention_map) as computed,
        record_attention(model, steps=[1]),
    ):
        sample(model, steps=3)
    assert computed.call_count == 3  # one a hookpoint: no map that is not wanted
    x = torch.randn(2, 8, 8, 24, generator=torch.Generator().manual_seed(0))  # nor need it be square
    with record_attention(model) as maps:
        model.predict_noise(x, torch.zeros(2), model.encode_text(PROMPTS[:2]))
    assert maps[ActivationKey(DOWN, "cond", None)].shape == (2, MAX_LENGTH, 8, 24)
    assert maps[ActivationKey(MIDDLE, "cond", None)].shape == (2, MAX_LENGTH, 4, 12)


def test_a_fault_leaves_nothing_behind_and_stopping_loses_no_map(model: Diffuser) -> None:
    def break_off() -> None:
        with record_attention(model):
            for _ in model.sample(PROMPTS[:1], seeds=[0], num_inference_steps=2):
                raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        break_off()

    def fail(key: ActivationKey, _: Tensor) -> None:
        raise RuntimeError(f"no room for {key.hookpoint}")

    with pytest.raises(RuntimeError, match="no room for mid"), record_attention(model, [MIDDLE], sink=fail):
        sample(model)
    before = model.n_unet_calls
    with record_attention(model, [UP]) as maps, record(model, [MIDDLE, UP], steps=[0], stop=True) as updates:
        sample(model)
    assert model.n_unet_calls == before + 1
    assert set(maps) == {key for key in updates if key.hookpoint == UP}
    with record_attention(model, [DOWN], steps=[0], stop=True) as maps:
        sample(model)
    assert len(maps) == 2


def test_several_recordings_at_once(model: Diffuser) -> None:
    with record_attention(model, [MIDDLE]) as first, record_attention(model, [MIDDLE, UP]) as second:
        sample(model, steps=1)
    assert torch.equal(first[ActivationKey(MIDDLE, "cond", 0)], second[ActivationKey(MIDDLE, "cond", 0)])


def test_the_layers_of_a_block_are_averaged(model: Diffuser) -> None:
    block = model.unet.get_submodule(MIDDLE)
    of_layers: list[Tensor] = []

    def spy(*args: Any) -> Tensor:
        of_layers.append(attention_map(*args))
        return of_layers[-1]

    block.transformer_blocks.append(block.transformer_blocks[0])
    try:
        with patch("core.activations.attention.attention_map", spy), record_attention(model, [MIDDLE]) as maps:
            sample(model, steps=1)
    finally:
        del block.transformer_blocks[1]
    # The second of two contexts on one layer wraps the first, so that a shared layer would be seen four times.
    assert len(of_layers) in (2, 4)
    first, second = of_layers[0], of_layers[-1]
    assert not torch.allclose(first, second)
    mean = ((first + second) / 2).transpose(1, 2).reshape(4, MAX_LENGTH, 8, 8)
    torch.testing.assert_close(maps[ActivationKey(MIDDLE, "cond", 0)], mean[2:])


def test_words_of_several_tokens_are_summed_and_all_occurrences_count(model: Diffuser) -> None:
    maps = torch.arange(MAX_LENGTH, dtype=torch.float32)[:, None, None].expand(-1, 2, 3).contiguous()
    # start a(1) cat(2) ,(3) a(4) moon-cat(5 6 7: the tokenizer has no hyphen of its own) and Cat
    tokens = model.vocabulary._tokenizer.tokenize("moon-cat")
    words, of_words = word_maps(model, "a cat, a moon-cat  and Cat", maps)
    assert words == ("a", "cat", "moon-cat", "and")
    n = len(tokens)
    assert n > 1
    inside = sum(range(5, 5 + n))
    expected = [1 + 4, 2 + (5 + n + 1), inside, 5 + n]
    assert of_words[:, 0, 0].tolist() == expected
    assert of_words.shape == (4, 2, 3)
    batch = word_maps(model, "a cat, a moon-cat  and Cat", torch.stack([maps, 2 * maps])).maps
    torch.testing.assert_close(batch[1], 2 * of_words)


def test_what_cannot_be_mapped_is_refused(model: Diffuser) -> None:
    maps = torch.zeros(MAX_LENGTH, 2, 2)
    with pytest.raises(PromptTooLongError):
        word_maps(model, "a cat " * 20, maps)
    with pytest.raises(ValueError, match=rf"\[\.\.\., {MAX_LENGTH}, h, w\]"):
        word_maps(model, "a cat", maps[:5])
    with pytest.raises(ModelError, match="no cross-attention block"):
        record_attention(model, ["mid_block"])
    with pytest.raises(ValueError, match="A branch is one of"):
        record_attention(model, branches=["both"])  # type: ignore[list-item]
