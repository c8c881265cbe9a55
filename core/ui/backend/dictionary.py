"""The concepts that the page shows: a model's time-independent sparse autoencoders and their concept tables."""

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from core.errors import ArtifactError
from core.ui.look.blocks import code_html

if TYPE_CHECKING:
    from core.concepts.layout import Reader
    from core.concepts.table import ConceptTable
    from core.concepts.trace import SaeSite
    from core.sae.autoencoder import SparseAutoencoder

log = logging.getLogger(__name__)

EMBEDDED, SD = "picturebook", "sd-v1-4"
QUICK = "training/recipes/sd_v1_4_quick.json"
"""What makes concepts in minutes, of any model with a block in the middle."""
QUICK_PICTURES = 512
"""From which they are named."""
QUICK_MINUTES = 16
"""Of drawing for both, with SD v1.4 on an H200; the arithmetic stands in `training/recipes/README.md`."""


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
    train, label, _ = first_lines(name)
    return (
        f"There are no labelled concepts for {name}. Make them with `{train}` and then `{label}`, or name a collection "
        "that has them with `--saes`."
    )


def no_concepts_html(name: str) -> str:
    """`no_concepts` as HTML for an empty tab, with the commands to copy."""
    lines = "\n".join(first_lines(name))
    took = f" Sampling takes about {QUICK_MINUTES} minutes on an H200." if name == SD else ""
    return (
        f'<div class="id-makings"><p class="id-empty">There are no labelled concepts for <b>{escape(name)}</b> yet. '
        "With a GPU and <code>pip install -e &quot;.[train]&quot;</code>, these lines train autoencoders on its middle "
        f"block, label their latents and open this page with them.{took}</p>{code_html(lines)}</div>"
    )


def first_lines(name: str) -> tuple[str, str, str]:
    """Commands that train autoencoders of a model, name their concepts, and open the page, which finds them."""
    if name == EMBEDDED:
        return "python -m training sae", "python -m training labels", f"python app.py --model {name}"
    model = shlex.quote(name)
    options = f"--recipe {QUICK}" if name == SD else f"--recipe {QUICK} --model {model}"
    return (
        f"python -m training sae {options}",
        f"python -m training labels {options} --images {QUICK_PICTURES}",
        f"python app.py --model {model}",
    )


def load_dictionary(name: str, saes: str | None, model: Any) -> ConceptDictionary | None:
    """The concepts of a model; None, and a line in the log, if none can be read.

    Args:
        name: What the user called the model.
        saes: The collection given by the user; None: the model's own, or else one trained on this computer.
        model: The `core.Diffuser`.
    """
    from core.sae.trained import find_trained

    try:
        return _load(saes or name, model)
    except ArtifactError as error:
        why = error
    for folder in () if saes else find_trained(model.spec):
        try:
            dictionary = _load(str(folder), model)
        except ArtifactError as error:
            log.info("%s is skipped: %s", folder, error)
        else:
            log.info("concepts: those trained on this computer, in %s; choose others with `--saes`", folder)
            return dictionary
    log.info("Concepts and layout are not shown: %s", why)
    return None


def _load(source: str, model: Any) -> ConceptDictionary:
    """The concepts of one collection; `ArtifactError` if it has none for the model."""
    from core.concepts.layout import make_reader
    from core.concepts.table import load_concepts
    from core.concepts.trace import load_saes
    from core.sae.collection import find_collection

    collection = find_collection(source)
    saes = load_saes(collection, model)
    tables = {site: load_concepts(collection, *site) for site in saes}
    for table in tables.values():
        table.search("a", model)  # embeds all labels now rather than in the first search
    return ConceptDictionary(source, saes, tables, {site: make_reader(table) for site, table in tables.items()})
