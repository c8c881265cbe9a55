"""Cross-attention maps: how much each position of a block attends to each token of the prompt.

`record_attention` is a context manager for a `Diffuser`, the counterpart of `core.activations.hooks.record` for
attention. It hooks the attention layers and leaves their processors alone: whichever processor a layer has (sliced,
memory-efficient, fused, an adapter's), it computes the layer's output, unchanged to the bit. The maps are computed
separately, from the layer's own queries and keys of the text.
"""

from collections.abc import Iterable
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
    """The W distinct words of the prompt, in lower case, in order of first occurrence."""
    maps: Tensor
    """[..., W, h, w] share of each position's attention on a word, summed over its tokens and occurrences. Most of the
    rest is on the start and end tokens."""


def record_attention(
    model: Diffuser,
    hookpoints: str | Iterable[str] | None = None,
    *,
    branches: Branch | Iterable[Branch] = BRANCHES,
    steps: int | Iterable[int] | None = None,
    sink: Sink | None = None,
    stop: bool = False,
) -> "AttentionRecording":
    """Record the cross-attention maps of all U-Net calls inside the `with`, by `ActivationKey`: [B, tokens, h, w].

    A map is the mean over the heads of the block's cross-attention, and over its layers if it has several; at each
    position it sums to 1 over the tokens, start, end and padding included. The arguments and errors are those of
    `core.activations.hooks.record`. Entered before a `record` that stops, it sees the block at which that one stops.
    """
    return AttentionRecording(model, hookpoints, branches, steps, sink, stop)


def word_maps(model: Diffuser, prompt: str, maps: Tensor) -> WordMaps:
    """Maps of the words of a prompt, from maps [..., tokens, h, w] of its tokens.

    Raises:
        PromptTooLongError: The prompt has more tokens than the model reads.
        ValueError: The maps do not have as many tokens as the prompt.
    """
    model.vocabulary.check_length(prompt)
    spans = model.vocabulary.token_spans(prompt)
    # In a batch with a longer prompt, the maps have more tokens than this prompt alone.
    if maps.ndim < 3 or maps.shape[-3] < len(spans) or maps.shape[-3] % (model.vocabulary.window + 2):
        raise ValueError(f"This prompt needs maps [..., {len(spans)}, h, w] of its tokens, not {list(maps.shape)}.")
    words = distinct_words(prompt)
    belongs = torch.zeros(len(words), maps.shape[-3], dtype=maps.dtype, device=maps.device)
    for word in split_words(prompt):
        for token, (start, end) in enumerate(spans):
            if start < word.end and end > word.start:
                belongs[words.index(word.text), token] = 1
    return WordMaps(tuple(words), torch.einsum("wt,...tyx->...wyx", belongs, maps))


class AttentionRecording(Recording):
    """What `record_attention` returns: by `ActivationKey`, maps [B, tokens, h, w] of the B prompts of a branch.

    At each position a map sums to 1 over the tokens.
    """

    def __init__(
        self,
        model: Diffuser,
        hookpoints: str | Iterable[str] | None,
        branches: Branch | Iterable[Branch],
        steps: int | Iterable[int] | None,
        sink: Sink | None,
        stop: bool,
    ) -> None:
        super().__init__(model, hookpoints, branches, steps, sink, stop)
        self._layers: dict[str, list[Tensor]] = {name: [] for name in self._hookpoints}

    def __enter__(self) -> Self:
        super().__enter__()
        for name in self._hookpoints:
            block: Any = self._model.unet.get_submodule(name)
            # Cleared before a call rather than after it, because a call that fails leaves its maps behind.
            self._handles.append(block.register_forward_pre_hook(lambda *_, name=name: self._layers[name].clear()))
            for layer in block.transformer_blocks:
                if layer.attn2 is not None:
                    hook = layer.attn2.register_forward_pre_hook(partial(self._see, name), with_kwargs=True)
                    self._handles.append(hook)
        return self

    def _see(self, name: str, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook: compute the map of a layer, [rows, positions, tokens], if this call is recorded."""
        given = dict(zip(("hidden_states", "encoder_hidden_states", "attention_mask"), args, strict=False)) | kwargs
        hidden, text = given["hidden_states"], given.get("encoder_hidden_states")
        if isinstance(text, tuple):  # an IP-Adapter's images come after the text
            text = text[0]
        if text is not None and self._wanted(name, len(hidden)):
            self._layers[name].append(attention_map(attention, hidden, text, given.get("attention_mask")))

    def _act(self, wanted: list[tuple[ActivationKey, slice]], _: Tensor, after: Tensor) -> None:
        """At the end of the block, whose output has the shape of its grid."""
        layers = self._layers[wanted[0][0].hookpoint]
        if not layers:
            raise RuntimeError(f"{wanted[0][0].hookpoint!r} was called without text, so there is no cross-attention.")
        maps = torch.stack(layers).mean(0).transpose(1, 2)
        maps = maps.reshape(*maps.shape[:2], *after.shape[-2:])
        # `Recording` keeps the difference to `before`; with zeros that is the maps, as tensors of their own.
        super()._act(wanted, torch.zeros_like(maps), maps)


@torch.no_grad()
def attention_map(attention: Any, hidden: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of the scaled dot products of queries and keys, mean over heads: [rows, positions, tokens] float32.

    Args:
        attention: An `Attention` layer of diffusers.
        hidden: [rows, positions, channels] input of the queries.
        text: [rows, tokens, D] input of the keys.
        mask: Added to the dot products, as the U-Net passes it on.
    """
    if attention.norm_cross:
        text = attention.norm_encoder_hidden_states(text)
    # Custom Diffusion has trained matrices of its own, in the processor (Kumari et al. 2023, arXiv 2212.04488).
    to_q, to_k = (
        getattr(attention.processor, f"{name}_custom_diffusion", getattr(attention, name)) for name in ("to_q", "to_k")
    )
    query = attention.head_to_batch_dim(to_q(hidden))
    key = attention.head_to_batch_dim(to_k(text))
    mask = attention.prepare_attention_mask(mask, text.shape[1], len(hidden))
    shares: Tensor = attention.get_attention_scores(query, key, mask)
    return shares.float().view(len(hidden), attention.heads, *shares.shape[1:]).mean(1)
