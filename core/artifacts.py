"""Where an artifact's files are: embedded in this package, in a local folder, or on the Hub at a revision.

One resolver for models, sparse autoencoders, concept tables and galleries. Only the files that are asked for are
fetched, all of one commit; what the artifact's manifest lists is checked against it. Only the forms in `READ` are
opened, of which none runs code, and no path leaves the folder.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from core.errors import ArtifactError, ModelError
from core.spec import BUILT_IN, ModelSpec

WEIGHTS = ("unet", "vae", "text_encoder")
"""Components of a StableDiffusionPipeline folder that have weights we use."""
MANIFEST = "manifest.jsonl"
"""A line a folder of the artifact: `path`, and under `files` the sha256 of each of its files by name."""
READ = (".json", ".jsonl", ".md", ".parquet", ".safetensors", ".webp")
"""Endings of the files that are read at all."""

HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, ValueError, RuntimeError)
"""What huggingface_hub may raise; its own error's bases are OSError and that of all errors of its HTTP library."""

RepoType = Literal["model", "dataset"]

_HUB_NAME = re.compile(r"(?P<id>\w[\w.\-]*/\w[\w.\-]*)(@(?P<revision>\w[\w.\-]*(/\w[\w.\-]*)*)?)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Source(NamedTuple):
    """A place that a name stands for."""

    name: str
    """What the user called it."""
    folder: Path | None
    """A folder on this disk; None: on the Hub."""
    hub_id: str = ""
    """Of the repository, `owner/name`."""
    revision: str | None = None
    """Commit, tag or branch; None: the newest."""


class Files:
    """The files of an artifact, found when they are asked for."""

    source: Source
    """Where they are."""

    def __init__(self, source: Source, repo_type: RepoType = "model", *, cache: Path | None = None) -> None:
        """`cache` is the folder for what is fetched; None: the one that all programs of this user share."""
        self.source, self._repo_type, self._cache = source, repo_type, cache
        self._revision = source.revision
        self._checked: set[str] = set()

    def fetch(self, name: str) -> Path:
        """Where a file is on this disk, after it was fetched if need be.

        Raises:
            ArtifactError: There is none, or it cannot be had, or it is not what the manifest says.
        """
        path = self.find(name)
        if path is None:
            raise ArtifactError(f"There is no {name} in {self.source.name}.")
        return path

    def find(self, name: str) -> Path | None:
        """The same; None if the artifact has no such file.

        Raises:
            ArtifactError: It cannot be had, or not be asked for, or it is not what the manifest says.
        """
        check_name(name)
        path = self._find(name)
        if path is None or name in self._checked or name == MANIFEST:
            return path
        wanted = self._sums.get(name)
        if wanted and self.source.folder is None and file_sha256(path) != wanted:
            with suppress(ArtifactError):  # offline, what is there is judged
                path = self._download(name, again=True) or path  # damaged on its way, perhaps long ago
        if wanted and (found := file_sha256(path)) != wanted:
            raise ArtifactError(
                f"{name} of {self.source.name} is not the file that {MANIFEST} lists (sha256 {found[:8]}, not "
                f"{wanted[:8]}): it was damaged or changed. Get it again, or, if you changed it, delete {MANIFEST}."
            )
        self._checked.add(name)
        return path

    @cached_property
    def _sums(self) -> dict[str, str]:
        """sha256 of the files that the manifest lists."""
        path = self.find(MANIFEST)
        return {} if path is None else checksums(read_manifest(path))

    def _find(self, name: str) -> Path | None:
        if self.source.folder is None:
            return self._download(name)
        path = self.source.folder / name
        if not path.is_file():
            return None
        check_inside(self.source.folder, path)
        return path

    def _download(self, name: str, *, again: bool = False) -> Path | None:
        where: dict[str, Any] = {"repo_id": self.source.hub_id, "filename": name, "repo_type": self._repo_type}
        where |= {"revision": self._revision, "cache_dir": self._cache}

        def known_to_be_absent() -> bool:
            return try_to_load_from_cache(**where) is _CACHED_NO_EXIST

        if self._is_pinned and known_to_be_absent():
            return None
        try:
            path = Path(hf_hub_download(**where, force_download=again))
        except LocalEntryNotFoundError as error:
            if known_to_be_absent():
                return None
            raise ArtifactError(
                f"{name} of {self.source.name} is not in this computer's cache and could not be fetched from the Hub: "
                f"{error.__cause__ or error}"
            ) from error
        except EntryNotFoundError:
            return None
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ArtifactError(
                f"There is no {self.source.name} on the Hub, or it is not open to you (`hf auth login`): check the "
                f"name and revision."
            ) from error
        except HUB_ERRORS as error:
            raise ArtifactError(f"{name} could not be fetched from {self.source.name} on the Hub: {error}") from error
        if not self._is_pinned:
            # A branch may move between two files: from here on all are of the commit that the first was of.
            commit = path.parents[name.count("/")].name
            self._revision = commit if _COMMIT.fullmatch(commit) else self._revision
        return path

    @property
    def _is_pinned(self) -> bool:
        return _COMMIT.fullmatch(self._revision or "") is not None


def find_source(name: str | Path) -> Source | None:
    """The local folder, or the repository `owner/name[@revision]` on the Hub, of a name; None if it is neither."""
    text = str(name)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Source(text, folder)
    match = _HUB_NAME.fullmatch(text)
    return Source(text, None, match["id"], match["revision"]) if match and ".." not in text else None


def neither(what: str, name: str | Path, built_in: Iterable[str], remedy: str = "") -> str:
    """What to say of a name that stands for nothing; `what` begins the sentence."""
    known = list(built_in)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"{what} {str(name)!r}: it is neither built in ({', '.join(known)}), nor a folder, nor a Hub id "
        f"`owner/name[@revision]`.{remedy}{hint}"
    )


