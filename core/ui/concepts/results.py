"""An image's concept activations, packed so that the page can step through them without the server."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from core.concepts.layout import BRANCH
from core.concepts.table import N_NEAREST, Concept, ConceptTable, Hit
from core.concepts.trace import CodeTrace, SaeSite
from core.diffusion.diffuser import Diffuser
from core.spec import default_hookpoint
from core.ui.backend.dictionary import ConceptDictionary
from core.ui.look.colours import scale_hex

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

N_LEVELS = 63
"""Values are quantised to this many levels, in units of a concept's 99th percentile."""
FIRST_NUMBER, FIRST_LEVEL = 0xA1, 0x3F
"""Characters of concept 0 and of level 0; the others follow. concepts.js uses the same."""
MAX_ENTRIES = 100_000
"""Most entries sent for a block and branch; beyond it, the weakest of each position are dropped."""
_N_COLOURS = 16
GOOD_IOU, GOOD_AUROC = 0.15, 0.75
"""From these scores on held-out images on, a label is not marked as a weak one."""


def site_key(site: SaeSite) -> str:
    """The page's key for a block and branch."""
    return f"{site.hookpoint}|{site.branch}"


def find_site(dictionary: ConceptDictionary, key: str) -> SaeSite | None:
    """The site of a key, or None."""
    return next((site for site in dictionary.tables if site_key(site) == key), None)


def pack(dictionary: ConceptDictionary, trace: CodeTrace) -> str:
    """An image's activations as JSON, for the page's script.

    For each site (block and branch): the grid; how many concepts a position has at most; the concepts' numbers and
    levels, step by step and position by position; and the label, kind, mean where active and 99th percentile of those
    that occur, their usual share of all activation, and whether the label fits well. The default site comes first.
    """
    known = [site for site in default_first(trace.sites()) if site in dictionary.tables]
    sites = {site_key(site): _pack(dictionary.tables[site], trace, site) for site in known}
    colours = [scale_hex(i / (_N_COLOURS - 1)) for i in range(_N_COLOURS)]
    document = {"steps": trace.n_steps, "colours": colours, "sites": sites}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def default_first(sites: Sequence[SaeSite]) -> list[SaeSite]:
    """The same sites, the one that `core.predict_layout` reads by default first."""
    hookpoints = list(dict.fromkeys(site.hookpoint for site in sites))
    default = SaeSite(default_hookpoint(hookpoints), BRANCH)
    return sorted(sites, key=lambda site: site != default)


def search_all(
    tables: Mapping[SaeSite, ConceptTable], word: str, model: Diffuser | None
) -> tuple[list[tuple[SaeSite, Hit]], tuple[str, ...]]:
    """Search all tables for a word: the hits, best first; if there are none, the nearest labels.

    Raises:
        ValueError: The word is blank.
    """
    found = {site: table.search(word, model) for site, table in tables.items()}
    hits = [(site, hit) for site, of in found.items() for hit in of.hits]
    hits.sort(key=lambda one: (-round(one[1].similarity, 3), -one[1].score))
    nearest = dict.fromkeys(label for of in found.values() for label in of.nearest)
    return hits, () if hits else tuple(nearest)[:N_NEAREST]


def title(concept: Concept) -> str:
    """A concept's title: its label, or what it is without one."""
    return concept.label or {"context-free": "fixed position"}.get(concept.kind, "unnamed")


def fits_well(frame: "pd.DataFrame") -> "pd.Series[bool]":
    """Whether the label of each concept of a table fits it well enough to be taken at its word."""
    style = frame["kind"] == "style"
    return (style & (frame["style_auroc"] >= GOOD_AUROC)) | (~style & (frame["held_out_iou"] >= GOOD_IOU))


def _pack(table: ConceptTable, trace: CodeTrace, site: SaeSite) -> dict[str, Any]:
    codes = [trace.code(site, step) for step in range(trace.n_steps)]
    values, order = torch.stack([code.values for code in codes]).clamp_min(0).sort(dim=2, descending=True)
    numbers = torch.stack([code.indices for code in codes]).clamp_min(0).gather(2, order)
    each = max(1, min(values.shape[2], MAX_ENTRIES // (values.shape[0] * values.shape[1])))
    values, numbers = values[..., :each], numbers[..., :each]
    tops = torch.from_numpy(table.frame["p99"].to_numpy(copy=True)).clamp_min(1e-9)
    levels = (N_LEVELS * values / tops[numbers]).round().clamp(0, N_LEVELS)
    levels = torch.where(values > 0, levels.clamp_min(1), 0).int()
    found = torch.unique(numbers[values > 0]).tolist()
    frame = table.frame.iloc[found]
    usual = table.frame["firing_rate"] * table.frame["mean"]
    usual = (usual / max(float(usual.sum()), 1e-12)).iloc[found]
    columns = (frame["label"], frame["kind"], frame["mean"], frame["p99"], usual, fits_well(frame))
    names = {
        number: [label, kind, round(float(mean), 3), round(float(p99), 3), float(f"{share:.3g}"), int(fits)]
        for number, label, kind, mean, p99, share, fits in zip(found, *columns, strict=True)
    }
    return {
        "grid": trace.grids[site.hookpoint],
        "each": each,
        "numbers": "".join(map(chr, (numbers + FIRST_NUMBER).flatten().tolist())),
        "levels": "".join(map(chr, (levels + FIRST_LEVEL).flatten().tolist())),
        "names": names,
    }
