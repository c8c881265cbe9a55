"""Collections of SAEs: in this package, in a local folder, or on the Hub at a revision.

A collection has one folder per SAE, `SaeId.path`, and a `config.json` at its root that lists them under `saes`. Concept
tables and the gallery are in the same folders, or in a dataset repository on the Hub, which `tables` names.
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
        return {} if path is None else read_json(path)

    @cached_property
    def ids(self) -> list[SaeId]:
        """Its SAEs: those in the index or, in a local folder without one, those whose folders exist."""
        folder = self.files.source.folder
        return _ids(self.index.get("saes", [])) if folder is None else list_saes(folder)

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
            return (
                f"{self.name} has no SAEs: an SAE is a folder <hookpoint>/<cond|uncond>/t<time|all> with "
                f"{CONFIG} in it."
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
    config = collection.files.find(f"{sae_id.path}/{CONFIG}")
    if config is None:
        raise ArtifactError(collection.missing(sae_id))
    weights = WEIGHTS if "architecture" in read_json(config) else SPARSIFY_WEIGHTS
    if collection.files.find(f"{sae_id.path}/{weights}") is None:
        pickles = pickles_among(path.name for path in config.parent.iterdir())
        instead = f", only {pickles[0]}, a pickle, which could run code when it is loaded" if pickles else ""
        raise ArtifactError(f"There is no {weights}{instead} in {collection.name}, folder {sae_id.path}.")
    return read_sae(config.parent, device=device)


def list_saes(root: Path) -> list[SaeId]:
    """The SAEs of a local collection: those in its index or, without one, those whose folders exist."""
    index = root / INDEX
    if index.is_file():
        return _ids(read_json(index).get("saes", []))
    return _ids(sorted(path.parent.relative_to(root).as_posix() for path in root.glob(f"*/*/*/{CONFIG}")))


def write_index(root: Path, ids: Sequence[SaeId], **others: Any) -> None:
    """Write the index of a collection atomically: the list of SAEs, and `others` as further JSON values."""
    root.mkdir(parents=True, exist_ok=True)
    _write_index(root, {**others, "saes": [sae_id.path for sae_id in ids]})


def mark_labelled(root: Path, whole: bool) -> None:
    """Record in the index of a collection, if it has one, whether its concept tables and examples are complete."""
    if (root / INDEX).is_file():
        _write_index(root, {**read_json(root / INDEX), LABELLED: whole})


def _write_index(root: Path, index: dict[str, Any]) -> None:
    write_text(root / INDEX, json.dumps(index, indent=2) + "\n")


def _ids(paths: Iterable[Any]) -> list[SaeId]:
    ids = []
    for path in paths:
        try:
            ids.append(SaeId.parse(str(path)))
        except ValueError:
            continue  # from another program, or a later version
    return ids
