"""The files of an artifact: in this package, in a local folder, or on the Hub at a revision.

The same resolver serves models, sparse autoencoders, concept tables and galleries. Only requested files are downloaded,
all from one commit, and checked against the artifact's manifest. Only file types in `READ` are opened, none of which
can run code, and no path can leave the folder.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import _CACHED_NO_EXIST, HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
)

from core.errors import ArtifactError, ModelError
from core.hub import hub_answer
from core.pipeline_folder import check_configs, check_model_name, weights_of
from core.spec import BUILT_IN, ModelSpec

MANIFEST = "manifest.jsonl"
"""One JSON line per folder of the artifact: `path`, and under `files` the sha256 of each file by name."""
READ = (".json", ".jsonl", ".md", ".parquet", ".safetensors", ".webp")
"""Suffixes of the only files that are read."""

HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, ValueError, RuntimeError)
"""Errors that huggingface_hub may raise; the bases of its own are OSError and the base of its HTTP library's errors."""

RepoType = Literal["model", "dataset"]

MAX_DEPTH = 5
"""Levels of folders that are searched for files."""

_HUB_NAME = re.compile(r"(?P<id>\w[\w.\-]*/\w[\w.\-]*)(@(?P<revision>\w[\w.\-]*(/\w[\w.\-]*)*)?)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Source(NamedTuple):
    """What a name refers to."""

    name: str
    """What the user called it."""
    folder: Path | None
    """A local folder; None if it is on the Hub."""
    hub_id: str = ""
    """The repository, `owner/name`."""
    revision: str | None = None
    """Commit, tag or branch; None: the newest commit."""


class Files:
    """The files of an artifact, resolved on request."""

    source: Source
    """Where they are."""

    def __init__(self, source: Source, repo_type: RepoType = "model", *, cache: Path | None = None) -> None:
        """`cache` is the folder for downloads; None: the shared cache of huggingface_hub."""
        self.source, self._repo_type, self._cache = source, repo_type, cache
        self._revision = source.revision
        self._checked: set[str] = set()

    def fetch(self, name: str) -> Path:
        """The local path of a file, downloaded if need be.

        Raises:
            ArtifactError: It does not exist, cannot be downloaded, or does not match the manifest.
        """
        path = self.find(name)
        if path is None:
            raise ArtifactError(f"There is no {name} in {self.source.name}.")
        return path

    def find(self, name: str) -> Path | None:
        """The local path of a file, downloaded if need be; None if the artifact has no such file.

        Raises:
            ArtifactError: It cannot be downloaded, is of a type that is not read, or does not match the manifest.
        """
        check_name(name)
        path = self._find(name)
        if path is None or name in self._checked or name == MANIFEST:
            return path
        wanted = self._sums.get(name)
        if wanted and self.source.folder is None and file_sha256(path) != wanted:
            with suppress(ArtifactError):  # offline, the cached file is judged
                path = self._download(name, again=True) or path  # it was damaged in a download, perhaps long ago
        if wanted and (found := file_sha256(path)) != wanted:
            raise ArtifactError(
                f"{name} of {self.source.name} is not the file that {MANIFEST} lists (sha256 {found[:8]}, not "
                f"{wanted[:8]}): it was damaged or changed. Download it again or, if you changed it, delete {MANIFEST}."
            )
        self._checked.add(name)
        return path

    def fetch_again(self, name: str) -> Path | None:
        """The local path of a file, downloaded anew if it is from the Hub; None if there is no such file."""
        check_name(name)
        return self._find(name) if self.source.folder is not None else self._download(name, again=True)

    def names(self) -> list[str]:
        """Paths of all files: of a local folder at most `MAX_DEPTH` folders down, on the Hub at the commit in use.

        Without a connection, those of a repository that are in this computer's cache.

        Raises:
            ArtifactError: The Hub cannot be asked, and nothing is cached.
        """
        if self.source.folder is not None:
            return _names_in(self.source.folder)
        api = HfApi()
        ask = api.dataset_info if self._repo_type == "dataset" else api.model_info
        try:
            info = ask(self.source.hub_id, revision=self._revision)
        except HUB_ERRORS as error:
            try:
                cached = snapshot_download(
                    self.source.hub_id,
                    repo_type=self._repo_type,
                    revision=self._revision,
                    cache_dir=self._cache,
                    local_files_only=True,
                )
            except HUB_ERRORS:
                said = hub_answer(error, self.source.hub_id, self._revision)
                raise ArtifactError(
                    f"The files of {self.source.name} could not be listed on the Hub: {said}"
                ) from error
            return _names_in(Path(cached))
        self._revision = info.sha or self._revision
        return [one.rfilename for one in info.siblings or ()]

    @cached_property
    def _sums(self) -> dict[str, str]:
        """sha256 of the files in the manifest."""
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
                f"{hub_answer(error, self.source.hub_id, self._revision)}"
            ) from error
        except EntryNotFoundError:
            return None
        except HUB_ERRORS as error:
            said = hub_answer(error, self.source.hub_id, self._revision)
            raise ArtifactError(f"{name} could not be fetched from {self.source.name} on the Hub: {said}") from error
        if not self._is_pinned:
            # A branch may move between two downloads: from here on, all files are taken from the first one's commit.
            commit = path.parents[name.count("/")].name
            self._revision = commit if _COMMIT.fullmatch(commit) else self._revision
        return path

    @property
    def _is_pinned(self) -> bool:
        return _COMMIT.fullmatch(self._revision or "") is not None


