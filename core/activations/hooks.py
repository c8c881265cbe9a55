"""Record and edit residual updates, that is, what cross-attention blocks add to the residual stream.

The residual update of a hookpoint is the output of its block minus the input, [B, C, H, W]. `record` and `edit` are
context managers for a `Diffuser`. The sampler says which step it is at and which rows belong to which branch
(`model.step_context`); nothing is counted here. Any other call of the U-Net, such as `predict_noise`, counts as branch
"cond" with step None, and is recorded or edited if no steps are named.

Hooks act in the order in which their contexts are entered: a recording inside an edit sees the edited update, one
outside it the original. They see every call of the model, whichever job makes it. Where several jobs share a model,
pass them to `model.sample` or `model.generate` as `contexts`, which enter them when the model is free.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self, get_args

import torch
from torch import Tensor

from core.arguments import as_items
from core.diffusion.diffuser import Diffuser
from core.diffusion.hookpoints import check_hookpoints, cross_attention_blocks
from core.diffusion.sampling import Branch, StepContext

BRANCHES: tuple[Branch, ...] = get_args(Branch)
_ALONE: tuple[Branch, ...] = ("cond",)


class ActivationKey(NamedTuple):
    """Where and when a residual update was computed; equal to the plain tuple of its fields."""

    hookpoint: str
    """Dotted module name of the block."""
    branch: Branch
    """Branch of classifier-free guidance."""
    step: int | None
    """Sampler step, from 0; None for a call outside the sampler."""


Sink = Callable[[ActivationKey, Tensor], None]
"""Receives an update [B, C, H, W] of the B prompts of a branch, in the model's dtype and on its device."""
UpdateEdit = Callable[[ActivationKey, Tensor], Tensor | None]
"""Maps an update [B, C, H, W] to a new one of that shape, or to None, which leaves it unchanged to the bit."""


def record(
    model: Diffuser,
    hookpoints: str | Iterable[str] | None = None,
    *,
    branches: Branch | Iterable[Branch] = BRANCHES,
    steps: int | Iterable[int] | None = None,
    sink: Sink | None = None,
    stop: bool = False,
    outputs: Collection[str] = (),
) -> "Recording":
    """Record the residual updates of all U-Net calls inside the `with`, by `ActivationKey`.

        >>> with record(model, ["mid_block.attentions.0"], steps=[0]) as updates:
        ...     image = model.generate("a cat on grass").image
        >>> updates["mid_block.attentions.0", "cond", 0].shape
        torch.Size([1, 192, 8, 8])

    An update with the same key (from a second run, or another batch) replaces the first; a `sink` sees both. To save
    steps, give `model.sample` the last one you need as `last_step`; `stop` also saves the rest of that U-Net call.

    Args:
        model: The model.
        hookpoints: Cross-attention blocks, or one; by default the model's own.
        branches: Branches of classifier-free guidance. A run without guidance has "cond" only.
        steps: Sampler steps; None: all of them, and calls outside the sampler.
        sink: Called with every update, in which case none is kept.
        stop: End the `with` block at the last update to record, in the middle of the U-Net call: the sampler's
            generator is closed, the model is free, and the rest of the block is skipped.
        outputs: Hookpoints where the block's whole output is recorded in place of the update, for SAEs that read it.

    Raises:
        ModelError: No such block; the message lists the U-Net's blocks.
        ValueError: No such branch or step, raised here or when the sampler starts.
    """
    return Recording(model, hookpoints, branches, steps, sink, stop, outputs)


