"""Record and edit residual updates: what cross-attention blocks add to the stream, while the sampler runs.

Two context managers round a `Diffuser`. The residual update of a hookpoint is its block's output minus its input,
[B, C, H, W]. Which step it is and which rows are which branch is told by the sampler (`model.moment`), never counted
here. Any other call of the U-Net, `predict_noise` among them, counts as the branch "cond" with the step None: it is
recorded and edited where no steps are named.

Hooks act in the order in which their contexts were entered: a recording inside an edit sees the edited update, one
outside it the update before. They see every call of the model, whichever job makes it; where several jobs share a
model, hand them to `model.sample` or `model.generate` as `contexts`, which enter them once the model is theirs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self, get_args

import torch
from torch import Tensor

from core.diffusion.diffuser import Diffuser
from core.diffusion.hookpoints import check_hookpoints, cross_attention_blocks
from core.diffusion.sampling import Branch, StepContext

BRANCHES: tuple[Branch, ...] = get_args(Branch)
_ALONE: tuple[Branch, ...] = ("cond",)


class ActivationKey(NamedTuple):
    """Where and when a residual update was made; equal to the plain tuple of its fields."""

    hookpoint: str
    """Dotted module name of the block."""
    branch: Branch
    """Half of the guided batch."""
    step: int | None
    """Sampler step, from 0; None for a call that the sampler did not make."""


Sink = Callable[[ActivationKey, Tensor], None]
"""Takes an update [B, C, H, W], B the prompts of its branch, in the model's precision and on its device."""
UpdateEdit = Callable[[ActivationKey, Tensor], Tensor | None]
"""From an update [B, C, H, W] to another of that shape, or to None, which leaves everything as it is to the bit."""


def record(
    model: Diffuser,
    hookpoints: Iterable[str] | None = None,
    *,
    branches: Iterable[Branch] = BRANCHES,
    steps: Iterable[int] | None = None,
    sink: Sink | None = None,
    stop: bool = False,
) -> "Recording":
    """Keep the residual updates of all that the model computes inside the `with`, by `Key`.

    A moment that comes again (a second run, another batch) takes the place of the first; a `sink` sees both. To run no
    step in vain, give `model.sample` the last wanted one as `last_step`; `stop` saves the rest of its U-Net call too.

    Args:
        model: The model.
        hookpoints: Cross-attention blocks; the model's own by default.
        branches: Halves of a guided batch. A run without guidance has "cond" alone.
        steps: Sampler steps; None: every one, and calls that the sampler did not make.
        sink: Is given every update, and nothing is kept.
        stop: End the `with` block as soon as the last wanted update is there: in the middle of the U-Net's call, the
            sampler's generator closed and the model free. What follows in the block is skipped.

    Raises:
        ModelError: No such block; the U-Net's blocks are listed.
        ValueError: No such branch or step, here or once the sampler tells what it has.
    """
    return Recording(model, hookpoints, branches, steps, sink, stop)


def edit(
    model: Diffuser,
    edits: UpdateEdit | Sequence[UpdateEdit],
    hookpoints: Iterable[str] | None = None,
    *,
    branches: Iterable[Branch] = BRANCHES,
    steps: Iterable[int] | None = None,
) -> "Editing":
    """Change the residual updates of all that the model computes inside the `with`.

    Several edits apply in order, each to what the one before left. The rest is as for `record`.

    Raises:
        ModelError: No such block; the U-Net's blocks are listed.
        ValueError: No such branch or step, here or once the sampler tells what it has; an edit that returns another
            shape.
    """
    return Editing(model, hookpoints, branches, steps, (edits,) if callable(edits) else tuple(edits))


