"""The Space: what is staged, what is pushed, and that the staged folder starts and answers as it would there."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.repocard import metadata_load
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

from core.errors import ModelError
from core.spec import BUILT_IN
from training import __main__ as command_line
from training.benchmark.app import serve
from training.common.report import ROOT
from training.hub.space import SpaceConfig, described, preload, push, stage

FILES = [
    "README.md",
    "model_index.json",
    "safety_checker/model.fp16.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
    *(f"{part}/model{half}.safetensors" for part in ("unet", "vae", "text_encoder") for half in ("", ".fp16")),
    "unet/diffusion_pytorch_model.bin",
]
PROMPT = "a cat on the grass"


@dataclass
class Listed:
    filename: str


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: [Listed(name) for name in FILES])


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "staged"
    stage(folder, SpaceConfig())
    return folder


def test_the_staged_folder_has_the_app_and_nothing_of_training(staged: Path) -> None:
    assert sorted(path.name for path in staged.iterdir()) == [
        "LICENSE", "README.md", "app.args", "app.py", "core", "requirements.txt",
    ]  # fmt: skip
    assert (staged / "core/picturebook/model/unet/diffusion_pytorch_model.safetensors").stat().st_size > 10**6
    assert not list(staged.rglob("__pycache__"))
    assert "--model picturebook" in (staged / "app.args").read_text()
    assert re.search(r"[\d,]+  in \d+ files$", described(staged))
    with pytest.raises(ValueError, match="exists already"):
        stage(staged, SpaceConfig())


def test_its_readme_is_a_space_s(staged: Path) -> None:
    front: Any = metadata_load(staged / "README.md")
    assert front["sdk"] == "gradio"
    assert front["app_file"] == "app.py"
    assert front["python_version"] == "3.12"
    assert front["suggested_hardware"] == "zero-a10g"
    assert len(front["short_description"]) <= 60
    assert "preload_from_hub" not in front  # the embedded model needs none
    assert f"gradio=={front['sdk_version']}" in (staged / "requirements.txt").read_text()


def test_its_pins_are_what_the_engine_takes_and_what_zero_gpu_knows(staged: Path) -> None:
    pins = {}
    for line in (staged / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (only,) = requirement.specifier
            assert only.operator == "=="
            pins[requirement.name] = only.version
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        wanted = Requirement(line)
        assert pins[wanted.name] in wanted.specifier, line
    assert Version("2.8") <= Version(pins["torch"]) < Version("2.12")
    assert "spaces" in pins


@pytest.mark.usefixtures("hub")
def test_the_model_s_files_are_there_when_the_space_starts(tmp_path: Path) -> None:
    stage(tmp_path / "a", SpaceConfig("sd-v1-4", "some/saes@v1"))
    front: Any = metadata_load(tmp_path / "a" / "README.md")
    spec = BUILT_IN["sd-v1-4"]
    repo, files, revision = front["preload_from_hub"][0].split()
    assert (repo, revision) == (spec.source, spec.revision)
    assert "safety_checker" not in files
    assert sorted(name for name in files.split(",") if name.endswith((".safetensors", ".bin"))) == [
        f"{part}/model.fp16.safetensors" for part in ("text_encoder", "unet", "vae")
    ]
    assert {"model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"} <= set(files.split(","))
    assert front["models"] == [spec.source, "some/saes"]
    assert (tmp_path / "a" / "app.args").read_text().split()[2:] == ["--model", "sd-v1-4", "--saes", "some/saes@v1"]
    assert ".fp16." not in preload(spec, "cpu-basic")


def test_what_a_space_could_not_read_is_refused(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"cannot read your folder.*Push it"):
        stage(tmp_path / "a", SpaceConfig(str(model_folder)))
    with pytest.raises(ValueError, match="python -m training publish"):
        stage(tmp_path / "a", SpaceConfig(saes=str(model_folder)))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=r"CompVis/stable-diffusion-v1-4.*no network"):
        preload(BUILT_IN["sd-v1-4"], "zero-a10g")


def test_it_is_pushed_in_one_commit(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append(("create_repo", {"repo_id": repo_id, **options}))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload_folder", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push(staged, "me/space", SpaceConfig(), private=True) == "https://huggingface.co/spaces/me/space"
    (made, options), (sent, content) = calls
    assert (made, sent) == ("create_repo", "upload_folder")
    assert options["private"]
    assert options["exist_ok"]
    assert {options["repo_type"], content["repo_type"]} == {"space"}
    assert content["folder_path"] == staged
    assert content["delete_patterns"] == "*"


def test_nothing_is_pushed_without_a_name_or_on_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    monkeypatch.setattr(sys, "argv", ["training", "deploy-space"])
    with pytest.raises(SystemExit, match="2"):
        command_line.main()
    assert "--dry-run" in capsys.readouterr().err
    kept = tmp_path / "cached"
    monkeypatch.setattr(sys, "argv", ["training", "deploy-space", "--dry-run", "--out", str(kept)])
    command_line.main()
    shown = capsys.readouterr().out
    assert "sdk: gradio" in shown
    assert "core/picturebook/model/model_index.json" in shown
    assert (kept / "app.py").is_file()


# --- the staged folder, started ---------------------------------------------------------------------------------------


def drive(python: Path, folder: Path, env: Mapping[str, str]) -> None:
    """Start a staged Space, ask it for a image, its words and a concept, and look at what it says of itself."""
    from gradio_client import Client, handle_file

    whose = subprocess.run(
        [python, "-c", "import core; print(core.__file__)"], cwd=folder, env=env, capture_output=True, text=True
    )
    assert Path(whose.stdout.strip()) == folder / "core" / "__init__.py", whose.stderr
    with serve([str(python), "app.py"], folder, env) as app:
        app.wait_for_page()
        client = Client(app.url, verbose=False)
        image, settings = client.predict(prompt=PROMPT, seed=1, steps=6, guidance=4.0, api_name="/generate")
        path = image["path"] if isinstance(image, dict) else image
        assert Image.open(path).size == (128, 128)
        assert settings["model"] == "picturebook"
        bits = client.predict(
            image=handle_file(path), prompt=PROMPT, words="cat", given="rest", rel_error=0.9, seed=0,
            api_name="/attribute",
        )  # fmt: skip
        assert bits["words"] == ["cat"]
        assert bits["bits"][0] > 0
        hits = client.predict(query="cat", api_name="/concepts")["hits"]
        assert json.dumps(hits).count("cat") > 0
        assert app.logged_at("is ready after") is not None


@pytest.fixture
def space_env(tmp_path: Path) -> dict[str, str]:
    """What a Space's process finds, as far as it matters; no path of the checkout is in it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "SPACE_ID": "me/space", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_the_staged_folder_starts_and_answers(staged: Path, space_env: dict[str, str], tmp_path: Path) -> None:
    """With the present interpreter, on a Space that lends its GPU: its package `spaces` is a stand-in."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "spaces.py").write_text("def GPU(task, duration=None):\n    return task\n")
    drive(Path(sys.executable), staged, space_env | {"PYTHONPATH": str(tmp_path / "site"), "SPACES_ZERO_GPU": "true"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_staged_folder_starts_in_an_environment_of_its_own_requirements(
    staged: Path, space_env: dict[str, str], tmp_path: Path
) -> None:
    """As pinned, but for torch: the one that is here stands in, for the pinned one wants gigabytes of CUDA."""
    present = version("torch").partition("+")[0]
    lines = (staged / "requirements.txt").read_text().splitlines()
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("\n".join(f"torch=={present}" if line.startswith("torch==") else line for line in lines) + "\n")
    base = shutil.which("python3.12") or sys.executable
    if subprocess.run([base, "-c", ""], capture_output=True).returncode:  # a shim of pyenv with nothing behind it
        base = sys.executable
    subprocess.run([base, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", wanted], check=True)
    drive(python, staged, space_env)
