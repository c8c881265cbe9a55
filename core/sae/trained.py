"""Autoencoders that were trained on this computer, for models that none are published for."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from core.errors import ArtifactError
from core.folders import collections_folder
from core.sae.collection import INDEX, LABELLED, MADE_FOR
from core.sae.io import read_json
from core.spec import ModelSpec

log = logging.getLogger(__name__)


def find_trained(spec: ModelSpec) -> list[Path]:
    """The finished and labelled collections of exactly this model in the default folder, the newest first."""
    found, digest = [], None
    for path in sorted(collections_folder(spec).glob(f"*/{INDEX}"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            index = read_json(path)
        except ArtifactError as error:
            log.warning("%s is passed over: %s", path.parent, error)
            continue
        digest = digest or weights_digest(spec)
        if index.get(MADE_FOR) != digest:
            log.info("%s is passed over: the model's weights are not those that it was made for", path.parent)
        elif index.get(LABELLED) is not True:
            log.info("%s is passed over: its concepts have no names yet (`python -m training labels`)", path.parent)
        else:
            found.append(path.parent)
    return found


def weights_digest(spec: ModelSpec) -> str | None:
    """What tells a model's weights from others of the same name: the hash of a folder's, or the Hub's revision."""
    folder = Path(spec.source).expanduser()
    return files_digest(folder.rglob("*.safetensors")) if folder.is_dir() else spec.revision


def files_digest(paths: Iterable[Path]) -> str | None:
    """Hash of the contents of those that are files; None without any."""
    whole, files = hashlib.sha256(), sorted(path for path in paths if path.is_file())
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16] if files else None
