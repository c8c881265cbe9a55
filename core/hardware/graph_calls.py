"""Calls of a module as a graph sees them: which are of one kind, and what is left of one once its values are fixed."""

from typing import Any

import torch
from torch import Tensor

from core.hardware.graph_capture import Output, Work


def kind_of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that one graph can read: shape, strides, dtype and device."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def kind_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """What two calls of one graph have in common; None if an argument is neither a tensor nor a plain value."""
    kinds: list[Any] = [len(args), *kwargs]
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            kinds.append(kind_of_tensor(value))
        elif value is None or isinstance(value, bool | int | float | str):
            kinds.append((type(value), value))
        else:
            return None
    return tuple(kinds)


def forward_of(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Work:
    """The forward of a module as a function of its tensor arguments, with the others fixed."""
    names, n_args, tensor = tuple(kwargs), len(args), object()
    template = [tensor if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]

    def work(*given: Tensor) -> Output:
        rest = iter(given)
        values = [next(rest) if value is tensor else value for value in template]
        output: Output = type(module).forward(
            module, *values[:n_args], **dict(zip(names, values[n_args:], strict=True))
        )
        return output

    return work


def is_tensors(output: Any) -> bool:
    """Whether an output is a tensor or a plain tuple of tensors."""
    return isinstance(output, Tensor) or (type(output) is tuple and all(isinstance(part, Tensor) for part in output))


def equal(a: Output, b: Output) -> bool:
    """Whether two outputs are equal to the bit; NaN equals NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = (a,), (b,)  # type: ignore[assignment]
    pairs: list[Any] = list(zip(a, b, strict=True))
    return all(bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in pairs)
