"""The concepts that the page shows: a model's sparse autoencoders for all times with their tables."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import ArtifactError

if TYPE_CHECKING:
    from core.concepts.layout import Reader
    from core.concepts.table import ConceptTable
    from core.concepts.trace import SaeSite
    from core.sae.autoencoder import SparseAutoencoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dictionary:
    """What a model's blocks can be read with."""

    source: str
    """Where it is from, as `core.load_sae` takes it."""
    saes: "Mapping[SaeSite, SparseAutoencoder]"
    """By block and branch, first block first."""
    tables: "Mapping[SaeSite, ConceptTable]"
    """The concepts of each."""
    readers: "Mapping[SaeSite, Reader]"
    """How each foretells a layout."""


def block_words(hookpoint: str) -> str:
    """Where in the model a block is; of several that follow each other at one level, which of them."""
    way = next((words for name, words in _WAYS.items() if hookpoint.startswith(name)), "at")
    number = hookpoint.rsplit(".", 1)[-1]
    return way + (_WHICH[int(number)] if number.isdecimal() and int(number) < len(_WHICH) else "")


_WAYS = {"down": "on the way down", "mid": "in the middle", "up": "on the way up"}
_WHICH = ("", ", second", ", third")


def no_concepts(name: str) -> str:
    """Why a model has none to show, and what to do."""
    return (
        f"There are no labelled concepts for {name}. Make them with `python -m training sae` and then "
        "`python -m training labels`, or name a collection that has them with `--saes`."
    )


def load_dictionary(source: str, model: Any) -> Dictionary | None:
    """The concepts of a model; None, and a line in the log, where there are none that can be read."""
    from core.concepts.layout import make_reader
    from core.concepts.table import load_concepts
    from core.concepts.trace import load_saes
    from core.sae.collection import find_collection

    try:
        collection = find_collection(source)
        saes = load_saes(collection, model)
        tables = {site: load_concepts(collection, *site) for site in saes}
    except ArtifactError as error:
        log.info("Concepts and layout are not shown: %s", error)
        return None
    for table in tables.values():
        table.search("a", model)  # what all labels mean is worked out now, not in somebody's first search
    return Dictionary(source, saes, tables, {site: make_reader(table) for site, table in tables.items()})
