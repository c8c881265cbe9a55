"""Checkpoints on a disk that loses or changes bits."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from training.common.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

RECIPE = {"a": 1}


def save(folder: Path, step: int) -> None:
    save_checkpoint(folder, Checkpoint(step, dict(RECIPE), {"model": {"w": torch.full((500,), float(step))}}))


def step_of(folder: Path) -> int:
    found = load_checkpoint(folder, RECIPE)
    assert found is not None
    assert (found.tensors["model"]["w"] == found.step).all()
    return found.step


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def of_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(change(state)))

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one flipped bit among the weights": lambda folder: flip(folder / "model.safetensors", -2),
    "one flipped bit in the header": lambda folder: flip(folder / "model.safetensors", 12),
    "weights cut short": lambda folder: (folder / "model.safetensors").write_bytes(b"half"),
    "weights lost": lambda folder: (folder / "model.safetensors").unlink(),
    "state lost": lambda folder: (folder / "state.json").unlink(),
    "state cut short": lambda folder: (folder / "state.json").write_text("{"),
    "state no UTF-8": lambda folder: (folder / "state.json").write_bytes(b"\xff{}"),
    "state a list": of_state(lambda _: []),
    "a step in words": of_state(lambda state: state | {"step": "x"}),
    "no files": of_state(lambda state: {"step": state["step"], "recipe": state["recipe"]}),
    "files a number": of_state(lambda state: state | {"files": 3}),
    "recipe a text": of_state(lambda state: state | {"recipe": "x"}),
    "brackets without end": lambda folder: (folder / "state.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_detected_and_the_checkpoint_before_is_used(
    tmp_path: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    damage(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"is damaged .* no whole one before it. Delete it to start anew"):
        load_checkpoint(tmp_path, RECIPE)
    save(tmp_path, 2)
    save(tmp_path, 3)
    damage(tmp_path / "checkpoint")
    with caplog.at_level(logging.WARNING):
        assert step_of(tmp_path) == 2
    assert ["is damaged" in record.getMessage() for record in caplog.records] == [True]
    save(tmp_path, 4)  # takes the place of the damaged one: the one that was used stays
    assert step_of(tmp_path) == 4
    damage(tmp_path / "checkpoint")
    assert step_of(tmp_path) == 2


def test_two_are_kept(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "checkpoint.old"]
    assert json.loads((tmp_path / "checkpoint.old" / "state.json").read_text())["step"] == 3


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_and_is_read(tmp_path: Path) -> None:
    save(tmp_path, 7)
    of_state(lambda state: state | {"files": list(state["files"])})(tmp_path / "checkpoint")
    assert step_of(tmp_path) == 7


def test_a_first_checkpoint_that_cannot_be_written_promises_no_other(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, no folder")
    with pytest.raises(OSError, match=r"could not be written .*\. Make room and start again\."):
        save(tmp_path / "run", 1)
