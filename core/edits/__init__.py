"""Edits of a picture through its concepts: raised, removed or replaced, while the sampler runs.

An edit changes what a block adds to the stream by (z_new - z) @ W_dec, where z is the code of the update and z_new the
same code with a few latents changed. What the SAE does not rebuild stays as it was, and strength 0 is no edit, to the
bit. (Tinaz et al. 2025, arXiv 2504.15473, section 5, add and take away decoder rows too, by strengths of another scale;
`ReplaceEdit.patches` is the exchange of Look But Don't Touch, arXiv 2606.31699.)
"""

from core.edits.editor import Editor, load_editor
from core.edits.kinds import (
    REGIONS,
    ConceptEdit,
    GlobalEdit,
    Region,
    RegionName,
    RemoveEdit,
    ReplaceEdit,
    SpatialEdit,
    Target,
)
from core.edits.pointing import concepts_at

__all__ = [
    "REGIONS",
    "ConceptEdit",
    "Editor",
    "GlobalEdit",
    "Region",
    "RegionName",
    "RemoveEdit",
    "ReplaceEdit",
    "SpatialEdit",
    "Target",
    "concepts_at",
    "load_editor",
]