def edit(
    model: Diffuser,
    edits: UpdateEdit | Sequence[UpdateEdit],
    hookpoints: str | Iterable[str] | None = None,
    *,
    branches: Branch | Iterable[Branch] = BRANCHES,
    steps: int | Iterable[int] | None = None,
    outputs: Collection[str] = (),
) -> "Editing":
    """Change the residual updates of all U-Net calls inside the `with`.

        >>> def double(key, update):
        ...     return 2 * update if key.branch == "cond" else None
        >>> with edit(model, double, ["mid_block.attentions.0"], steps=range(5)):
        ...     image = model.generate("a cat on grass").image

    Several edits apply in order, each to the result of the one before. The other arguments are as for `record`.

    Raises:
        ModelError: No such block; the message lists the U-Net's blocks.
        ValueError: No such branch or step, raised here or when the sampler starts; an edit that returns another shape.
    """
    return Editing(model, hookpoints, branches, steps, (edits,) if callable(edits) else tuple(edits), outputs)


class _Hooks:
    """Forward hooks on blocks of a U-Net while the context is entered."""

    def __init__(
        self,
        model: Diffuser,
        hookpoints: str | Iterable[str] | None,
        branches: Branch | Iterable[Branch],
        steps: int | Iterable[int] | None,
        outputs: Collection[str],
    ) -> None:
        self._model, self._outputs = model, outputs
        self._hookpoints = model.hookpoints if hookpoints is None else tuple(dict.fromkeys(as_items(hookpoints)))
        check_hookpoints(model.unet, self._hookpoints)
        self._branches: frozenset[Branch] = frozenset(as_items(branches))
        self._steps: frozenset[int] | None = None if steps is None else frozenset(as_items(steps))
        wrong = sorted(self._branches.difference(BRANCHES))
        if wrong or not self._branches:
            raise ValueError(f"A branch is one of {', '.join(BRANCHES)}, not {wrong[0] if wrong else 'none'!r}.")
        if self._steps is not None and min(self._steps, default=-1) < 0:
            raise ValueError(f"Steps are one or more numbers from 0 on, not {sorted(self._steps)}.")
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._entered = False

    def __enter__(self) -> Self:
        if self._entered:
            raise RuntimeError("This context was entered before. Make a new one for each `with`.")
        self._entered = True
        for name in self._hookpoints:
            block = self._model.unet.get_submodule(name)
            self._handles.append(block.register_forward_hook(partial(self._on_output, name), with_kwargs=True))
        return self

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_output(
        self, name: str, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The hook: unwrap the input and output tensors, act, and wrap the result as the block does."""
        before: Tensor = args[0] if args else kwargs["hidden_states"]
        after: Any = output[0] if isinstance(output, tuple) else output
        if not isinstance(after, Tensor):
            raise TypeError(f"{name!r} returned a {type(output).__name__}; a tensor or a tuple of one is expected.")
        wanted = self._wanted(name, len(after))
        changed = self._act(wanted, before, after) if wanted else None
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _wanted(self, name: str, n_rows: int) -> list[tuple[ActivationKey, slice]]:
        """Keys and rows of the parts of this call's batch to act on."""
        step_context = self._model.step_context
        if step_context is not None:
            self._check_run(step_context)
        step, branches = (None, _ALONE) if step_context is None else (step_context.step, step_context.branches)
        if self._steps is not None and step not in self._steps:
            return []
        n = n_rows // len(branches)
        return [
            (ActivationKey(name, branch, step), slice(i * n, (i + 1) * n))
            for i, branch in enumerate(branches)
            if branch in self._branches
        ]

    def _read(self, key: ActivationKey, before: Tensor, after: Tensor) -> Tensor:
        """What is recorded or edited, as a new tensor: in-place operations, also of the U-Net, change nothing else."""
        return after.clone() if key.hookpoint in self._outputs else after - before

    def _check_run(self, step_context: StepContext) -> None:
        """Raise a `ValueError` for branches or steps that this run of the sampler does not have."""
        if self._branches.isdisjoint(step_context.branches):
            raise ValueError(
                f"This run has no branch {' or '.join(sorted(self._branches))}: "
                f"a guidance_scale of 1 or less runs cond alone."
            )
        if self._steps is not None and max(self._steps) >= step_context.n_steps:
            raise ValueError(
                f"Step {max(self._steps)} was asked for; this run has steps 0 to {step_context.n_steps - 1}."
            )

    def _act(self, wanted: list[tuple[ActivationKey, slice]], before: Tensor, after: Tensor) -> Tensor | None:
        """Act on the selected rows of a block's input and output; returns the new output, or None if unchanged."""
        raise NotImplementedError


class _Stop(BaseException):
    """Ends the `with` block of a complete recording. Not an `Exception`, so that nothing on the way catches it."""

    def __init__(self, recording: "Recording") -> None:
        self.recording = recording


class Recording(_Hooks, Mapping[ActivationKey, Tensor]):
    """What `record` returns: by `ActivationKey`, detached updates [B, C, H, W] of the B prompts of a branch."""

    def __init__(
        self,
        model: Diffuser,
        hookpoints: str | Iterable[str] | None,
        branches: Branch | Iterable[Branch],
        steps: int | Iterable[int] | None,
        sink: Sink | None,
        stop: bool,
        outputs: Collection[str] = (),
    ) -> None:
        super().__init__(model, hookpoints, branches, steps, outputs)
        self._updates: dict[ActivationKey, Tensor] = {}
        self._sink: Sink = self._updates.__setitem__ if sink is None else sink
        self._stop = stop
        blocks = cross_attention_blocks(model.unet)
        self._last_hookpoint = max(self._hookpoints, key=blocks.index)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._unhook()
        return isinstance(error, _Stop) and error.recording is self

    def __getitem__(self, key: ActivationKey) -> Tensor:
        if key not in self._updates:
            there = ", ".join(str(tuple(other)) for other in self._updates)
            raise KeyError(f"{tuple(key)} was not recorded; there are: {there or 'none'}")
        return self._updates[key]

    def __iter__(self) -> Iterator[ActivationKey]:
        return iter(self._updates)

    def __len__(self) -> int:
        return len(self._updates)

    def _act(self, wanted: list[tuple[ActivationKey, slice]], before: Tensor, after: Tensor) -> None:
        for key, rows in wanted:
            self._sink(key, self._read(key, before[rows], after[rows]).detach())
        if self._stop and wanted[0][0].hookpoint == self._last_hookpoint and self._at_last_step():
            raise _Stop(self)

    def _at_last_step(self) -> bool:
        step_context = self._model.step_context
        if step_context is None:
            return True
        return step_context.step == (step_context.n_steps - 1 if self._steps is None else max(self._steps))


class Editing(_Hooks):
    """What `edit` returns: a context that edits updates while it is entered."""

    def __init__(
        self,
        model: Diffuser,
        hookpoints: str | Iterable[str] | None,
        branches: Branch | Iterable[Branch],
        steps: int | Iterable[int] | None,
        edits: tuple[UpdateEdit, ...],
        outputs: Collection[str],
    ) -> None:
        super().__init__(model, hookpoints, branches, steps, outputs)
        self._edits = edits

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unhook()

    def _act(self, wanted: list[tuple[ActivationKey, slice]], before: Tensor, after: Tensor) -> Tensor | None:
        changed: Tensor | None = None
        for key, rows in wanted:
            new = self._edited(key, self._read(key, before[rows], after[rows]))
            if new is None:
                continue
            if changed is None:
                changed = after.clone()
            # The change is added to the output, rather than the new update to the input: then an edit that adds zeros
            # changes nothing, to the bit. The old update is computed again because an edit may work in place.
            changed[rows] += new.to(after.dtype) - self._read(key, before[rows], after[rows])
        return changed

    def _edited(self, key: ActivationKey, update: Tensor) -> Tensor | None:
        """The update after all edits; None if none of them changed it."""
        touched = False
        for one in self._edits:
            new = one(key, update)
            if new is None:
                continue
            if new.shape != update.shape:
                raise ValueError(
                    f"An edit at {key.hookpoint!r} returned {list(new.shape)} for an update {list(update.shape)}."
                )
            update, touched = new, True
        return update if touched else None
