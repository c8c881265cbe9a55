"""The concepts that the page shows: a model's sparse autoencoders for all times with their tables."""

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from core.errors import ArtifactError

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
    train, label, _ = first_lines(name)
    return (
        f"There are no labelled concepts for {name}. Make them with `{train}` and then `{label}`, or name a collection "
        "that has them with `--saes`."
    )


def no_concepts_html(name: str) -> str:
    """The same for an empty tab, with the lines to copy."""
    lines = "\n".join(first_lines(name))
    took = f" They draw for some {QUICK_MINUTES} minutes on an H200." if name == SD else ""
    return (
        f'<div class="id-makings"><p class="id-empty">No labelled concepts of <b>{escape(name)}</b> are here yet: with '
        "a GPU and <code>pip install -e &quot;.[train]&quot;</code>, these lines train autoencoders of its middle "
        f"block, name what they find, and open this page with them.{took}</p>"
        '<div class="id-code"><button type="button" class="id-button id-copy">Copy</button>'
        f"<pre>{escape(lines)}</pre></div></div>"
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


def load_dictionary(name: str, saes: str | None, model: Any) -> Dictionary | None:
    """The concepts of a model; None, and a line in the log, where there are none that can be read.

    Args:
        name: What the user called the model.
        saes: The collection that was asked for; None: the model's own, or else one that was trained on this computer.
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
            log.info("%s is passed over: %s", folder, error)
        else:
            log.info("The concepts are those trained on this computer, in %s; `--saes` takes others.", folder)
            return dictionary
    log.info("Concepts and layout are not shown: %s", why)
    return None


def _load(source: str, model: Any) -> Dictionary:
    """Those of one collection; `ArtifactError` if it has none of the model."""
    from core.concepts.layout import make_reader
    from core.concepts.table import load_concepts
    from core.concepts.trace import load_saes
    from core.sae.collection import find_collection

    collection = find_collection(source)
    saes = load_saes(collection, model)
    tables = {site: load_concepts(collection, *site) for site in saes}
    for table in tables.values():
        table.search("a", model)  # what all labels mean is worked out now, not in somebody's first search
    return Dictionary(source, saes, tables, {site: make_reader(table) for site, table in tables.items()})
