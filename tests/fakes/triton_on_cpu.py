"""As much of Triton's language as the kernels here use, on CPU tensors: a kernel's own lines run where no GPU is.

A stand-in for the compiler, not for the kernel. `installed()` puts it in Triton's place.
"""

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_program: list[int] = []


class Pointer(NamedTuple):
    """A tensor's memory and places in it."""

    memory: Tensor
    offsets: Tensor

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offsets: Any) -> "Pointer":
        return Pointer(self.memory, self.offsets + offsets)


class Kernel:
    """What `triton.jit` makes: `kernel[grid](...)` runs one program after the other."""

    def __init__(self, body: Callable[..., None]) -> None:
        self.body = body

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: int) -> None:
            assert num_warps & (num_warps - 1) == 0
            given = [
                Pointer(a.view(-1), torch.zeros((), dtype=torch.int64)) if isinstance(a, Tensor) else a
                for a in arguments
            ]
            for program in range(grid[0]):
                _program[:] = [program]
                self.body(*given, **constants)

        return launch


def load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    found = torch.full(mask.shape, other, dtype=pointer.memory.dtype)
    found[mask] = pointer.memory[pointer.offsets[mask]]
    return found


def store(pointer: Pointer, values: Tensor, mask: Tensor) -> None:
    assert values.dtype == pointer.memory.dtype
    sites = pointer.offsets[mask]
    assert len(sites.unique()) == len(sites)  # two lanes that write one place race
    pointer.memory[sites] = values[mask]


def cast(value: Any, dtype: torch.dtype, bitcast: bool = False) -> Tensor:
    value = torch.as_tensor(value)
    return value.view(dtype) if bitcast else value.to(dtype)


def where(condition: Tensor, yes: Any, no: Any) -> Tensor:
    return torch.where(condition, yes, no)


@contextmanager
def installed() -> Iterator[None]:
    """Imports of Triton find this; afterwards everything is as it was."""
    language: Any = types.ModuleType("triton.language")
    language.load, language.store, language.cast, language.where = load, store, cast, where
    language.program_id = lambda _: _program[0]
    language.arange = torch.arange
    language.sum = lambda x: x.sum().to(x.dtype)
    language.cumsum = lambda x, axis: x.cumsum(axis).to(x.dtype)
    language.maximum = lambda x, least: x.clamp_min(least)
    language.int16, language.int32, language.int64 = torch.int16, torch.int32, torch.int64
    language.constexpr = int
    triton: Any = types.ModuleType("triton")
    triton.language, triton.jit = language, Kernel
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    names = ("triton", "triton.language", "core.sae.selection_kernel")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.modules.update({"triton": triton, "triton.language": language})
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
