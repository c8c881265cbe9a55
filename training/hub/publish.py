"""`python -m training publish`: publish a collection of SAEs and its concept tables on the Hub.

Everything is validated before the first request, large files are uploaded before the first commit, and each of the two
repositories gets one commit: first the dataset with the tables and the gallery, then the model repository with the
SAEs, whose index names that commit of the dataset. So an interruption changes nothing for readers, and running the
command again resumes the upload. Afterwards the release is downloaded and loaded as a check.

The token is that of `hf auth login` or `HF_TOKEN`, and is handled by huggingface_hub alone.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Mapping
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

import core
from core.artifacts import HUB_ERRORS, MANIFEST, Files, RepoType, Source, checksums, read_manifest
from core.concepts.table import load_concepts
from core.sae.collection import INDEX, TABLES, find_collection, load_sae
from training.hub.cards import CARD, manifest_text
from training.hub.release import MARK, Content, Release, bytes_of, make_release, size_of

SAES = Path(core.__file__).parent / "picturebook" / "saes"

log = logging.getLogger(__name__)


class PublishError(RuntimeError):
    """The Hub could not be reached, or refused a request; the message says what has changed there."""


class Published(NamedTuple):
    """What is on the Hub after publishing."""

    saes: str
    """Commit of the model repository."""
    tables: str
    """Commit of the dataset repository; empty without tables."""
    changed: tuple[str, ...]
    """Repositories that got a new commit."""


class Target(NamedTuple):
    """A repository and its intended contents."""

    repo: str
    """Its name, `owner/name`."""
    kind: RepoType
    """`model` or `dataset`."""
    files: Mapping[str, Content]
    """Its files by path."""


class Change(NamedTuple):
    """The difference between a repository and its intended contents."""

    target: Target
    """The repository, without the card if the existing one was written by somebody else."""
    head: str
    """Its latest commit."""
    there: Mapping[str, RepoFile]
    """Its files at that commit."""
    additions: list[CommitOperationAdd]
    """New and changed files."""
    deletions: list[CommitOperationDelete]
    """Files of an earlier release that are no longer part of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("repo", help="model repository for the SAEs, owner/name")
    parser.add_argument("--saes", type=Path, default=SAES, help="folder of the collection")
    parser.add_argument("--tables", default=None, help="dataset repository for the tables; by default REPO-concepts")
    parser.add_argument("--private", action="store_true", help="make the repositories private")
    parser.add_argument("--dry-run", action="store_true", help="send no request; show the files and the cards")