def find_source(name: str | Path) -> Source | None:
    """The local folder, or the Hub repository `owner/name[@revision]`, of a name; None if it is neither."""
    text = str(name)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Source(text, folder)
    match = _HUB_NAME.fullmatch(text)
    return Source(text, None, match["id"], match["revision"]) if match and ".." not in text else None


def neither(what: str, name: str | Path, built_in: Iterable[str], remedy: str = "") -> str:
    """The error message for a name that refers to nothing; `what` begins the sentence."""
    known = list(built_in)
    if pickles_among([str(name)]):
        remedy += " A file of this kind is a pickle, which is never loaded, since it could run code."
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"{what} {str(name)!r}: it is neither built in ({', '.join(known)}), nor a folder, nor a Hub id "
        f"`owner/name[@revision]`.{remedy}{hint}"
    )


def find_model(name: str | Path) -> ModelSpec:
    """The spec behind a built-in name, a local folder, or `owner/name[@revision]` on the Hub.

    A local folder is checked, so that missing files are reported before anything slow happens.

    Raises:
        ModelError: No such model, or a folder without a complete pipeline in safetensors.
    """
    text = str(name)
    if text in BUILT_IN:
        spec = BUILT_IN[text]
        if not _HUB_NAME.fullmatch(spec.source):
            remedy = f"Make it with `python -m training {text}`, or load another: a folder or a Hub id."
            check_configs(Path(spec.source), f"The embedded model {text!r} does not exist yet. {remedy}")
        return spec
    if not Path(text).expanduser().is_dir():
        check_model_name(text)
    source = find_source(name)
    if source is None:
        raise ModelError(neither("There is no model", name, BUILT_IN))
    if source.folder is None:
        return ModelSpec(name=source.hub_id, source=source.hub_id, revision=source.revision)
    check_configs(source.folder)
    weights_of(source.folder)
    return ModelSpec(name=source.folder.resolve().name, source=str(source.folder))


def is_local(spec: ModelSpec) -> bool:
    """Whether the model's files are in a local folder."""
    return Path(spec.source).expanduser().is_dir()


def check_name(name: str) -> None:
    """Raise an `ArtifactError` for a name that leaves the artifact's folder, or a file type that is not read."""
    if any(sign in name for sign in "\\:%") or any(part in ("", ".", "..") for part in name.split("/")):
        raise ArtifactError(f"{name!r} is refused: it is outside the artifact's folder.")
    if not name.endswith(READ):
        raise ArtifactError(
            f"{name!r} is refused: only {', '.join(READ)} are read, never a pickle, which can run code."
        )


def check_inside(folder: Path, path: Path) -> None:
    """Raise an `ArtifactError` for a file that a link takes out of its folder."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]  # in the Hub's cache, snapshots are links into the folder next to them
    if not path.resolve().is_relative_to(root):
        raise ArtifactError(f"{path} is refused: it is a link out of {folder}.")


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The lines of a manifest, as JSON objects.

    Raises:
        ArtifactError: The file is damaged.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not all(isinstance(line["path"], str) and isinstance(line.get("files", {}), dict) for line in lines):
            raise ValueError("a path or files have the wrong type")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Download it again.") from error
    return lines


def checksums(lines: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """sha256 of each file in a manifest, by its path from the root; an empty `path` is the root itself."""
    return {
        f"{line['path']}/{name}".removeprefix("/"): str(digest)
        for line in lines
        for name, digest in line.get("files", {}).items()
    }


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pickles_among(names: Iterable[str]) -> list[str]:
    """The names with the suffix of a pickle."""
    return [name for name in names if name.lower().endswith(_PICKLES)]


def _names_in(folder: Path) -> list[str]:
    names = []
    for path, folders, files in os.walk(folder):
        below = Path(path).relative_to(folder)
        folders[:] = [] if len(below.parts) >= MAX_DEPTH else sorted(one for one in folders if not one.startswith("."))
        names += [(below / name).as_posix() for name in files]
    return sorted(names)
