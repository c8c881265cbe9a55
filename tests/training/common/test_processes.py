import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import core
from core.sae.collection import list_saes
from tests.training.sae.test_command import arguments
from training import __main__ as command_line
from training.common import processes
from training.common.processes import joined_accelerator
from training.common.run_lock import FolderInUseError, locked
from training.labels import command as labels
from training.labels.command import PACKAGE
from training.labels.labeller import LabelRun
from training.sae.command import main

ROOT = Path(__file__).parents[3]


# --- joining ----------------------------------------------------------------------------------------------------------


def make(
    monkeypatch: pytest.MonkeyPatch, *, world: int, n_gpus: int = 0, on_device: bool = False, joined: int | None = None
) -> dict[str, Any]:
    """What accelerate is asked for by one of `world` processes on such a machine; it joins `joined` of them."""
    asked: dict[str, Any] = {}

    def fake(**options: Any) -> SimpleNamespace:
        asked.update(options)
        device = SimpleNamespace(type="cpu" if options["cpu"] or not on_device else "cuda")
        return SimpleNamespace(num_processes=world if joined is None else joined, device=device)

    monkeypatch.setattr(processes, "Accelerator", fake)
    monkeypatch.setattr(processes, "_joins_on_device", lambda: on_device)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: n_gpus)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(world))
    joined_accelerator(mixed_precision="bf16")
    return asked


def test_several_processes_are_joined_on_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert make(monkeypatch, world=2) == {"cpu": True, "mixed_precision": "bf16"}
    assert make(monkeypatch, world=1)["cpu"] is False  # one process takes what there is
    assert make(monkeypatch, world=2, n_gpus=2, on_device=True)["cpu"] is False
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert make(monkeypatch, world=4, n_gpus=2, on_device=True)["cpu"] is True
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # as `accelerate launch` writes it
    assert make(monkeypatch, world=2, n_gpus=2, on_device=True)["cpu"] is False


def test_processes_that_would_each_train_the_whole_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(
        ValueError, match=r"2 processes were started, .* the whole work by itself. Start one, or set ACC"
    ):
        make(monkeypatch, world=2, joined=1)
    with pytest.raises(ValueError, match=r"4 processes were started for 2 GPUs.*Start 2, or set ACCELERATE_USE_CPU=1"):
        make(monkeypatch, world=4, n_gpus=2, on_device=True)


def test_a_command_that_does_not_share_its_work_is_not_started_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["training", "benchmark"])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    assert "2 processes were started, each of which would do all of 'benchmark'" in capsys.readouterr().err


def test_labels_splits_the_images_among_the_processes_that_were_started(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    joined = SimpleNamespace(
        process_index=1,
        num_processes=2,
        device="cpu",
        wait_for_everyone=lambda: waits.append("waited"),
        destroy_process_group=lambda: waits.append("ended"),
    )
    runs: list[Any] = []

    def label_collection(*given: Any) -> None:
        runs.append(given[5])
        given[7]()

    monkeypatch.setattr(labels, "joined_processes", lambda: joined)
    monkeypatch.setattr(labels, "label_collection", label_collection)
    (tmp_path / "prompts.txt").write_text("a cat on the moon\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = {"model": model_folder, "prompts": tmp_path / "prompts.txt", "segmenter": PACKAGE / "segmenter"}
    words = [word for name, path in options.items() for word in (f"--{name}", str(path))]
    monkeypatch.setattr(sys, "argv", ["training", "labels", *words, "--run-dir", str(tmp_path / "labels")])
    command_line.main()
    assert runs == [LabelRun(tmp_path / "labels", 120, rank=1, world=2)]
    assert waits == ["waited", "ended"]


# --- one run a folder -------------------------------------------------------------------------------------------------

_HOLD = "import sys, time; from pathlib import Path; from training.common.run_lock import locked\n"
_HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(200)"


def test_two_runs_do_not_share_a_folder_and_a_killed_one_leaves_it_free(tmp_path: Path, model_folder: Path) -> None:
    asked = arguments(tmp_path, model_folder)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(asked.run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=r"Another run is at work in .*run. Wait .* give this one another"):
            main(asked)
        assert [path.name for path in asked.run_dir.iterdir()] == ["lock"]
        assert not asked.out.exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    main(asked)
    assert (asked.run_dir / "checkpoint" / "state.json").exists()
    with locked(asked.run_dir):  # and a run that has ended, too
        pass


def test_a_file_system_without_locks_is_told_and_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path / "run"):
        assert "cannot be locked (no locks available)" in caplog.text


# --- the README's lines -----------------------------------------------------------------------------------------------


def start(line: str, n: int, *options: str) -> None:
    """Run a line that the documents give, with `n` processes, as a user has it."""
    documents = [(ROOT / name).read_text() for name in ("README.md", "training/README.md") if (ROOT / name).exists()]
    pattern = re.escape(line).replace("N", r"(N|\d+)")
    assert any(re.search(pattern, text) for text in documents), line
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # With torchrun's port free, and nothing that tells accelerate of CPUs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(port)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = [*shlex.split(re.sub(r"\bN\b", str(n), line)), *options]
    done = subprocess.run(
        words, cwd=ROOT, timeout=280, check=False, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout.decode()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "n"), [("torchrun --nproc_per_node N -m training sae", 2), ("accelerate launch -m training sae", 1)]
)
def test_the_documented_line_trains_one_run(tmp_path: Path, model_folder: Path, line: str, n: int) -> None:
    asked = arguments(tmp_path, model_folder)
    start(line, n, "--recipe", str(asked.recipe), "--run-dir", str(asked.run_dir), "--out", str(asked.out))
    state = json.loads((asked.run_dir / "checkpoint" / "state.json").read_text())
    assert (state["step"], state["recipe"]["n_processes"]) == (4, n)
    logged = [json.loads(text)["step"] for text in (asked.run_dir / "log.jsonl").read_text().splitlines()]
    assert logged == [2, 4]  # by one process
    assert len(list(asked.out.rglob("*.safetensors"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "n"), [("torchrun --nproc_per_node N -m training labels", 2), ("accelerate launch -m training labels", 1)]
)
def test_the_documented_line_labels_a_collection_once(tmp_path: Path, model_folder: Path, line: str, n: int) -> None:
    asked = arguments(tmp_path, model_folder)
    main(asked)
    start(
        *(line, n, "--model", str(model_folder), "--saes", str(asked.out), "--prompts", str(tmp_path / "prompts.txt")),
        *("--segmenter", str(PACKAGE / "segmenter"), "--styles", "red", "--run-dir", str(tmp_path / "labels")),
        *["--images", "8", "--batch", "4", "--permutations", "3", "--gallery", "2", "--effect-images", "2"],
    )
    counts = [tmp_path / "labels" / f"{rank}-of-{n}" / "checkpoint" / "state.json" for rank in range(n)]
    assert [json.loads(path.read_text())["step"] for path in counts] == [2 // n] * n  # each its share of two batches
    for sae_id in list_saes(asked.out):
        assert core.load_concepts(asked.out, *sae_id).info.made_with["n_images"] == 8
