"""The words that a model with a small vocabulary knows, by kind: to click, to swap, and to draw at random."""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

WORDLIST = "words.json"
"""File name among a model's assets."""


@dataclass(frozen=True)
class Wordlist:
    """Words by kind."""

    document: dict[str, Any]
    """`objects` (each with its `words` and the `swaps` for it), `backgrounds` (each with its `words` and
    `preposition`), `styles` and `relations`.
    """

    @property
    def html(self) -> str:
        """Menus of the words, a button that writes a prompt by chance, and the words as JSON for the page's script."""
        kinds = (
            ("Objects", "object", [word for one in self.document["objects"] for word in one["words"]]),
            ("Backgrounds", "background", [word for one in self.document["backgrounds"] for word in one["words"]]),
            ("Styles", "style", self.document["styles"]),
        )
        menus = "".join(
            f'<details class="id-menu"><summary>{title} <small>{len(words)}</small></summary>'
            f"<div>{_buttons(kind, words)}</div></details>"
            for title, kind, words in kinds
        )
        return (
            f'<div class="id-wordlist" data-words="{escape(json.dumps(self.document))}">'
            f'<button type="button" class="id-button id-dice">Surprise me</button>{menus}</div>'
        )


def load_wordlist(assets: Path | None) -> Wordlist | None:
    """The words that come with a model; None for one that understands any."""
    path = None if assets is None else assets / WORDLIST
    return Wordlist(json.loads(path.read_text(encoding="utf-8"))) if path is not None and path.is_file() else None


def _buttons(kind: str, words: list[str]) -> str:
    return "".join(
        f'<button type="button" class="id-find id-write" data-kind="{kind}" data-word="{escape(word)}">{escape(word)}'
        "</button>"
        for word in words
    )
