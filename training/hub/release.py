"""The contents of a release: the files of its two repositories, validated before any request to the Hub."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from core.artifacts import MANIFEST, checksums, read_manifest
from core.concepts.gallery import COLUMNS, FOLDER, Gallery
from core.concepts.io import COUNTS, EXAMPLES, TABLE, read_counts, read_examples
from core.concepts.table import load_concepts
from core.errors import ArtifactError
from core.sae.autoencoder import SaeId
from core.sae.collection import INDEX, TABLES, Collection, find_collection, load_sae
from core.sae.io import CONFIG, read_json
from training.hub.cards import (
    CARD,
    MEASURED,
    SAE_FILES,
    TABLE_FILES,
    Line,
    concepts_card,
    example_of,
    manifest_text,
    sae_card,
)

Content = Path | bytes
"""The path of a local file, or the contents of a file."""

MARK = "<!-- Written by `python -m training publish`, which replaces it; without this line it is left as it is. -->"
"""Marks a card on the Hub that may be replaced."""


@dataclass(frozen=True)
class Release:
    """The files of a release, by their path in the repository."""

    saes_repo: str
    """Model repository `owner/name`."""
    tables_repo: str
    """Dataset repository `owner/name`; empty without tables."""
    saes: Mapping[str, Content]
    """The files of the model repository, except the index."""
    tables: Mapping[str, Content]
    """The files of the dataset repository."""
    index: Mapping[str, Any]
    """The index, without the key that names the tables."""
    example: SaeId
    """The SAE that is loaded as a check after publishing."""


def make_release(root: Path, saes_repo: str, tables_repo: str) -> Release:
    """The release of a collection.

    Raises:
        ValueError: Something is missing, damaged or inconsistent; the message lists all problems.
    """
    for repo in (saes_repo, tables_repo):
        if "/" not in repo:
            raise ValueError(f"{repo!r} is not the name of a repository: give owner/name.")
        validate_repo_id(repo)
    if saes_repo == tables_repo:
        raise ValueError(f"The SAEs and the tables cannot both be {saes_repo}: give --tables another name.")
    collection = find_collection(root)
    if problems := list(_problems(root, collection)):
        listed = "\n".join(f"- {problem}" for problem in dict.fromkeys(problems))
        raise ValueError(f"{root} cannot be published:\n{listed}")
    lines = read_manifest(root / MANIFEST)
    table_lines = [_part(line, TABLE_FILES if line["path"] != FOLDER else None) for line in lines]
    table_lines = [line for line in table_lines if line["files"]]
    tables_repo = tables_repo if len(table_lines) > 0 else ""
    sae_lines = [_part(line, SAE_FILES) for line in lines if line["path"] != FOLDER]
    measured = (root / CARD).read_text(encoding="utf-8").partition(f"{MEASURED}\n")[2].strip()
    saes: dict[str, Content] = {path: root / path for path in checksums(sae_lines)}
    saes[MANIFEST] = manifest_text(sae_lines).encode()
    saes[CARD] = _card(sae_card(collection, saes_repo, sae_lines, f"{measured}\n", tables_repo))
    tables: dict[str, Content] = {}
    if tables_repo:
        tables = {path: root / path for path in checksums(table_lines)}
        tables[MANIFEST] = manifest_text(table_lines).encode()
        tables[CARD] = _card(concepts_card(collection, saes_repo, tables_repo, table_lines))
    _check_front(saes)
    _check_front(tables)
    index = {name: value for name, value in collection.index.items() if name != TABLES}
    ids = [SaeId.parse(line["path"]) for line in sae_lines]
    return Release(saes_repo, tables_repo, saes, tables, index, example_of(ids))


def size_of(content: Content) -> int:
    """Size of a file in bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def bytes_of(content: Content) -> bytes:
    """Contents of a file."""
    return content if isinstance(content, bytes) else content.read_bytes()


def _card(text: str) -> bytes:
    """A card with the mark below its front matter."""
    return text.replace("\n---\n", f"\n---\n{MARK}\n", 1).encode()


def _part(line: Line, names: tuple[str, ...] | None) -> Line:
    """A line of a manifest, restricted to some of its files."""
    files = {name: digest for name, digest in line["files"].items() if names is None or name in names}
    if names == TABLE_FILES:
        return {"path": line["path"], "labelled_share": line["labelled_share"], "files": files}
    return {**line, "files": files}


