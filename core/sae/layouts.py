"""Where the SAEs of a collection lie: in our folders, or in those of SAELens, sparsify and SAeUron.

    <hookpoint>/<cond|uncond>/t<time|all>/cfg.json      ours
    unet.up_blocks.1.attentions.1/cfg.json              sparsify, SAeUron: the folder is named after the module it hooks
    <any name>/cfg.json                                 SAELens: `metadata.hook_name` names the module

The folders may lie deeper, and a single SAE at the root. Other libraries know no branches and no times: their SAEs are
those of the conditional branch for all times.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from core.diffusion.sampling import Branch
from core.sae.autoencoder import SaeId
from core.sae.io import CONFIG

log = logging.getLogger(__name__)

_BLOCK = re.compile(r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+(?:\.\w+)*")
"""A module of a U-Net, in a longer name such as `unet.up_blocks.1.attentions.1`."""


def find_saes(names: Iterable[str], config: Callable[[str], Mapping[str, Any]], root: str) -> dict[SaeId, str]:
    """The SAEs of a collection without an index, with their folders.

    Args:
        names: All files of the collection.
        config: Reads the `cfg.json` of a name.
        root: Name of the collection's folder, which may be that of a single SAE.
    """
    found: dict[SaeId, str] = {}
    for name in sorted(one for one in names if one.split("/")[-1] == CONFIG):
        folder = name.rpartition("/")[0]
        sae_id = _identify(folder, root, lambda name=name: config(name))  # type: ignore[misc]
        if sae_id in found:
            log.info("%s is a further SAE of %s; that in %s is used", folder, sae_id.path, found[sae_id] or ".")
        else:
            found[sae_id] = folder
    return found


def _identify(folder: str, root: str, config: Callable[[], Mapping[str, Any]]) -> SaeId:
    """The SAE of a folder, by its name or else by what its configuration says."""
    try:
        return SaeId.parse(folder)
    except ValueError:
        pass
    for part in reversed([root, *folder.split("/")]):
        if match := _BLOCK.search(part):
            return SaeId(match[0], "cond", "all")
    values = config()
    metadata = values.get("metadata")
    known = {**values, **(metadata if isinstance(metadata, dict) else {})}
    named = known.get("hookpoint") or known.get("hook_name") or folder.split("/")[-1] or root
    branch = known.get("branch") if known.get("branch") in get_args(Branch) else "cond"
    t = known.get("t")
    return SaeId(str(named).removeprefix("unet."), branch, t if type(t) in (int, float) else "all")  # type: ignore[arg-type]
