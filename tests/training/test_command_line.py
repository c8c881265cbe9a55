"""What a user types wrong ends in one message that says how to put it right, whatever the command."""

import argparse
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from training import __main__ as command_line
from training.common.report import ROOT
from training.common.run_lock import locked

WRONG = {
    "no command": ("", "the following arguments are required: COMMAND"),
    "unknown command": ("lables", "invalid choice: 'lables'"),
    "picturebook, no recipe": ("picturebook --recipe {here}/none.json", "none.json cannot be read as a recipe"),
    "picturebook, unknown key": ("picturebook --recipe {here}/key.json", r"\['training'\] is not among"),
    "picturebook, unwritable": ("picturebook --out {here}/file/out", "--out: .*/file/out cannot be written"),
    "sae, no recipe": ("sae --recipe {here}/none.json", "none.json cannot be read as a recipe"),
    "sae, broken recipe": ("sae --recipe {here}/broken.json", "broken.json cannot be read as a recipe"),
    "sae, a list": ("sae --recipe {here}/list.json", "is not a JSON object"),
    "sae, unknown key": ("sae --recipe {here}/key.json", r"Did you mean 'n_steps'\?"),
    "sae, missing key": ("sae --recipe {here}/missing.json", r"\['n_steps'\] is missing"),
    "sae, wrong type": ("sae --recipe {here}/type.json", "training: n_steps is 'many', not a whole number"),
    "sae, wrong value": ("sae --recipe {here}/value.json", "training: n_steps must be at least 1"),
    "sae, unknown model": ("sae --model pictrebook", r"There is no model 'pictrebook'.*Did you mean 'picturebook'\?"),
    "sae, unwritable": ("sae --out {here}/file/saes", "--out: .*/file/saes cannot be written"),
    "sae, unwritable run": ("sae --run-dir {here}/file/run", "--run-dir: .*/file/run cannot be written"),
    "sae, unknown tracker": (
        "sae --run-dir {here}/run --out {here}/out --trackers wanbd",
        "There is no tracker wanbd; there are .*wandb",
    ),
    "labels, no recipe": ("labels --recipe {here}/none.json", "none.json cannot be read as a recipe"),
    "labels, unknown model": ("labels --model {here}", r"is not a StableDiffusionPipeline folder"),
    "labels, no SAEs": ("labels --saes {here}/empty --run-dir {here}/run", "There is no SAE in .*Train some with"),
    "labels, odd batch": ("labels --batch 5 --run-dir {here}/run", "batch has to be even"),
    "labels, no number": ("labels --images many", "argument --images: invalid int value: 'many'"),
    "labels, no prompts": ("labels --prompts {here}/none.txt --run-dir {here}/run", "none.txt could not be read"),
    "labels, no segmenter": ("labels --segmenter {here}/empty --run-dir {here}/run", "empty"),
    "evaluate, unknown name": ("evaluate saes", "invalid choice: 'saes'"),
    "evaluate, unknown model": ("evaluate pid --model pictrebook --out {here}/out", "There is no model 'pictrebook'"),
    "evaluate, unknown part": ("evaluate pid --parts nope --out {here}/out", "There is no part 'nope'"),
    "evaluate, no SAEs": ("evaluate sae --saes {here}/empty --out {here}/out", "There is no SAE in"),
    "evaluate, unwritable": ("evaluate pid --out {here}/file/out", "--out: .*/file/out cannot be written"),
    "publish, no collection": ("publish me/saes --saes {here}/empty --dry-run", "lacks recipe or saes: train with"),
    "publish, no folder": ("publish me/saes --saes {here}/nowhere --dry-run", "nowhere"),
    "publish, no name": ("publish saes --dry-run", "saes"),
    "deploy-space, no name": ("deploy-space", "Name the Space, owner/name"),
    "deploy-space, unknown model": ("deploy-space --dry-run --model pictrebook", "There is no model 'pictrebook'"),
    "deploy-space, unwritable": ("deploy-space --dry-run --out {here}/file/space", "--out: .* cannot be written"),
    "benchmark, unknown part": ("benchmark attribtion", r"Did you mean 'attribution'\?"),
    "benchmark, unknown model": ("benchmark generation --model {here}/nowhere --out {here}/out", "There is no model"),
    "benchmark, unwritable": ("benchmark generation --out {here}/file/out", "--out: .* cannot be written"),
    **{
        f"{name}, unknown device": (f"{line} --device cuda9 --out {{here}}/out", "cuda9")
        for name, line in (("evaluate", "evaluate pid"), ("benchmark", "benchmark generation"))
    },
    "labels, unknown device": ("labels --device gpu --run-dir {here}/run", "gpu"),
}
TRAINING = {"n_steps": 4, "n_calibration_batches": 1}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    recipes = {
        "key": {"training": {**TRAINING, "n_stepz": 3}},
        "missing": {"training": {}},
        "type": {"training": {**TRAINING, "n_steps": "many"}},
        "value": {"training": {**TRAINING, "n_steps": 0}},
        "list": [1, 2],
    }
    for name, content in recipes.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    return tmp_path


def run(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which a command stops."""
    monkeypatch.setattr(sys, "argv", ["training", *line.split()])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_ends_in_one_message(
    case: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, message = WRONG[case]
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    said = run(line.format(here=here), monkeypatch, capsys)
    assert re.search(message, said), said
    assert ": error: " in said
    assert "Traceback" not in said


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(_: argparse.Namespace) -> None:
        dict(zip([1, 2], [1], strict=True))

    monkeypatch.setattr("training.hub.space.main", main)
    monkeypatch.setattr(sys, "argv", ["training", "deploy-space"])
    with pytest.raises(ValueError, match="shorter"):
        command_line.main()


def test_a_folder_in_use_and_a_full_disk_are_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with locked(tmp_path / "interpretable-diffusion" / "picturebook"):
        assert re.search(
            r"error: Another run is at work in .* give this one another", run("picturebook", monkeypatch, capsys)
        )

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/disk")

    monkeypatch.setattr("training.hub.space.stage", full)
    assert "error: [Errno 28] No space left on device: '/a/disk'" in run("deploy-space --dry-run", monkeypatch, capsys)


def test_help_of_all_commands_loads_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['training', '--help']; import training.__main__ as m\n"
    code += "try: m.main()\nexcept SystemExit: print([n for n in ('torch', 'numpy', 'accelerate') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert all(name in done.stdout for name in command_line.COMMANDS)


@pytest.mark.parametrize("name", ["sae", "labels", "deploy-space"])
def test_help_shows_the_fields_docstrings_and_every_default(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training", name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        command_line.main()
    said = " ".join(capsys.readouterr().out.split())
    for expected in {
        "sae": ("--checkpoint-interval-s", "Least seconds between checkpoints (default: 300)", "(default: ())"),
        "labels": ("--effect-images", "false discovery rate of 5 % (default: 20)", "(default: 120)", "--backgrounds"),
        "deploy-space": ("zero-a10g (ZeroGPU)", "(default: picturebook)", "(default: None)"),
    }[name]:
        assert expected in said
