"""The k largest of every row on a CUDA device, in one pass over memory (needs Triton, which comes with torch there).

`torch.topk` reads a row many times over and sorts what it found; here the row stays in registers. The bits of a
positive float, read as an integer, are in the order of the floats, so the k-th largest value is found bit by bit, from
the highest down: a bit is set if at least k values are as large as the number that it makes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _select(  # type: ignore[no-untyped-def]
    pre,
    out_values,
    out_places,
    width,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: pre [N, width] into out_values and out_places [N, K]."""
    row = tl.cast(tl.program_id(0), tl.int64)
    pre += row * width
    out_values += row * K
    out_places += row * K
    lanes = tl.arange(0, BLOCK)
    values = tl.load(pre + lanes, mask=lanes < width, other=0.0)
    bits = tl.cast(tl.cast(values, tl.int16 if BITS == 16 else tl.int32, bitcast=True), tl.int32)
    # Negative values count as zero; lanes past the row's end as less than anything.
    keys = tl.where(lanes < width, tl.maximum(bits, 0), -1)
    least = 0
    for place in range(BITS - 1):
        higher = least | (1 << (BITS - 2 - place))
        least = tl.where(tl.sum(tl.cast(keys >= higher, tl.int32)) >= K, higher, least)
    above = keys > least
    ties = keys == least
    # How many there are up to each lane, of both kinds in one scan.
    ranks = tl.cumsum(tl.cast(above, tl.int32) | (tl.cast(ties, tl.int32) << 16), 0)
    tie_rank = (ranks >> 16) & 0xFFFF
    n_above = tl.sum(tl.cast(above, tl.int32))
    chosen = above | (ties & (tie_rank <= K - n_above))  # the first ties fill what is left of K
    slots = tl.where(above, ranks & 0xFFFF, n_above + tie_rank) - 1
    positive = tl.cast(keys, tl.int16 if BITS == 16 else tl.int32)
    tl.store(out_values + slots, tl.cast(positive, out_values.dtype.element_ty, bitcast=True), mask=chosen)
    tl.store(out_places + slots, tl.cast(lanes, tl.int64), mask=chosen)


def select(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row of pre [N, width], negative ones as zero: values and places [N, k]."""
    n_rows, width = pre.shape
    values = torch.empty((n_rows, k), dtype=pre.dtype, device=pre.device)
    places = torch.empty((n_rows, k), dtype=torch.int64, device=pre.device)
    block = triton.next_power_of_2(width)
    # 16 values a thread: compiled for an H100, 32 take nearly all the registers that a thread can have.
    n_warps = min(max(block // 512, 1), 32)
    with torch.cuda.device_of(pre):  # type: ignore[no-untyped-call]
        _select[(n_rows,)](
            pre.contiguous(), values, places, width, K=k, BITS=8 * pre.itemsize, BLOCK=block, num_warps=n_warps
        )
    return values, places
