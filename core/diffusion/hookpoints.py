"""Hookpoints of a U-Net: its cross-attention transformer blocks."""

from collections.abc import Sequence

import torch

from core.errors import ModelError


def cross_attention_blocks(unet: torch.nn.Module) -> list[str]:
    """Dotted names of the U-Net's cross-attention transformer blocks, first to last."""
    names = [name for name, module in unet.named_modules() if _has_cross_attention(module)]
    # Modules are registered with the middle block last, but it is called before the up blocks.
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return sorted(names, key=lambda name: order.get(name.split(".")[0], 3))


def nearest_hookpoints(unet: torch.nn.Module) -> tuple[str, ...]:
    """The bottleneck's cross-attention block and the nearest on either side of it."""
    blocks = cross_attention_blocks(unet)
    down = [name for name in blocks if name.startswith("down_blocks.")]
    middle = [name for name in blocks if name.startswith("mid_block.")]
    up = [name for name in blocks if name.startswith("up_blocks.")]
    return (*down[-1:], *middle[:1], *up[:1])


def check_hookpoints(unet: torch.nn.Module, hookpoints: Sequence[str]) -> None:
    """Raise a `ModelError` unless all hookpoints are cross-attention blocks of this U-Net."""
    blocks = cross_attention_blocks(unet)
    wrong = [name for name in hookpoints if name not in blocks]
    if wrong or not hookpoints:
        what = f"{wrong[0]!r} is no cross-attention block of this U-Net" if wrong else "no hookpoint is named"
        raise ModelError(f"{what}. Its blocks are: {', '.join(blocks) or 'none'}. Name some with hookpoints=.")


def _has_cross_attention(module: torch.nn.Module) -> bool:
    blocks = getattr(module, "transformer_blocks", None)
    return isinstance(blocks, torch.nn.ModuleList) and any(getattr(b, "attn2", None) is not None for b in blocks)
