"""Finding an SAE by what it reads: embedded in this package, in a local folder, or on the Hub at a revision.

A collection has a folder an SAE, `SaeId.path`, and a root `config.json` that lists them under `saes`. Its concept
tables and their pictures lie in the same folders, or on the Hub in a dataset repository that `tables` names.
"""

import difflib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from core.artifacts import Files, Source, find_source, neither, pickles_among
from core.diffusion.sampling import Branch
from core.errors import ArtifactError
from core.sae.autoencoder import AllTimes, SaeId, SparseAutoencoder
from core.sae.io import CONFIG, SPARSIFY_WEIGHTS, WEIGHTS, read_json, read_sae
from core.spec import BUILT_IN

INDEX = "config.json"
"""A collection's list of its SAEs."""
TABLES = "tables"
"""Key in the index of the dataset repository, `owner/name@revision`, with the concept tables."""
MADE_FOR = "weights"
"""Key in the index of what the model's weights were: `core.sae.trained.weights_digest`."""
LABELLED = "labelled"
"""Key in the index; true once `python -m training labels` has written all that belongs to the concepts."""
EMBEDDED = {"picturebook": Path(__file__).parents[1] / "picturebook" / "saes"}
"""Collections inside this package, by the name of their model."""


class Collection:
    """SAEs of one model, and the concept tables that go with them."""

    files: Files
    """Those of the SAEs."""

    def __init__(self, files: Files, *, cache: Path | None = None) -> None:
        """`cache` is the folder for what is fetched of the tables, as for `Files`."""
        self.files, self._cache = files, cache

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.files.source.name

    @cached_property
    def index(self) -> dict[str, Any]:
        """What the collection's index says; nothing where it has none."""
        path = self.files.find(INDEX)
        return {} if path is None else read_json(path)

    @cached_property
    def ids(self) -> list[SaeId]:
        """Its SAEs; of a folder without an index, those whose folders are there."""
        folder = self.files.source.folder
        return _ids(self.index.get("saes", [])) if folder is None else list_saes(folder)

    @cached_property
    def tables(self) -> Files:
        """The files of its concept tables and gallery.

        Raises:
            ArtifactError: The index names something else than a dataset on the Hub.
        """
        told, folder = self.index.get(TABLES), self.files.source.folder
        if told is None or (folder is not None and any(folder.glob("*/*/*/*.parquet"))):
            return self.files
        source = find_source(told) if isinstance(told, str) else None
        if source is None or source.folder is not None:
            raise ArtifactError(f"The {INDEX} of {self.name} names {told!r} as its tables: no dataset on the Hub.")
        return Files(source, "dataset", cache=self._cache)

    def missing(self, sae_id: SaeId) -> str:
        """What to say of an SAE that it does not have."""
        if not self.ids:
            return (
                f"{self.name} has no SAE at all: an SAE is a folder <hookpoint>/<cond|uncond>/t<time|all> with "
                f"{CONFIG} in it."
            )
        paths = [other.path for other in self.ids]
        near = difflib.get_close_matches(sae_id.path, paths, n=1, cutoff=0)[0]
        return f"{self.name} has no SAE {sae_id.path}. Did you mean {near}? All of them: {', '.join(paths)}."


def find_collection(source: "str | Path | Collection", *, cache: Path | None = None) -> Collection:
    """The collection of a built-in name, a local folder, or `owner/name[@revision]` on the Hub.

    Raises:
        ArtifactError: The name is none of these, or what it names was not made yet.
    """
    if isinstance(source, Collection):
        return source
    text = str(source)
    if text in EMBEDDED:
        if not EMBEDDED[text].is_dir():
            raise ArtifactError(f"The SAEs of {text!r} are not there yet. Make them with `python -m training sae`.")
        return Collection(Files(Source(text, EMBEDDED[text])))
    found = find_source(source)
    if found is None:
        trained = " No SAEs of it come with this package: train some with `python -m training sae`."
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
    """The SAE that reads these activations.

    Args:
        source: A built-in model's name, a local folder, or `owner/name[@revision]` on the Hub, of which only this
            SAE's files are fetched.
        hookpoint: Dotted module name of the block.
        branch: `cond` or `uncond`.
        t: Normalised time of the sampler's step, or `all` for the SAE shared by every step.
        device: Where its weights go.

    Raises:
        ArtifactError: It is not there, and the message lists what is; or its files cannot be read.
    """
    collection, sae_id = find_collection(source), SaeId(hookpoint, branch, t)
    _ = collection.index  # first: it is what the Hub counts, and the commit that all else is fetched of
    config = collection.files.find(f"{sae_id.path}/{CONFIG}")
    if config is None:
        raise ArtifactError(collection.missing(sae_id))
    weights = WEIGHTS if "architecture" in read_json(config) else SPARSIFY_WEIGHTS
    if collection.files.find(f"{sae_id.path}/{weights}") is None:
        pickles = pickles_among(path.name for path in config.parent.iterdir())
        instead = f", only {pickles[0]}, a pickle, which could run code on loading" if pickles else ""
        raise ArtifactError(f"There is no {weights}{instead} in {collection.name}, folder {sae_id.path}.")
    return read_sae(config.parent, device=device)


def list_saes(root: Path) -> list[SaeId]:
    """The SAEs of a local collection: those that its index names, or without one those whose folders are there."""
    index = root / INDEX
    if index.is_file():
        return _ids(read_json(index).get("saes", []))
    return _ids(sorted(path.parent.relative_to(root).as_posix() for path in root.glob(f"*/*/*/{CONFIG}")))


def usual_hookpoint(ids: Sequence[SaeId]) -> str:
    """Where one looks unless told otherwise: the second of the hookpoints, or the only one; empty without any."""
    return list(dict.fromkeys(sae_id.hookpoint for sae_id in ids))[:2][-1] if ids else ""


def write_index(root: Path, ids: Sequence[SaeId], **others: Any) -> None:
    """Write a collection's index, `others` (JSON) beside the list, in one go."""
    root.mkdir(parents=True, exist_ok=True)
    _replace_index(root, {**others, "saes": [sae_id.path for sae_id in ids]})


def mark_labelled(root: Path, whole: bool) -> None:
    """Note in a collection's index, if it has one, whether its concept tables and examples are whole."""
    if (root / INDEX).is_file():
        _replace_index(root, {**read_json(root / INDEX), LABELLED: whole})


def _replace_index(root: Path, index: dict[str, Any]) -> None:
    part = root / f"{INDEX}.part"
    part.write_text(json.dumps(index, indent=2) + "\n")
    os.replace(part, root / INDEX)


def _ids(paths: Iterable[Any]) -> list[SaeId]:
    ids = []
    for path in paths:
        try:
            ids.append(SaeId.parse(str(path)))
        except ValueError:
            continue  # of another program, or of a later version
    return ids
