"""The concepts that the page shows: a model's time-independent sparse autoencoders and their concept tables."""

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
class ConceptDictionary:
    """The sparse autoencoders of a model's blocks, with the tables that name their latents."""

    source: str
    """Its source, as `core.load_sae` takes it."""
    saes: "Mapping[SaeSite, SparseAutoencoder]"
    """By block and branch, first block first."""
    tables: "Mapping[SaeSite, ConceptTable]"
    """The concepts of each."""
    readers: "Mapping[SaeSite, Reader]"
    """What predicts a layout from the codes of each."""


def block_words(hookpoint: str) -> str:
    """Where in the U-Net a block is, in words, with its number within its level."""
    part = next((words for name, words in _PARTS.items() if hookpoint.startswith(name)), "block")
    number = hookpoint.rsplit(".", 1)[-1]
    return f"{part} {int(number) + 1}" if part != "middle" and number.isdecimal() else part


_PARTS = {"down": "encoder", "mid": "middle", "up": "decoder"}


def no_concepts(name: str) -> str:
    """Why a model has no concepts to show, and what to do."""
    return (
        f"There are no labelled concepts for {name}. Make them with `python -m training sae` and then "
        "`python -m training labels`, or choose a collection that has them with `--saes`."
    )


def load_dictionary(source: str, model: Any) -> ConceptDictionary | None:
    """The concepts of a model; None, and a line in the log, if none can be read."""
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
        table.search("a", model)  # embeds all labels now rather than in the first search
    return ConceptDictionary(source, saes, tables, {site: make_reader(table) for site, table in tables.items()})
