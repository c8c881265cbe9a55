"""What the answers to further questions share: progress, downloads, and how the measurement ended."""

from collections.abc import Mapping
from html import escape

from core.information.results import Measurement
from core.ui.look.blocks import downloads_html, link_or_reason
from core.ui.look.export import download_url
from core.ui.look.images import data_url
from core.ui.look.scene import Scene
from core.ui.look.viewer import about

STOPPED = {
    "converged": "the requested precision was reached",
    "budget": "the budget was spent before the requested precision was reached",
    "cancelled": "stopped early",
}
_SMALL = 160
"""Side in pixels of the image behind a small map."""


def progress_html(text: str = "", share: float | None = None, kind: str = "") -> str:
    """What is being computed for a question and how far it is; a running computation can be stopped."""
    bar = "" if share is None else f'<i style="width:{100 * min(max(share, 0), 1):.1f}%"></i>'
    stop = "" if share is None else '<button type="button" class="id-button id-stop">Stop</button>'
    role = "alert" if kind == "error" else "status"
    return (
        f'<div class="id-question-progress {kind}" role="{role}"><div><span>{escape(text)}</span>'
        f'<div class="id-bar">{bar}</div></div>{stop}</div>'
    )


def empty_html(name: str, text: str) -> str:
    """The space reserved for an answer."""
    return f'<div class="id-answer id-{name} empty"><p class="id-empty">{text}</p></div>'


def answer_html(name: str, scene: Scene, running: bool, data: Mapping[str, str], body: str) -> str:
    """An answer about an image. The page's script reads `data`, and greys out answers about another image."""
    attributes = "".join(f' data-{key}="{escape(value)}"' for key, value in {**data, "about": about(scene)}.items())
    return (
        f'<div class="id-answer id-{name}{" running" if running else ""}"{attributes} '
        f'style="--id-small:url({_small_image(scene)})"><p class="id-old"></p>{body}</div>'
    )


def answer_downloads(name: str, csv: str, json: str, scene: Scene, image: bool = True) -> str:
    """Downloads of an answer and its link; the PNG is put together by the page's script."""
    files = (
        ("CSV", f"{name}.csv", download_url(csv, "text/csv")),
        ("JSON", f"{name}.json", download_url(json, "application/json")),
    )
    return downloads_html(files, "id-answer-png" if image else "", link_or_reason(scene.uploaded))


def stopped_note(result: Measurement, running: bool) -> str:
    """How many evaluations were made, and why they stopped."""
    how = "still measuring" if running else STOPPED[result.stopped]
    return f"{result.n_evals:,} U-Net evaluations in {result.n_replicates} independent repeats; {how}."


def _small_image(scene: Scene) -> str:
    """The scene's image, small, as a data URL: the background of small maps."""
    image = scene.image.convert("RGB")
    image.thumbnail((_SMALL, _SMALL))
    return data_url(image, quality=80)
