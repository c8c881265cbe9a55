"""Edits of an image through its concepts while the sampler runs: raised, removed, replaced.

A block adds an update x to the residual stream, and an SAE encodes x as a code z. An edit changes what the block adds:

- `LatentEdit` changes a few latents, z to z_new:     x_new = x + (z_new - z) @ W_dec
- `PatchEdit` exchanges the update where a concept is present (activation patching):  x_new = x + m * (x_other - x)

where m is `strength` times the share inside the region at positions where a concept is present and 0 elsewhere, and
x_other comes from the surroundings of the object (`RemoveEdit`) or from another run (`ReplaceEdit`). What the SAE does
not reconstruct is left as it was, and an edit of strength 0 changes nothing, to the bit.

Tinaz et al. 2025 (arXiv 2504.15473, section 5) also add and subtract decoder rows, with strengths on another scale;
patches from another run are those of Look But Don't Touch (arXiv 2606.31699).
"""

from core.edits.base import Target
from core.edits.editor import Editor, load_editor
from core.edits.kinds import ConceptEdit, GlobalEdit, LatentEdit, PatchEdit, RemoveEdit, ReplaceEdit, SpatialEdit
from core.edits.pointing import concepts_at
from core.edits.regions import REGIONS, Region, RegionName

__all__ = [
    "REGIONS",
    "ConceptEdit",
    "Editor",
    "GlobalEdit",
    "LatentEdit",
    "PatchEdit",
    "Region",
    "RegionName",
    "RemoveEdit",
    "ReplaceEdit",
    "SpatialEdit",
    "Target",
    "concepts_at",
    "load_editor",
]
