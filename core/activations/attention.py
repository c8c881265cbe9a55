"""Cross-attention maps: how much each position of a block attends to each token of the prompt.

A context manager round a `Diffuser`, as `core.activations.hooks.record` is for residual updates, told the step and the
branches by the sampler in the same way. The attention processors of diffusers are wrapped, not replaced: each still
computes the layer's output, whichever processor it is, and the output stays the same to the bit. The maps are computed
beside it from the layer's own queries and keys.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from core.activations.hooks import BRANCHES, ActivationKey, Recording, Sink
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import Branch
from core.diffusion.text import distinct_words, split_words


class WordMaps(NamedTuple):
    """Attention to the words of one prompt."""

    words: tuple[str, ...]
    """The W different words of the prompt, lower case, in the order of their first occurrence."""
    maps: Tensor
    """[..., W, h, w] share of each position's attention that a word gets, all its tokens and occurrences together. The
    marks of start and end get most of the rest."""


def record_attention(
    model: Diffuser,
    hookpoints: Iterable[str] | None = None,
    *,
    branches: Iterable[Branch] = BRANCHES,
    steps: Iterable[int] | None = None,
    sink: Sink | None = None,
    stop: bool = False,
) -> "AttentionRecording":
    """Keep the cross-attention maps of all that the model computes inside the `with`, by `Key`: [B, tokens, h, w].

    A map is the mean over the heads of the block's cross-attention, and over its layers where it has several; at each
    position it sums to 1 over the tokens, start, end and padding included. The arguments and errors are those of
    `core.activations.hooks.record`. Entered before a `record` that stops, it sees the block at which that one stops.
    """
    return AttentionRecording(model, hookpoints, branches, steps, sink, stop)


def word_maps(model: Diffuser, prompt: str, maps: Tensor) -> WordMaps:
    """Maps of the words of a prompt from those of its tokens, [..., tokens, h, w].

    Raises:
        PromptTooLongError: The prompt has more tokens than the model reads at once.
        ValueError: The maps are not of as many tokens as the model's prompts have.
    """
    model.vocabulary.check_length(prompt)
    spans = model.vocabulary.token_spans(prompt)
    # Beside a longer prompt, one in the same batch has more rows than its own.
    if maps.ndim < 3 or maps.shape[-3] < len(spans) or maps.shape[-3] % (model.vocabulary.window + 2):
        raise ValueError(f"Maps [..., {len(spans)}, h, w] of this prompt's tokens are needed, not {list(maps.shape)}.")
    words = distinct_words(prompt)
    belongs = torch.zeros(len(words), maps.shape[-3], dtype=maps.dtype, device=maps.device)
    for word in split_words(prompt):
        for token, (start, end) in enumerate(spans):
            if start < word.end and end > word.start:
                belongs[words.index(word.text), token] = 1
    return WordMaps(tuple(words), torch.einsum("wt,...tyx->...wyx", belongs, maps))


class AttentionRecording(Recording):
    """What `record_attention` returns: the maps [B, tokens, h, w] by `Key`; B counts the prompts of the key's branch.

    A position's column adds up to 1 over the tokens.
    """

    def __init__(
        self,
        model: Diffuser,
        hookpoints: Iterable[str] | None,
        branches: Iterable[Branch],
        steps: Iterable[int] | None,
        sink: Sink | None,
        stop: bool,
    ) -> None:
        super().__init__(model, hookpoints, branches, steps, sink, stop)
        self._wrapped: list[tuple[Any, Any]] = []
        self._layers: dict[str, list[Tensor]] = {name: [] for name in self._hookpoints}

    def __enter__(self) -> Self:
        super().__enter__()
        for name in self._hookpoints:
            block: Any = self._model.unet.get_submodule(name)
            # Before a call, not after it: one that failed leaves its maps behind.
            self._handles.append(block.register_forward_pre_hook(lambda *_, name=name: self._layers[name].clear()))
            for layer in block.transformer_blocks:
                if layer.attn2 is not None:
                    processor = layer.attn2.get_processor()
                    self._wrapped.append((layer.attn2, processor))
                    layer.attn2.set_processor(_Watched(processor, partial(self._see, name)))
        return self

    def _unhook(self) -> None:
        super()._unhook()
        while self._wrapped:
            attention, processor = self._wrapped.pop()
            attention.set_processor(processor)

    def _see(self, name: str, attention: Any, hidden: Tensor, text: Tensor, mask: Tensor | None) -> None:
        """Compute a layer's map, [rows, positions, tokens], if its call is wanted."""
        if self._wanted(name, len(hidden)):
            self._layers[name].append(attention_map(attention, hidden, text, mask))

    def _act(self, wanted: list[tuple[ActivationKey, slice]], _: Tensor, after: Tensor) -> None:
        """The block is through: its output tells the shape of its positions."""
        layers = self._layers[wanted[0][0].hookpoint]
        if not layers:
            raise RuntimeError(f"{wanted[0][0].hookpoint!r} was called without text: there is no attention to it.")
        maps = torch.stack(layers).mean(0).transpose(1, 2)
        maps = maps.reshape(*maps.shape[:2], *after.shape[-2:])
        # `Recording` keeps a difference, here to nothing, which makes the rows that are kept a tensor of their own.
        super()._act(wanted, torch.zeros_like(maps), maps)


class _Watched:
    """An attention processor that shows what it is given before it computes."""

    def __init__(self, processor: Any, see: Callable[..., None]) -> None:
        self._processor, self._see = processor, see

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            self._see(attn, hidden_states, encoder_hidden_states, attention_mask)
        output: Tensor = self._processor(
            attn, hidden_states, encoder_hidden_states, attention_mask=attention_mask, temb=temb, **others
        )
        return output


@torch.no_grad()
def attention_map(attention: Any, hidden: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of scaled products of queries and keys, mean over heads: [rows, positions, tokens] float32.

    Args:
        attention: An `Attention` of diffusers.
        hidden: [rows, positions, channels] what asks.
        text: [rows, tokens, D] what is asked.
        mask: Added to the products, as the U-Net hands it on.
    """
    if attention.norm_cross:
        text = attention.norm_encoder_hidden_states(text)
    query = attention.head_to_batch_dim(attention.to_q(hidden))
    key = attention.head_to_batch_dim(attention.to_k(text))
    mask = attention.prepare_attention_mask(mask, text.shape[1], len(hidden))
    shares: Tensor = attention.get_attention_scores(query, key, mask)
    return shares.float().view(len(hidden), attention.heads, *shares.shape[1:]).mean(1)
