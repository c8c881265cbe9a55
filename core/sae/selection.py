"""The k largest of every row, as training selects them: by `torch.topk`, or by a kernel where one works."""

import logging
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDEST = 2**15
"""Widest row that the kernel keeps in registers."""


def largest(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row of pre [N, width], negative ones as zero: values and places [N, k], in any order."""
    if pre.device.type == "cuda" and kernel_works(pre.device, pre.dtype, pre.shape[1], k):
        return by_kernel(pre, k)
    values, places = pre.topk(k)
    return values.relu(), places


def by_kernel(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `largest` gives, by Triton; imported here, since it is not on every machine and takes a while."""
    from core.sae.selection_kernel import select

    return select(pre, k)


@cache
def kernel_works(device: torch.device, dtype: torch.dtype, width: int, k: int) -> bool:
    """Whether the kernel runs here and selects what `torch.topk` does: tried once for each shape, on random rows."""
    if dtype not in _DTYPES or width > _WIDEST:
        return False
    pre = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    pre[:16] = pre[:16].round()  # many ties
    pre[16:32] -= 3  # few positive values, or none
    pre = pre.to(device, dtype)
    try:
        values, places = by_kernel(pre, k)
        same = torch.equal(values.sort(1, descending=True).values, pre.topk(k).values.relu())
        there = torch.equal(pre.gather(1, places).relu(), values)
        distinct = bool((places.sort(1).values.diff(dim=1) > 0).all())
    except ImportError:
        log.info("Triton is not installed: torch.topk selects the active latents")
        return False
    except Exception as error:  # whatever a compiler or a driver may raise
        log.warning("the kernel that selects active latents does not run on %s (%s): torch.topk does it", device, error)
        return False
    if not (same and there and distinct):
        log.warning("the kernel that selects active latents errs on %s: torch.topk does it", device)
        return False
    return True
