"""Pieces of HTML that several tabs use: Python lines to copy, and tables that scroll."""

from collections.abc import Sequence
from html import escape


def code_html(lines: str, attributes: str = "", marked: bool = False) -> str:
    """Python lines with a button that copies them.

    Args:
        lines: The lines as text, or as HTML if `marked`.
        attributes: Attributes of the block, such as ` hidden`.
        marked: Whether `lines` are HTML already.
    """
    shown = lines if marked else escape(lines)
    # What scrolls must be reachable by keyboard.
    return (
        f'<div class="id-code"{attributes}><button type="button" class="id-button id-copy">Copy</button>'
        f'<pre tabindex="0" role="group" aria-label="Python lines">{shown}</pre></div>'
    )


def folded_code_html(lines: str, summary: str = "Repeat this in Python") -> str:
    """Python lines to copy, folded."""
    return f'<details class="id-more"><summary>{escape(summary)}</summary>{code_html(lines)}</details>'


def table_html(content: str, label: str, classes: str = "", table_class: str = "") -> str:
    """A table, given what is inside it, in a box that scrolls sideways where the page is narrow."""
    of_table = f' class="{table_class}"' if table_class else ""
    return (
        f'<div class="id-scroll{f" {classes}" if classes else ""}" tabindex="0" role="group" '
        f'aria-label="{escape(label)}"><table{of_table}>{content}</table></div>'
    )


def downloads_html(files: Sequence[tuple[str, str, str]], png: str = "", link: str = "") -> str:
    """Buttons that save a result.

    Args:
        files: Text, file name and URL of each file.
        png: Class of the button for an image that the page's script puts together; empty for none.
        link: `copy` for a button that copies the page's address; any other text says why there is none.
    """
    buttons = "".join(
        f'<a class="id-button" download="{escape(name)}" href="{url}">{escape(text)}</a>' for text, name, url in files
    )
    image = f'<button type="button" class="id-button {png}">PNG</button>' if png else ""
    copy = '<button type="button" class="id-button id-link">Copy link</button>' if link == "copy" else ""
    why = "" if copy else f"<small>{escape(link)}</small>"
    return (
        '<div class="id-downloads" role="group" aria-label="Download this result"><span>Download:</span>'
        f"{image}{buttons}{copy}{why}</div>"
    )


def link_or_reason(uploaded: bool) -> str:
    """`downloads_html`'s `link` for a generated image or an uploaded one."""
    return "No link: your own picture stays in this browser tab. Save the JSON instead." if uploaded else "copy"