def main(arguments: argparse.Namespace) -> None:
    """Validate and publish, or show what would be published."""
    try:
        release = make_release(arguments.saes, arguments.repo, arguments.tables or f"{arguments.repo}-concepts")
        if arguments.dry_run:
            print(preview(release))
            return
        if get_token() is None:
            raise SystemExit("There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
        done = publish(release, private=arguments.private)
    except (ValueError, PublishError) as error:
        raise SystemExit(str(error)) from error
    print(f"Published: {', '.join(done.changed) or 'nothing, everything was there already'}. To load it:")
    print(f'core.load_sae("{release.saes_repo}@{done.saes}", *{tuple(release.example)})')


def preview(release: Release) -> str:
    """The files with their sizes, and the cards, as text."""
    parts = []
    for target in _targets(release):
        files = {**target.files} | (_index_files(release, "<its commit>") if target.kind == "model" else {})
        total = sum(map(size_of, files.values()))
        parts.append(f"{target.kind} {target.repo}: {len(files)} files, {total:,} bytes")
        parts += [f"{size_of(content):12,}  {path}" for path, content in sorted(files.items())]
        parts += ["", bytes_of(files[CARD]).decode()]
    return "\n".join(parts)


def publish(release: Release, *, private: bool = False) -> Published:
    """Upload a release, then download and load it as a check.

    Raises:
        PublishError: The Hub could not be reached, refused a request, or does not hold what was sent; or a repository
            that should be private is public.
    """
    api = HfApi()
    state = "nothing has changed for readers"
    try:
        targets = _targets(release)
        for target in targets:
            _open(api, target, private)
        changes = {target.kind: _compare(api, target) for target in targets}
        for change in changes.values():
            _upload(api, change)
        tables = _commit(api, changes["dataset"]) if "dataset" in changes else ""
        if tables and changes["dataset"].head != tables:
            state = f"{release.tables_repo} has its new commit; {release.saes_repo} still names the old tables"
        index = _index_files(release, tables)
        changes["model"].additions.extend(_additions(index, changes["model"].there))
        saes = _commit(api, changes["model"])
        state = "both commits were made"
        _read_back(api, release, Published(saes, tables, ()), changes, index)
    except HUB_ERRORS as error:
        raise PublishError(
            f"{error}\nAs far as the Hub has answered, {state}. Run the same command again to continue."
        ) from error
    commits = {"dataset": tables, "model": saes}
    changed = tuple(change.target.repo for kind, change in changes.items() if change.head != commits[kind])
    return Published(saes, tables, changed)


def _targets(release: Release) -> list[Target]:
    """The repositories; the dataset first, because the index of the SAEs names its commit."""
    tables = [Target(release.tables_repo, "dataset", release.tables)] if release.tables_repo else []
    files = {path: file for path, file in release.saes.items() if path != MANIFEST}
    return [*tables, Target(release.saes_repo, "model", files)]


def _index_files(release: Release, commit: str) -> dict[str, Content]:
    """The index, which names the commit of the tables, and the manifest, which has the hash of the index."""
    index: dict[str, Any] = dict(release.index)
    if release.tables_repo:
        index[TABLES] = f"{release.tables_repo}@{commit}"
    text = (json.dumps(index, indent=2) + "\n").encode()
    line = {"path": "", "files": {INDEX: sha256(text).hexdigest()}}
    return {INDEX: text, MANIFEST: bytes_of(release.saes[MANIFEST]) + manifest_text([line]).encode()}


def _open(api: HfApi, target: Target, private: bool) -> None:
    """Create the repository if it does not exist."""
    try:
        info = api.repo_info(target.repo, repo_type=target.kind)
    except RepositoryNotFoundError:
        api.create_repo(target.repo, repo_type=target.kind, private=private or None)
        return
    if private and not info.private:
        raise PublishError(f"{target.repo} is public. Make it private on the Hub first, or leave out --private.")


def _compare(api: HfApi, target: Target) -> Change:
    """Compare a repository with its intended contents."""
    head = str(api.repo_info(target.repo, repo_type=target.kind).sha)
    there = _tree(api, target, head)
    with tempfile.TemporaryDirectory() as cache:
        now = Files(Source(target.repo, None, target.repo, head), target.kind, cache=Path(cache))
        card, manifest = (now.find(name) if name in there else None for name in (CARD, MANIFEST))
        earlier = [] if manifest is None else list(checksums(read_manifest(manifest)))
        if card is not None and MARK not in card.read_text(encoding="utf-8"):
            log.info("%s has a card of its own, which is kept", target.repo)
            target = target._replace(files={path: file for path, file in target.files.items() if path != CARD})
    stay = {*target.files, INDEX}
    deletions = [CommitOperationDelete(path) for path in earlier if path in there and path not in stay]
    return Change(target, head, there, _additions(target.files, there), deletions)


def _tree(api: HfApi, target: Target, commit: str) -> dict[str, RepoFile]:
    listed = api.list_repo_tree(target.repo, recursive=True, revision=commit, repo_type=target.kind)
    return {one.path: one for one in listed if isinstance(one, RepoFile)}


def _additions(files: Mapping[str, Content], there: Mapping[str, RepoFile]) -> list[CommitOperationAdd]:
    return [
        CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in files.items()
        if not _same(content, there.get(path))
    ]


def _same(content: Content, there: RepoFile | None) -> bool:
    """Whether the Hub has this file: it reports the sha256 of large files, and git's hash of others."""
    if there is None or there.size != size_of(content):
        return False
    data = bytes_of(content)
    if there.lfs is not None:
        return bool(there.lfs.sha256 == sha256(data).hexdigest())
    return bool(there.blob_id == sha1(b"blob %d\0" % len(data) + data).hexdigest())


def _upload(api: HfApi, change: Change) -> None:
    """Upload large files; they are not visible before a commit."""
    if change.additions:
        target = change.target
        log.info("%s: %d of %d files are new or changed", target.repo, len(change.additions), len(target.files))
        api.preupload_lfs_files(target.repo, change.additions, repo_type=target.kind, free_memory=False)


def _commit(api: HfApi, change: Change) -> str:
    """Commit a change, if there is any; returns the latest commit."""
    if not change.additions and not change.deletions:
        return change.head
    info = api.create_commit(
        change.target.repo,
        [*change.additions, *change.deletions],
        commit_message=f"Release of {len(change.target.files)} files",
        repo_type=change.target.kind,
        parent_commit=change.head,  # never overwrites what somebody else commits meanwhile
    )
    return str(info.oid)


def _read_back(
    api: HfApi, release: Release, done: Published, changes: Mapping[RepoType, Change], index: Mapping[str, Content]
) -> None:
    """Compare the hash of every file on the Hub, and load an SAE with its concepts into an empty cache."""
    for kind, change in changes.items():
        there = _tree(api, change.target, done.saes if kind == "model" else done.tables)
        wanted = {**change.target.files, **index} if kind == "model" else change.target.files
        if other := [path for path, content in wanted.items() if not _same(content, there.get(path))]:
            raise PublishError(f"{change.target.repo} does not hold what was sent: {', '.join(other)}.")
    with tempfile.TemporaryDirectory() as cache:
        collection = find_collection(f"{release.saes_repo}@{done.saes}", cache=Path(cache))
        load_sae(collection, *release.example)
        if release.tables_repo:
            load_concepts(collection, *release.example).gallery.image(0)
