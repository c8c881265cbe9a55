"""What the answers to further questions about a picture's words share: progress, what to keep, how they ended."""

from collections.abc import Mapping
from html import escape

from core.information.results import Measurement
from core.ui.look.export import download_url
from core.ui.look.images import data_url
from core.ui.look.picture import about
from core.ui.look.scene import Scene

STOPPED = {
    "converged": "the wanted certainty was reached",
    "budget": "the budget was spent before the wanted certainty was reached",
    "cancelled": "stopped early",
}
_SMALL = 160
"""Pixels of the picture behind a small map."""


def asking_html(text: str = "", share: float | None = None, kind: str = "") -> str:
    """What is being done for a question and how far it is; while something is, it can be stopped."""
    bar = "" if share is None else f'<i style="width:{100 * min(max(share, 0), 1):.1f}%"></i>'
    stop = "" if share is None else '<button type="button" class="id-button id-stop">Stop</button>'
    role = "alert" if kind == "error" else "status"
    return (
        f'<div class="id-asking {kind}" role="{role}"><div><span>{escape(text)}</span><div class="id-bar">{bar}</div>'
        f"</div>{stop}</div>"
    )


def empty_html(name: str, text: str) -> str:
    """The room that an answer will take."""
    return f'<div class="id-answer id-{name} empty"><p class="id-empty">{text}</p></div>'


def answer_html(name: str, scene: Scene, running: bool, data: Mapping[str, str], body: str) -> str:
    """An answer about a picture. The page's script reads `data`, and greys what is about another picture."""
    told = "".join(f' data-{key}="{escape(value)}"' for key, value in {**data, "about": about(scene)}.items())
    return (
        f'<div class="id-answer id-{name}{" running" if running else ""}"{told} '
        f'style="--id-small:url({_small_image(scene)})"><p class="id-old"></p>{body}</div>'
    )


def keep_html(name: str, csv: str, json: str, link: bool, pictures: bool = True) -> str:
    """Downloads and the link; pictures are put together by the page's script."""
    png = '<button type="button" class="id-button id-answer-png">PNG</button>' if pictures else ""
    copy = '<button type="button" class="id-button id-link">Copy link</button>' if link else ""
    return (
        '<div class="id-keep" role="group" aria-label="Keep this result"><span>Keep this:</span>'
        f"{png}"
        f'<a class="id-button" download="{name}.csv" href="{download_url(csv, "text/csv")}">CSV</a>'
        f'<a class="id-button" download="{name}.json" href="{download_url(json, "application/json")}">JSON</a>{copy}'
        "</div>"
    )


def code_html(lines: str) -> str:
    """Python lines to copy, folded."""
    return (
        '<details class="id-more"><summary>Repeat this in Python</summary><div class="id-code">'
        f'<button type="button" class="id-button id-copy">Copy</button><pre>{escape(lines)}</pre></div></details>'
    )


def ended(result: Measurement, running: bool) -> str:
    """What it took, and why it stopped there."""
    how = "still measuring" if running else STOPPED[result.stopped]
    return f"{result.n_evals:,} U-Net evaluations in {result.n_replicates} independent repeats; {how}."


def _small_image(scene: Scene) -> str:
    """The scene's picture, small, as a data URL: what lies behind small maps."""
    image = scene.image.convert("RGB")
    image.thumbnail((_SMALL, _SMALL))
    return data_url(image, quality=80)
