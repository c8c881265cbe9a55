"""Data sets that lie where the model is: what a step needs is then drawn there, and nothing is copied."""

from collections.abc import Sequence

import torch
from torch import Tensor

SHARE = 0.5
"""Most of a GPU's free memory that data may take; the rest is for training."""


def fits(n_bytes: int, device: torch.device | str) -> bool:
    """Whether data of this size may lie on a device."""
    device = torch.device(device)
    return device.type != "cuda" or n_bytes <= SHARE * torch.cuda.mem_get_info(device)[0]


def on_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """The tensors on a device, or all where they are if they do not fit."""
    wanted = fits(sum(tensor.nbytes for tensor in tensors), device)
    return [tensor.to(device) if wanted else tensor for tensor in tensors]
