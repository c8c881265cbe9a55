"""Finding an SAE by what it reads: embedded in this package, in a local folder, or on the Hub at a revision.

A collection has a folder an SAE, `SaeId.path`, and a root `config.json` that lists them under `saes`.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from core.errors import ArtifactError
from core.sae import AllTimes, SaeId, SparseAutoencoder
from core.sae_files import CONFIG, SPARSIFY_WEIGHTS, WEIGHTS, read_json, read_sae
from core.sampling import Branch
from core.spec import BUILT_IN

INDEX = "config.json"
"""A collection's list of its SAEs."""
EMBEDDED = {"picturebook": Path(__file__).parent / "picturebook" / "saes"}
"""Collections inside this package, by the name of their model."""

_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")


def load_sae(
    source: str | Path,
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
    sae_id, text = SaeId(hookpoint, branch, t), str(source)
    if text in EMBEDDED:
        root = EMBEDDED[text]
        if not root.is_dir():
            raise ArtifactError(f"The SAEs of {text!r} are not there yet. Make them with `python -m training sae`.")
        return _from_folder(root, sae_id, device)
    root = Path(text).expanduser()
    if root.is_dir():
        return _from_folder(root, sae_id, device)
    hub_id, _, revision = text.partition("@")
    if _HUB_ID.fullmatch(hub_id) and not text.startswith((".", "~")):
        return _from_hub(hub_id, revision or None, sae_id, device)
    trained = " No SAEs of it come with this package: train some with `python -m training sae`." * (text in BUILT_IN)
    near = difflib.get_close_matches(text, EMBEDDED, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ArtifactError(
        f"There are no SAEs {text!r}: it is neither built in ({', '.join(EMBEDDED)}), nor a folder, "
        f"nor a Hub id `owner/name[@revision]`.{trained}{hint}"
    )


def list_saes(root: Path) -> list[SaeId]:
    """The SAEs of a local collection: those that its index names, or without one those whose folders are there."""
    index = root / INDEX
    if index.is_file():
        return _ids(read_json(index).get("saes", []))
    return _ids(sorted(path.parent.relative_to(root).as_posix() for path in root.glob(f"*/*/*/{CONFIG}")))


def write_index(root: Path, ids: Sequence[SaeId], **others: Any) -> None:
    """Write a collection's index, `others` (JSON) beside the list, in one go."""
    root.mkdir(parents=True, exist_ok=True)
    part = root / f"{INDEX}.part"
    part.write_text(json.dumps({**others, "saes": [sae_id.path for sae_id in ids]}, indent=2) + "\n")
    os.replace(part, root / INDEX)


def _ids(paths: Iterable[Any]) -> list[SaeId]:
    ids = []
    for path in paths:
        try:
            ids.append(SaeId.parse(str(path)))
        except ValueError:
            continue  # of another program, or of a later version
    return ids


def _from_folder(root: Path, sae_id: SaeId, device: torch.device | str) -> SparseAutoencoder:
    folder = root / sae_id.path
    if not (folder / CONFIG).is_file():
        raise ArtifactError(_missing(str(root), sae_id, list_saes(root)))
    return read_sae(folder, device=device)


def _from_hub(hub_id: str, revision: str | None, sae_id: SaeId, device: torch.device | str) -> SparseAutoencoder:
    where = f"{hub_id}@{revision}" if revision else hub_id

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(hub_id, name, revision=revision))

    try:
        try:
            config = fetch(f"{sae_id.path}/{CONFIG}")
        except LocalEntryNotFoundError:
            raise  # it may be there: the Hub could not be asked
        except EntryNotFoundError as error:
            raise ArtifactError(_missing(where, sae_id, _ids(read_json(fetch(INDEX)).get("saes", [])))) from error
        is_sparsify = "architecture" not in read_json(config)
        fetch(f"{sae_id.path}/{SPARSIFY_WEIGHTS if is_sparsify else WEIGHTS}")
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ArtifactError(
            f"There is no {where} on the Hub, or it is not open to you (`hf auth login`): check the name and revision."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(f"{where} could not be fetched from the Hub: {error}") from error
    except EntryNotFoundError as error:
        raise ArtifactError(f"{where} is no collection of SAEs: {error}") from error
    return read_sae(config.parent, device=device)


def _missing(where: str, sae_id: SaeId, there: Sequence[SaeId]) -> str:
    """What to say of an SAE that a collection does not have."""
    if not there:
        return (
            f"{where} has no SAE at all: an SAE is a folder <hookpoint>/<cond|uncond>/t<time|all> with {CONFIG} in it."
        )
    paths = [other.path for other in there]
    near = difflib.get_close_matches(sae_id.path, paths, n=1, cutoff=0)[0]
    return f"{where} has no SAE {sae_id.path}. Did you mean {near}? All of them: {', '.join(paths)}."
