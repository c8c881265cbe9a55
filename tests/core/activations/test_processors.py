"""Attention maps are recorded whatever computes the attention, and hooks act in a compiled U-Net."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    CustomDiffusionAttnProcessor,
    IPAdapterAttnProcessor,
    SlicedAttnProcessor,
)
from torch import Tensor

import core
from core.activations.attention import attention_map, record_attention
from core.activations.hooks import ActivationKey, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.diffusion.text_encoder import TEXT
from tests.conftest import make_pipeline

PROMPT = "a cat on the grass"
MIDDLE = "mid_block.attentions.0"


class Own(torch.nn.Module):
    """A processor as a module, without a time embedding."""

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Tensor:
        found: Tensor = AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)
        return found


class Efficient:
    """A processor of another library: no module, and with a setting of its own."""

    def __init__(self, attention_op: Any = None) -> None:
        self.attention_op = attention_op

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any, **others: Any) -> Tensor:
        found: Tensor = AttnProcessor()(attn, hidden_states, encoder_hidden_states, others["attention_mask"])
        return found


@pytest.fixture
def untouched(model: Diffuser) -> Iterator[Diffuser]:
    own = dict(model.unet.attn_processors)
    yield model
    model.unet.set_attn_processor(own)


def maps_of(model: Diffuser) -> Tensor:
    with record_attention(model, MIDDLE, branches="cond", steps=0) as maps:
        model.generate(PROMPT, num_inference_steps=1, previews=False)
    return maps[ActivationKey(MIDDLE, "cond", 0)]


@pytest.mark.parametrize("change", [AttnProcessor, Own, Efficient, lambda: SlicedAttnProcessor(1)])
def test_maps_are_the_same_beside_any_processor(untouched: Diffuser, change: Callable[[], Any]) -> None:
    plain = maps_of(untouched)
    untouched.unet.set_attn_processor(change())
    set_before = dict(untouched.unet.attn_processors)
    torch.testing.assert_close(maps_of(untouched), plain)
    after = untouched.unet.attn_processors
    assert all(after[name] is before for name, before in set_before.items())


def test_the_text_alone_is_mapped_beside_an_adapters_images(untouched: Diffuser) -> None:
    block = untouched.unet.get_submodule(MIDDLE)
    layer = block.transformer_blocks[0].attn2
    width, read = layer.to_q.out_features, layer.to_k.in_features
    layer.set_processor(IPAdapterAttnProcessor(width, read, num_tokens=(4,)))
    g = torch.Generator().manual_seed(0)
    x, images = torch.randn(1, width, 8, 8, generator=g), torch.randn(1, 1, 4, read, generator=g)
    text = untouched.encode_text(PROMPT).tensors[TEXT]
    try:
        with torch.no_grad(), record_attention(untouched, MIDDLE) as maps:
            block(x, encoder_hidden_states=(text, [images]), return_dict=False)
            beside = maps[ActivationKey(MIDDLE, "cond", None)].clone()
            layer.set_processor(AttnProcessor())
            block(x, encoder_hidden_states=text, return_dict=False)
    finally:
        layer.set_processor(AttnProcessor())
    assert beside.shape == (1, text.shape[1], 8, 8)
    torch.testing.assert_close(beside, maps[ActivationKey(MIDDLE, "cond", None)])


def test_custom_diffusion_has_matrices_of_its_own(untouched: Diffuser) -> None:
    layer = untouched.unet.get_submodule(MIDDLE).transformer_blocks[0].attn2
    plain = maps_of(untouched)
    processor = CustomDiffusionAttnProcessor(
        train_q_out=False, hidden_size=layer.to_q.out_features, cross_attention_dim=layer.to_k.in_features
    )
    processor.to_k_custom_diffusion.weight.data = layer.to_k.weight.data.clone()
    layer.set_processor(processor)
    torch.testing.assert_close(maps_of(untouched), plain)
    processor.to_k_custom_diffusion.weight.data *= 3
    assert not torch.allclose(maps_of(untouched), plain, atol=1e-4)
    hidden, text = torch.randn(1, 4, layer.to_q.in_features), torch.randn(1, 3, layer.to_k.in_features)
    assert attention_map(layer, hidden, text).shape == (1, 4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in place", "wrapped", "blocks"])
def test_hooks_act_in_a_compiled_unet_and_leave_with_their_context(model_folder: Path, way: str) -> None:
    plain = load_model(model_folder, device="cpu")
    pipeline = make_pipeline()
    if way == "wrapped":
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    elif way == "in place":
        pipeline.unet.compile(backend="eager")
    else:
        for block in pipeline.unet.down_blocks:
            block.compile(backend="eager")
    compiled = Diffuser(pipeline, core.ModelSpec("compiled", "nowhere"))
    assert compiled.hookpoints == plain.hookpoints
    results = []
    for model in (plain, compiled):
        first = model.generate(PROMPT, num_inference_steps=1, previews=False).latents  # compiled without hooks
        with record(model) as updates:
            model.generate(PROMPT, num_inference_steps=1, previews=False)
        maps, n_updates = maps_of(model), len(updates)
        again = model.generate(PROMPT, num_inference_steps=1, previews=False).latents
        assert len(updates) == n_updates == 2 * len(model.hookpoints)
        assert torch.equal(first, again)
        results.append((first, maps, updates[MIDDLE, "cond", 0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
