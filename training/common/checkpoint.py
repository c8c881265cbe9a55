"""Checkpoints that survive any kill and a damaged disk: two are kept, and each file has a checksum.

In a run's folder: `checkpoint`, the newest; `checkpoint.old`, the one before it, used if the newest is damaged; and
while one is written `checkpoint.part`. Each has `state.json` with the steps done, the recipe and the sha256 of every
file of tensors.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.artifacts import file_sha256

_PART, _WHOLE, _OLD, _DAMAGED = "checkpoint.part", "checkpoint", "checkpoint.old", "checkpoint.damaged"

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A training run at one of its steps."""

    step: int
    """Steps done."""
    recipe: dict[str, Any]
    """JSON: everything that the run's results depend on."""
    tensors: dict[str, dict[str, Tensor]]
    """Tensors by file and name."""


class _DamagedError(Exception):
    """A checkpoint that cannot be read; the message says why."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint beside the last one, then replace it: a kill leaves at least one of the two complete.

    Raises:
        OSError: It could not be written, for example to a full disk. Those before it are still there.
    """
    part, whole, old = folder / _PART, folder / _WHOLE, folder / _OLD
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        sums = {}
        for name, tensors in checkpoint.tensors.items():
            path = part / f"{name}.safetensors"
            save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path)
            sums[name] = file_sha256(path)
        described = {"step": checkpoint.step, "files": sums, "recipe": checkpoint.recipe}
        (part / "state.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        last = "The last one is whole; make room and start again to go on from it."
        raise OSError(
            f"The checkpoint of step {checkpoint.step} could not be written to {folder}: {error}. "
            f"{last if whole.exists() or old.exists() else 'Make room and start again.'}"
        ) from error
    if whole.exists():
        # Only now: after a kill between the two renames, `old` is the newest checkpoint.
        shutil.rmtree(old, ignore_errors=True)
        whole.rename(old)
    part.rename(whole)


def load_checkpoint(folder: Path, recipe: Mapping[str, Any]) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None. If the last one is damaged, it is the one before it.

    Raises:
        ValueError: It was made with another recipe, or all are damaged.
    """
    damaged: dict[Path, _DamagedError] = {}
    for found in (folder / _WHOLE, folder / _OLD):
        if not found.exists():
            continue
        try:
            checkpoint = _read(found, folder, recipe)
        except _DamagedError as error:
            damaged[found] = error
            continue
        for other, why in damaged.items():
            logger.warning("%s is damaged (%s): going on from the one before it, step %d", other, why, checkpoint.step)
            # Out of the way, or the next checkpoint would take this one's place and not that of the damaged one.
            with suppress(OSError):  # several processes may be at it
                shutil.rmtree(folder / _DAMAGED, ignore_errors=True)
                other.rename(folder / _DAMAGED)
        return checkpoint
    for found, why in damaged.items():
        raise ValueError(
            f"The checkpoint {found} is damaged ({why}), and there is no whole one before it. Delete it to start anew."
        ) from why
    return None


def _read(path: Path, folder: Path, recipe: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint, if it is whole and of this recipe."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        step, then, files = state["step"], state["recipe"], state["files"]
        if type(step) is not int or not isinstance(then, dict) or not isinstance(files, dict | list):
            raise ValueError("state.json has values of the wrong type")
        changed = list(_differences(then, json.loads(json.dumps(recipe))))
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _DamagedError(f"{type(error).__name__}: {error}") from error
    if changed:
        raise ValueError(
            f"The checkpoint in {folder} is of another recipe: {'; '.join(changed)}. Give the recipe it was made "
            f"with, or another folder."
        )
    # Earlier versions wrote a list of names, without checksums.
    sums = files if isinstance(files, dict) else dict.fromkeys(files)
    tensors = {}
    for name, wanted in sums.items():
        file = path / f"{name}.safetensors"
        try:
            if wanted and file_sha256(file) != wanted:
                raise _DamagedError(f"{file.name} is not the file that was written")
            tensors[name] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise _DamagedError(str(error)) from error
    return Checkpoint(step, then, tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state by `<index of the weight>.<entry>`."""
    return {
        f"{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load a state from `optimizer_tensors` into an optimiser."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def scaler_tensors(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """The loss scale and the steps since it changed, without which a resumed run would skip steps again."""
    state = scaler.state_dict()
    names = ("scale", "_growth_tracker")
    return {name: torch.tensor(state[name], dtype=torch.float64) for name in names}


def load_scaler(scaler: torch.amp.GradScaler, tensors: Mapping[str, Tensor]) -> None:
    """Load a state from `scaler_tensors` into a loss scaler; its growth settings stay."""
    scale, steps = tensors["scale"].item(), int(tensors["_growth_tracker"].item())
    scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": steps})


def _differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """The differences between two recipes, as text."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*then, *now]):
            yield from _differences(then.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif then != now:
        yield f"{name} was {then}, now {now}"
