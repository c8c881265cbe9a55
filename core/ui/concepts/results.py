"""What is active where and when in a picture, packed so that the page can walk through it without the server."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from core.concepts.layout import BRANCH
from core.concepts.table import N_NEAREST, Concept, ConceptTable, Hit
from core.concepts.trace import CodeTrace, SaeSite
from core.diffusion.diffuser import Diffuser
from core.spec import default_hookpoint
from core.ui.concepts.dictionary import Dictionary
from core.ui.look.colours import scale_hex

N_LEVELS = 63
"""Values are sent as so many parts of a concept's 99th percentile."""
FIRST_NUMBER, FIRST_LEVEL = 0xA1, 0x3F
"""Characters of concept 0 and of level 0; those of the others follow them. The script knows both."""
MAX_ENTRIES = 100_000
"""Most active concepts of a block and branch that are sent: where there are more, the weakest of each position stay."""
_N_COLOURS = 16


def way_key(site: SaeSite) -> str:
    """A block and branch, for the page."""
    return f"{site.hookpoint}|{site.branch}"


def find_site(dictionary: Dictionary, key: str) -> SaeSite | None:
    """The place of a key; None where there is none."""
    return next((site for site in dictionary.tables if way_key(site) == key), None)


def pack(dictionary: Dictionary, trace: CodeTrace) -> str:
    """What the script draws from, as JSON.

    By block and branch: the grid, how many concepts a position has at most, which and how strong, step by step and
    position by position; and of those that occur the label, kind, mean and 99th percentile. The place that is read
    where nothing is chosen comes first.
    """
    ways = {way_key(p): _pack(dictionary.tables[p], trace, p) for p in usual_first(trace) if p in dictionary.tables}
    colours = [scale_hex(i / (_N_COLOURS - 1)) for i in range(_N_COLOURS)]
    document = {"steps": trace.n_steps, "colours": colours, "ways": ways}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def usual_first(trace: CodeTrace) -> list[SaeSite]:
    """The places of a trace, that which `core.predict_layout` reads by default first."""
    hookpoints = list(dict.fromkeys(site.hookpoint for site in trace.sites()))
    usual = SaeSite(default_hookpoint(hookpoints), BRANCH)
    return sorted(trace.sites(), key=lambda site: site != usual)


def search_all(
    tables: Mapping[SaeSite, ConceptTable], word: str, model: Diffuser | None
) -> tuple[list[tuple[SaeSite, Hit]], tuple[str, ...]]:
    """What a word finds in some tables, best first; where it finds nothing, the labels that come nearest.

    Raises:
        ValueError: The word is blank.
    """
    found = {site: table.search(word, model) for site, table in tables.items()}
    hits = [(site, hit) for site, of in found.items() for hit in of.hits]
    hits.sort(key=lambda one: (-round(one[1].similarity, 3), -one[1].score))
    nearest = dict.fromkeys(label for of in found.values() for label in of.nearest)
    return hits, () if hits else tuple(nearest)[:N_NEAREST]


def title(concept: Concept) -> str:
    """What a concept is called: its label, or why it has none."""
    return concept.label or {"context-free": "a place in the frame"}.get(concept.kind, "no name")


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
    names = {
        number: [label, kind, round(float(mean), 3), round(float(p99), 3)]
        for number, label, kind, mean, p99 in zip(
            found, frame["label"], frame["kind"], frame["mean"], frame["p99"], strict=True
        )
    }
    return {
        "grid": trace.grids[site.hookpoint],
        "each": each,
        "numbers": "".join(map(chr, (numbers + FIRST_NUMBER).flatten().tolist())),
        "levels": "".join(map(chr, (levels + FIRST_LEVEL).flatten().tolist())),
        "names": names,
    }