class _Hooks:
    """Forward hooks on blocks of a U-Net, from entering the context to leaving it."""

    def __init__(
        self,
        model: Diffuser,
        hookpoints: Iterable[str] | None,
        branches: Iterable[Branch],
        steps: Iterable[int] | None,
    ) -> None:
        self._model = model
        self._hookpoints = model.hookpoints if hookpoints is None else tuple(dict.fromkeys(hookpoints))
        check_hookpoints(model.unet, self._hookpoints)
        self._branches, self._steps = frozenset(branches), None if steps is None else frozenset(steps)
        wrong = sorted(self._branches.difference(BRANCHES))
        if wrong or not self._branches:
            raise ValueError(f"A branch is one of {', '.join(BRANCHES)}, not {wrong[0] if wrong else 'none'!r}.")
        if self._steps is not None and min(self._steps, default=-1) < 0:
            raise ValueError(f"Steps count from 0 and there is at least one; {sorted(self._steps)} were given.")
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._entered = False

    def __enter__(self) -> Self:
        if self._entered:
            raise RuntimeError("This context was entered before; make a new one for each `with`.")
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
        """The hook: find the tensors, whatever they are wrapped in, and hand back what the block should return."""
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
        """The parts of this call's batch to act on."""
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

    def _check_run(self, step_context: StepContext) -> None:
        """Refuse what this run of the sampler can never give, rather than end with nothing."""
        if self._branches.isdisjoint(step_context.branches):
            raise ValueError(
                f"This run has no branch {' or '.join(sorted(self._branches))}: a guidance_scale of 1 runs cond alone."
            )
        if self._steps is not None and max(self._steps) >= step_context.n_steps:
            raise ValueError(
                f"Step {max(self._steps)} was asked for; this run has steps 0 to {step_context.n_steps - 1}."
            )

    def _act(self, wanted: list[tuple[ActivationKey, slice]], before: Tensor, after: Tensor) -> Tensor | None:
        """Do something with the wanted rows of a block's input and output; the new output, if there is one."""
        raise NotImplementedError


class _Stop(BaseException):
    """Ends the `with` block of a recording that has all it wants. No `except Exception` on the way may catch it."""

    def __init__(self, recording: "Recording") -> None:
        self.recording = recording


class Recording(_Hooks, Mapping[ActivationKey, Tensor]):
    """What `record` returns: the updates [B, C, H, W] by `Key`, detached; B counts the prompts of the key's branch."""

    def __init__(
        self,
        model: Diffuser,
        hookpoints: Iterable[str] | None,
        branches: Iterable[Branch],
        steps: Iterable[int] | None,
        sink: Sink | None,
        stop: bool,
    ) -> None:
        super().__init__(model, hookpoints, branches, steps)
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
            # The difference is a tensor of its own: what the U-Net does to its parts later does not reach it.
            self._sink(key, (after[rows] - before[rows]).detach())
        if self._stop and wanted[0][0].hookpoint == self._last_hookpoint and self._at_last_step():
            raise _Stop(self)

    def _at_last_step(self) -> bool:
        step_context = self._model.step_context
        if step_context is None:
            return True
        return step_context.step == (step_context.n_steps - 1 if self._steps is None else max(self._steps))


class Editing(_Hooks):
    """What `edit` returns."""

    def __init__(
        self,
        model: Diffuser,
        hookpoints: Iterable[str] | None,
        branches: Iterable[Branch],
        steps: Iterable[int] | None,
        edits: tuple[UpdateEdit, ...],
    ) -> None:
        super().__init__(model, hookpoints, branches, steps)
        self._edits = edits

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unhook()

    def _act(self, wanted: list[tuple[ActivationKey, slice]], before: Tensor, after: Tensor) -> Tensor | None:
        changed: Tensor | None = None
        for key, rows in wanted:
            new = self._edited(key, after[rows] - before[rows])
            if new is None:
                continue
            if changed is None:
                changed = after.clone()
            # The change is added to the output, not the update to the input: an edit that adds zeros is then no edit,
            # to the bit. The old update is taken anew, for an edit may have written into the one that it was given.
            changed[rows] += new.to(after.dtype) - (after[rows] - before[rows])
        return changed

    def _edited(self, key: ActivationKey, update: Tensor) -> Tensor | None:
        """The update after all edits, None where none of them touched it."""
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