def _problems(root: Path, collection: Collection) -> Iterator[str]:
    """The problems of a collection, as sentences."""
    try:
        index = collection.index
    except ArtifactError as error:
        yield str(error)
        return
    if not {"recipe", "saes"} <= set(index):
        yield f"{INDEX} lacks recipe or saes: train with `python -m training sae`."
        return
    listed, found = list(index["saes"]), sorted(p.parent.relative_to(root).as_posix() for p in root.rglob(CONFIG))
    yield from (f"{INDEX} lists {path}, which does not exist." for path in listed if path not in found)
    yield from (f"{path} exists, but {INDEX} does not list it." for path in found if path not in listed)
    valid = [sae_id.path for sae_id in collection.ids]
    yield from (f"{path} is not the folder of an SAE." for path in listed if path not in valid)
    yield from _own_paths(INDEX, index)
    if collection.files.find(CARD) is None or collection.files.find(MANIFEST) is None:
        yield f"There is no {CARD} or {MANIFEST}: {_remedy(root)}"
        return
    try:
        lines = {line["path"]: line for line in read_manifest(root / MANIFEST)}
    except ArtifactError as error:
        yield str(error)
        return
    with_tables = [sae_id for sae_id in collection.ids if (root / sae_id.path / TABLE).is_file()]
    for sae_id in collection.ids:
        if sae_id.path in found:
            yield from _problems_of(root, collection, sae_id, lines.get(sae_id.path, {}), bool(with_tables))
    if with_tables:
        yield from _problems_of_gallery(root, collection, lines.get(FOLDER, {}))


def _problems_of(root: Path, collection: Collection, sae_id: SaeId, line: Line, tables: bool) -> Iterator[str]:
    """The problems of one SAE or its table."""
    folder, listed = root / sae_id.path, line.get("files", {})
    there = [name for name in (*SAE_FILES, *TABLE_FILES) if (folder / name).is_file()]
    if sorted(listed) != sorted(there) or not line.get("metrics"):
        yield f"{MANIFEST} is out of date for {sae_id.path}: {_remedy(root)}"
    try:
        for name in there:
            collection.files.fetch(f"{sae_id.path}/{name}")
        sae = load_sae(collection, *sae_id)
        yield from _own_paths(f"{sae_id.path}/{CONFIG}", read_json(folder / CONFIG))
        if not tables:
            return
        table = load_concepts(collection, *sae_id)
        counts, examples = read_counts(folder / COUNTS), read_examples(folder / EXAMPLES)
        if counts.intersections.shape != (sae.cfg.d_sae, len(table.class_names)):
            yield f"{sae_id.path}/{COUNTS} belongs to another table: its counts are {list(counts.intersections.shape)}."
        if len(examples.images) != sae.cfg.d_sae or int(examples.images.max()) >= len(table.gallery):
            yield f"{sae_id.path}/{EXAMPLES} belongs to another table or gallery."
    except ArtifactError as error:
        yield str(error)


def _problems_of_gallery(root: Path, collection: Collection, line: Line) -> Iterator[str]:
    """The problems of the gallery."""
    there = sorted(path.name for path in (root / FOLDER).glob("*") if path.is_file())
    if sorted(line.get("files", {})) != there:
        yield f"{MANIFEST} is out of date for {FOLDER}: {_remedy(root)}"
    try:
        for name in there:
            collection.files.fetch(f"{FOLDER}/{name}")
        gallery = Gallery(collection.files.fetch)
        for number in range(0, len(gallery), COLUMNS * COLUMNS):
            gallery.image(number)
    except ArtifactError as error:
        yield str(error)


def _remedy(root: Path) -> str:
    return f"write it with `python -m training evaluate sae --card --saes {root}`."


def _own_paths(where: str, value: Any) -> Iterator[str]:
    """Complaints about absolute paths in a JSON value."""
    if isinstance(value, str) and re.match(r"(/|~|[A-Za-z]:\\)", value):
        yield f"{where} has a path of this computer, {value}, which means nothing elsewhere: use another name."
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _own_paths(where, inner)


def _check_front(files: Mapping[str, Content]) -> None:
    """Raise a `ValueError` for a card without valid front matter, or one that names tables which do not exist."""
    if not files:
        return
    card = RepoCard(bytes_of(files[CARD]).decode())  # raises a ValueError if its front matter is not YAML
    front = card.data.to_dict()  # type: ignore[no-untyped-call]
    lacking = [one["data_files"] for one in front.get("configs", []) if one["data_files"] not in files]
    if lacking or not front.get("license"):
        raise ValueError(f"The front matter of the card names {lacking or 'no license'}.")