def find_model(name: str | Path) -> ModelSpec:
    """The spec behind a built-in name, a local folder, or `owner/name[@revision]` on the Hub.

    A local folder is checked here, so that what is missing is said before anything slow happens.
    """
    text = str(name)
    if text in BUILT_IN:
        spec = BUILT_IN[text]
        if not _HUB_NAME.fullmatch(spec.source):
            remedy = f"Make it with `python -m training {text}`, or load another: a folder or a Hub id."
            _check_model(Path(spec.source), f"The embedded model {text!r} is not there yet. {remedy}")
        return spec
    source = find_source(name)
    if source is None:
        raise ModelError(neither("There is no model", name, BUILT_IN))
    if source.folder is None:
        return ModelSpec(name=source.hub_id, source=source.hub_id, revision=source.revision)
    _check_model(source.folder, f"{source.folder} is no StableDiffusionPipeline folder.")
    return ModelSpec(name=source.folder.resolve().name, source=str(source.folder))


def is_local(spec: ModelSpec) -> bool:
    """Whether the model's files are on this disk."""
    return Path(spec.source).expanduser().is_dir()


def check_name(name: str) -> None:
    """Refuse a file's name that leaves its artifact's folder, or that has a form which is not read."""
    if "\\" in name or ":" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ArtifactError(f"{name!r} is refused: it leaves the artifact's folder.")
    if not name.endswith(READ):
        raise ArtifactError(f"{name!r} is refused: only {', '.join(READ)} are read, never a pickle, which runs code.")


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a file of a folder that a link leads out of it."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]  # the Hub's cache: its snapshots are links into the folder beside them
    if not path.resolve().is_relative_to(root):
        raise ArtifactError(f"{path} is refused: it is a link that leaves {folder}.")


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The lines of a manifest.

    Raises:
        ArtifactError: It is damaged.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not all(isinstance(line["path"], str) and isinstance(line.get("files", {}), dict) for line in lines):
            raise ValueError("a path or files are of another kind")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Get it again.") from error
    return lines


def checksums(lines: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """sha256 of each file that a manifest lists, by its path under the root."""
    return {f"{line['path']}/{name}": str(digest) for line in lines for name, digest in line.get("files", {}).items()}


def file_sha256(path: Path) -> str:
    """Hash of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pickles_among(names: Iterable[str]) -> list[str]:
    """Those that are pickles by their ending."""
    return [name for name in names if name.endswith(_PICKLES)]


def _check_model(folder: Path, otherwise: str) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"{otherwise} (There is no {index}.)")
    try:
        components = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{index} is not JSON ({error}). Save the pipeline again.") from error
    for component in ("tokenizer", "scheduler", *WEIGHTS):
        if component not in components or not (folder / component).is_dir():
            raise ModelError(
                f"{folder} has no {component!r}, which a StableDiffusionPipeline needs. Save the whole pipeline "
                f"with `pipeline.save_pretrained(folder)`."
            )
    for component in WEIGHTS:
        files = [path.name for path in (folder / component).iterdir()]
        if not any(name.endswith(".safetensors") for name in files):
            pickles = pickles_among(files)
            found = f"only {pickles[0]}, a pickle, which could run code on loading" if pickles else "no weights"
            raise ModelError(
                f"{folder / component} has {found}. Save the pipeline as safetensors with "
                f"`pipeline.save_pretrained(folder, safe_serialization=True)`."
            )
