"""Checkpoints that survive any kill: the last one stays until the next is complete; another recipe's is refused."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_PART, _WHOLE, _OLD = "checkpoint.part", "checkpoint", "checkpoint.old"


class Checkpoint(NamedTuple):
    """A training run at one of its steps."""

    step: int
    """Steps done."""
    recipe: dict[str, Any]
    """JSON: everything that the run's results depend on."""
    tensors: dict[str, dict[str, Tensor]]
    """Tensors by file and name."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint beside the last one, then replace it: a kill leaves at least one of the two complete.

    Raises:
        OSError: It could not be written, for example to a full disk. The last one is still there.
    """
    part, whole, old = folder / _PART, folder / _WHOLE, folder / _OLD
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()}, part / f"{name}.safetensors"
            )
        described = {"step": checkpoint.step, "files": list(checkpoint.tensors), "recipe": checkpoint.recipe}
        (part / "state.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"The checkpoint of step {checkpoint.step} could not be written to {folder}: {error}. The last one is "
            f"whole; make room and start again to go on from it."
        ) from error
    if whole.exists():
        # Only now: after a kill between the two renames, `old` is the newest checkpoint.
        shutil.rmtree(old, ignore_errors=True)
        whole.rename(old)
    part.rename(whole)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, recipe: Mapping[str, Any]) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None.

    Raises:
        ValueError: It was made with another recipe, or its files are damaged.
    """
    found = next((path for name in (_WHOLE, _OLD) if (path := folder / name).exists()), None)
    if found is None:
        return None
    try:
        state = json.loads((found / "state.json").read_text(encoding="utf-8"))
        if changed := list(_differences(state["recipe"], json.loads(json.dumps(recipe)))):
            raise ValueError(
                f"The checkpoint in {folder} is of another recipe: {'; '.join(changed)}. Give the recipe it was made "
                f"with, or another folder."
            )
        tensors = {name: load_file(found / f"{name}.safetensors") for name in state["files"]}
        return Checkpoint(int(state["step"]), state["recipe"], tensors)
    except (OSError, KeyError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"The checkpoint {found} is damaged ({error}). Delete it to start anew.") from error


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
