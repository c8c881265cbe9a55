"""Collections of SAEs: in this package, in a local folder, or on the Hub at a revision.

A collection has one folder per SAE, `SaeId.path`, and a `config.json` at its root that lists them under `saes`. Concept
tables and the gallery are in the same folders, or in a dataset repository on the Hub, which `tables` names. Collections
of other libraries have folders of their own (`core.sae.layouts`); their tables are in `SaeId.path` all the same.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from core.artifacts import Files, Source, find_source, neither, pickles_among
from core.diffusion.sampling import Branch
from core.errors import ArtifactError
from core.files import write_text
from core.sae.autoencoder import AllTimes, SaeId, SparseAutoencoder
from core.sae.io import CONFIG, SPARSIFY_WEIGHTS, WEIGHTS, read_json, read_sae
from core.sae.layouts import find_saes
from core.spec import BUILT_IN, default_hookpoint

INDEX = "config.json"
"""The index of a collection."""
TABLES = "tables"
"""Key in the index: the dataset repository with the concept tables, `owner/name@revision`."""
MADE_FOR = "weights"
"""Key in the index: digest of the weights of the model that the SAEs were trained on (`core.sae.trained`)."""
LABELLED = "labelled"
"""Key in the index: true once `python -m training labels` has written all tables and examples."""
EMBEDDED = {name: spec.assets / "saes" for name, spec in BUILT_IN.items() if spec.assets is not None}
"""Collections in this package, by the name of their model."""


class Collection:
    """The SAEs of one model, and their concept tables."""

    files: Files
    """The files of the SAEs."""

    def __init__(self, files: Files, *, cache: Path | None = None) -> None:
        """`cache` is the folder for downloaded tables, as for `Files`."""
        self.files, self._cache = files, cache

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.files.source.name

    @cached_property
    def index(self) -> dict[str, Any]:
        """Contents of the index; empty if there is none."""
        path = self.files.find(INDEX)
        try:
            return {} if path is None else read_json(path)
        except ArtifactError:  # it was damaged in a download, perhaps long ago
            again = self.files.fetch_again(INDEX)
            return {} if again is None else read_json(again)

    @cached_property
    def folders(self) -> dict[SaeId, str]:
        """Its SAEs with their folders: those in the index or, without one, those whose folders exist."""
        listed = self.index.get("saes")
        if isinstance(listed, list):
            return {sae_id: sae_id.path for sae_id in _ids(listed)}
        root = self.files.source.folder
        name = self.files.source.hub_id.split("/")[-1] if root is None else root.resolve().name
        return find_saes(self.files.names(), lambda name: read_json(self.files.fetch(name)), name)

    @property
    def ids(self) -> list[SaeId]:
        """Its SAEs."""
        return list(self.folders)

    def folder_of(self, sae_id: SaeId) -> str:
        """The folder of an SAE, which may not exist."""
        return self.folders.get(sae_id, sae_id.path)

    @property
    def default_hookpoint(self) -> str:
        """The hookpoint to use where none is named, as in `ModelSpec`; empty where there are no SAEs."""
        return default_hookpoint([*dict.fromkeys(sae_id.hookpoint for sae_id in self.ids)])

    @cached_property
    def tables(self) -> Files:
        """The files of its concept tables and gallery.

        Raises:
            ArtifactError: The index does not name a dataset on the Hub.
        """
        name, folder = self.index.get(TABLES), self.files.source.folder
        if name is None or (folder is not None and any(folder.glob("*/*/*/*.parquet"))):
            return self.files
        source = find_source(name) if isinstance(name, str) else None
        if source is None or source.folder is not None:
            raise ArtifactError(f"The {INDEX} of {self.name} names {name!r} as its tables: no dataset on the Hub.")
        return Files(source, "dataset", cache=self._cache)

    def missing(self, sae_id: SaeId) -> str:
        """The error message for an SAE that it does not have."""
        if not self.ids:
            if pickles := pickles_among(self.files.names()):
                return f"{self.name} has no SAEs that can be read, only {_is_pickle(pickles[0])}"
            return (
                f"{self.name} has no SAEs: an SAE is a folder <hookpoint>/<cond|uncond>/t<time|all> with "
                f"{CONFIG} in it, or one of SAELens or sparsify."
            )
        paths = [other.path for other in self.ids]
        near = difflib.get_close_matches(sae_id.path, paths, n=1, cutoff=0)[0]
        return f"{self.name} has no SAE {sae_id.path}. Did you mean {near}? All of them: {', '.join(paths)}."


def find_collection(source: "str | Path | Collection", *, cache: Path | None = None) -> Collection:
    """The collection of a built-in name, a local folder, or `owner/name[@revision]` on the Hub.

    Raises:
        ArtifactError: The name is none of these, or the built-in collection was not made yet.
    """
    if isinstance(source, Collection):
        return source
    text = str(source)
    if text in EMBEDDED:
        if not EMBEDDED[text].is_dir():
            raise ArtifactError(f"The SAEs of {text!r} do not exist yet. Make them with `python -m training sae`.")
        return Collection(Files(Source(text, EMBEDDED[text])))
    found = find_source(source)
    if found is None and pickles_among([text]):
        raise ArtifactError(f"{text!r} has no SAEs that can be read: it is {_is_pickle('')}")
    if found is None:
        trained = " This package has no SAEs of that model: train some with `python -m training sae`."
        raise ArtifactError(neither("There are no SAEs", text, EMBEDDED, trained if text in BUILT_IN else ""))
    return Collection(Files(found, cache=cache), cache=cache)


def load_sae(
    source: str | Path | Collection,
    hookpoint: str,
    branch: Branch,
    t: float | AllTimes = "all",
    *,
    device: torch.device | str = "cpu",
) -> SparseAutoencoder:
    """Load the SAE for a hookpoint, branch and time.

    Args:
        source: A built-in model's name, a local folder, or `owner/name[@revision]` on the Hub, from which only the
            files of this SAE are downloaded.
        hookpoint: Dotted module name of the block.
        branch: `cond` or `uncond`.
        t: Normalised time of the sampler's step, or `all` for the SAE shared by every step.
        device: The device to load it to.

    Raises:
        ArtifactError: There is no such SAE (the message lists those that exist), or its files cannot be read.
    """
    collection, sae_id = find_collection(source), SaeId(hookpoint, branch, t)
    _ = collection.index  # first: the Hub counts downloads by it, and its commit is that of all other files
    folder = collection.folder_of(sae_id)
    config = collection.files.find(_inside(folder, CONFIG))
    if config is None:
        raise ArtifactError(collection.missing(sae_id))
    is_saelens = "architecture" in (values := read_json(config))
    weights = WEIGHTS if is_saelens else SPARSIFY_WEIGHTS
    if collection.files.find(_inside(folder, weights)) is None:
        pickles = pickles_among(name for name in collection.files.names() if name.startswith(_inside(folder, "")))
        instead = f", only {_is_pickle(pickles[0])}" if pickles else "."
        raise ArtifactError(f"{collection.name} has no {weights} in the folder {folder or '.'}{instead}")
    # In our folders it reads updates, whatever its format, if it does not say otherwise.
    ours = folder == sae_id.path and not is_saelens and "reads" not in values
    return read_sae(config.parent, device=device, reads="update" if ours else None)


def list_saes(root: Path) -> list[SaeId]:
    """The SAEs of a local collection: those in its index or, without one, those whose folders exist."""
    return Collection(Files(Source(str(root), root))).ids


def write_index(root: Path, ids: Sequence[SaeId], **others: Any) -> None:
    """Write the index of a collection atomically: the list of SAEs, and `others` as further JSON values."""
    root.mkdir(parents=True, exist_ok=True)
    _write_index(root, {**others, "saes": [sae_id.path for sae_id in ids]})


def mark_labelled(root: Path, whole: bool) -> None:
    """Record in the index of a collection, if it has one, whether its concept tables and examples are complete."""
    if (root / INDEX).is_file() and "saes" in (index := read_json(root / INDEX)):
        _write_index(root, {**index, LABELLED: whole})


def _write_index(root: Path, index: dict[str, Any]) -> None:
    write_text(root / INDEX, json.dumps(index, indent=2) + "\n")


def _inside(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_pickle(name: str) -> str:
    """The rest of a sentence about a file that is not read; without a name, about what was named before."""
    return (
        f"{name}, a pickle, which is never loaded, since it could run code. Load it with the library that wrote it, "
        f"and save it as safetensors in the format of SAELens or sparsify."
    ).removeprefix(", ")


def _ids(paths: Iterable[Any]) -> list[SaeId]:
    ids = []
    for path in paths:
        try:
            ids.append(SaeId.parse(str(path)))
        except ValueError:
            continue  # from another program, or a later version
    return ids
