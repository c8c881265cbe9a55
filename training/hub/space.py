"""`python -m training deploy-space`: deploy the app to a Hugging Face Space, in one commit.

The Space is first assembled in a folder: the app, `core`, and the files of `space_config`, without training and tests.
The token is that of `hf auth login` or `HF_TOKEN`.
"""

import argparse
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from core.artifacts import find_model, is_local
from core.diffusion.loading import needed_files
from core.errors import ModelError
from core.spec import BUILT_IN, ModelSpec
from training.common.options import add_field_options, field_values
from training.common.report import ROOT

README, REQUIREMENTS, ARGUMENTS = "README.md", "requirements.txt", "app.args"
OPTIONS = ("model", "saes", "hardware")
"""Fields of `SpaceConfig` that are options of the command."""
HARDWARE = "zero-a10g"
"""The Hub's name for ZeroGPU."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpaceConfig:
    """Model, autoencoders and hardware of a Space."""

    model: str = "picturebook"
    """Built-in name, or `owner/name[@revision]`."""
    saes: str | None = None
    """Autoencoders with concept tables, `owner/name[@revision]`; None: the model's own."""
    hardware: str = HARDWARE
    """The Hub's name of the hardware: zero-a10g (ZeroGPU), t4-small, l4x1..., or cpu-basic."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("repo", nargs="?", help="the Space, owner/name; created if it does not exist")
    add_field_options(parser, SpaceConfig, OPTIONS)
    parser.add_argument("--private", action="store_true", help="if the Space is created, make it private")
    parser.add_argument("--out", type=Path, default=None, help="new folder to assemble it in, which is kept")
    parser.add_argument("--dry-run", action="store_true", help="assemble it and show what is in it, without pushing")


def main(arguments: argparse.Namespace) -> None:
    """Assemble the Space, and push it unless this is a dry run."""
    config = SpaceConfig(**field_values(arguments, OPTIONS))
    if not arguments.repo and not arguments.dry_run:
        raise SystemExit("Name the Space, owner/name, or see with --dry-run what would be pushed.")
    with TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary) / "space"
        stage(folder, config)
        print(described(folder))
        if not arguments.dry_run:
            print(push(folder, arguments.repo, config, private=arguments.private))


def stage(folder: Path, config: SpaceConfig) -> None:
    """Assemble a Space in a new folder.

    Raises:
        ValueError: The folder exists, this is not a checkout, or the Space could not read its model or SAEs.
    """
    if not (ROOT / "app.py").is_file():
        raise ValueError(f"There is no app.py in {ROOT}: a Space is assembled from a checkout.")
    if folder.exists():
        raise ValueError(f"{folder} exists already: name a new folder.")
    spec = find_model(config.model)
    if config.model not in BUILT_IN and is_local(spec):
        raise ValueError(f"A Space cannot read your folder {config.model}. Push it to the Hub and give its name there.")
    if config.saes is not None and Path(config.saes).expanduser().exists():
        raise ValueError(f"A Space cannot read your folder {config.saes}. Publish it: `python -m training publish`.")
    folder.mkdir(parents=True)
    for name in ("app.py", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "core", folder / "core", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "space_config" / REQUIREMENTS, folder / REQUIREMENTS)
    options = ["--host 0.0.0.0", f"--model {config.model}", *([f"--saes {config.saes}"] if config.saes else ())]
    (folder / ARGUMENTS).write_text("\n".join(options) + "\n", encoding="utf-8")
    _write_readme(folder / README, config, spec)


def _write_readme(path: Path, config: SpaceConfig, spec: ModelSpec) -> None:
    from huggingface_hub.repocard import metadata_load, metadata_save

    shutil.copy(ROOT / "space_config" / README, path)
    front: dict[str, Any] = metadata_load(path) or {}
    front["suggested_hardware"] = config.hardware
    if not is_local(spec):
        front["models"] = [spec.source]
        front["preload_from_hub"] = [preload(spec, config.hardware)]
    if config.saes:
        front["models"] = [*front.get("models", ()), config.saes.partition("@")[0]]
    metadata_save(path, front)


def preload(spec: ModelSpec, hardware: str) -> str:
    """The `preload_from_hub` entry that puts a model's files into the Space's cache: repository, files, revision.

    Raises:
        ModelError: The Hub could not be asked for the list of files.
    """
    from huggingface_hub import snapshot_download

    try:
        listed = snapshot_download(spec.source, revision=spec.revision, dry_run=True)
    except OSError as error:
        raise ModelError(
            f"The Hub could not be asked for the files of {spec.source}, which the Space needs: {error}"
        ) from error
    files = needed_files([file.filename for file in listed], half=not hardware.startswith("cpu"))
    return " ".join([spec.source, ",".join(files), *([spec.revision] if spec.revision else ())])


def described(folder: Path) -> str:
    """Description of a staged Space: the front matter of its README, and its files with their sizes."""
    front = (folder / README).read_text(encoding="utf-8").split("---")[1].strip()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    lines = [f"{path.stat().st_size:>12,}  {path.relative_to(folder).as_posix()}" for path in files]
    return "\n".join([front, "", *lines, f"{size:>12,}  in {len(files)} files"])


def push(folder: Path, repo: str, config: SpaceConfig, *, private: bool = False) -> str:
    """Create the Space if need be and replace its contents by the folder, in one commit; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    # The README only suggests hardware, because an existing Space may have been given another.
    api.create_repo(repo, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        repo_type="space",
        folder_path=folder,
        commit_message=f"Interpretable Diffusion with {config.model}",
        delete_patterns="*",  # files of former versions
    )
    log.info("pushed %s", repo)
    return f"https://huggingface.co/spaces/{repo}"
