"""The left column: the image with its overlay, the film strip, and the status line."""

from html import escape

from PIL import Image

from core.spec import STAGES, Stage
from core.ui.look.colours import scale_gradient
from core.ui.look.images import data_url
from core.ui.look.scene import Scene, step_stages

_ARROW = (
    '<svg class="id-arrow" viewBox="0 0 100 100" aria-hidden="true" hidden><defs><marker id="id-tip" refX="3" refY="2" '
    'markerWidth="4" markerHeight="4" orient="auto"><path d="M0 0 L4 2 L0 4 z" fill="#fff"/></marker></defs>'
    '<line stroke="#fff" stroke-width="1.6" stroke-linecap="round" marker-end="url(#id-tip)"/></svg>'
)
"""Where an object is dragged; hidden until one is."""
_SHOWN_SIDE = 768
"""Largest side at which an image is sent to the page."""


def viewer_html(scene: Scene | None, stages: tuple[Stage, ...] = STAGES, n_steps: int = 25) -> str:
    """The image and its film strip; without a scene, a placeholder of the same size."""
    if scene is None:
        return _viewer(None, "", (), n_steps, stages)
    return _viewer(
        _shown(scene.image),
        scene.prompt,
        scene.frames,
        scene.steps,
        stages,
        uploaded=scene.uploaded,
        description=about(scene),
    )


def progress_viewer_html(
    latest: Image.Image, prompt: str, frames: tuple[str, ...], n_steps: int, stages: tuple[Stage, ...]
) -> str:
    """The viewer while an image is generated: the newest preview, and the film strip so far."""
    return _viewer(_shown(latest, quality=85), prompt, frames, n_steps, stages, growing=True)


def about(scene: Scene) -> str:
    """The image's prompt and settings in one line."""
    if scene.uploaded:
        return f"Your picture: “{scene.prompt}”"
    return f"“{scene.prompt}” · seed {scene.seed} · {scene.steps} steps · guidance {scene.guidance:g}"


def _shown(image: Image.Image, quality: int | None = None) -> str:
    shown = image.convert("RGB")
    shown.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return data_url(shown, quality if shown.width <= 256 else quality or 92)


def _viewer(
    source: str | None,
    prompt: str,
    frames: tuple[str, ...],
    n_steps: int,
    stages: tuple[Stage, ...],
    uploaded: bool = False,
    growing: bool = False,
    description: str = "",
) -> str:
    if source is None:
        image = '<p class="id-empty">Your picture will appear here.</p>'
    else:
        image = (
            f'<img class="id-image" src="{source}" alt="{escape(prompt)}" decoding="sync" draggable="false">'
            '<img class="id-preview" alt="" hidden decoding="sync">'
            '<img class="id-overlay" alt="" hidden decoding="sync">'
            '<canvas class="id-paint" width="32" height="32" aria-hidden="true" hidden></canvas>'
            f"{_ARROW}"
            '<i class="id-cursor" aria-hidden="true" hidden></i>'
        )
    strip = _no_strip() if uploaded else _strip(frames, n_steps, stages)
    return (
        f'<section class="id-viewer{" growing" if growing else ""}" data-about="{escape(description)}">'
        '<div class="id-canvas" tabindex="0" role="group" '
        f'aria-label="The picture. Arrow keys move over it, Enter chooses.">{image}'
        '<span class="id-sr id-spoken" aria-live="polite"></span><span class="id-tag" aria-live="polite"></span>'
        '<span class="id-old">previous picture</span></div>'
        f"{_tools()}{strip}</section>"
    )


def _tools() -> str:
    return (
        '<div class="id-tools"><label>overlay <input type="range" class="id-opacity" min="0" max="100" '
        'aria-label="Opacity of the overlay"></label>'
        '<label title="One scale for all words"><input type="checkbox" class="id-common"> same scale</label>'
        '<label><input type="checkbox" class="id-changes"> show what changed</label>'
        '<button type="button" class="id-button id-before" hidden>Hold: original (B)</button>'
        f'<span class="id-legend"><span>0</span><i style="background:{scale_gradient()}"></i>'
        '<span class="id-legend-top">bits per cell</span></span></div>'
    )


def _no_strip() -> str:
    text = "Your own picture was not generated here, so it has no denoising steps to show."
    return f'<div class="id-strip none"><p class="id-empty">{text}</p></div>'


def _strip(frames: tuple[str, ...], n_steps: int, stages: tuple[Stage, ...]) -> str:
    names = step_stages(n_steps, stages)
    groups = []
    for stage in stages:
        steps = [i for i, name in enumerate(names) if name == stage.name]
        if not steps:
            continue
        cells = "".join(_frame(i, n_steps, stage.name, frames) for i in steps)
        span = f"{steps[0] + 1}–{steps[-1] + 1}" if len(steps) > 1 else f"{steps[0] + 1}"
        groups.append(
            f'<div class="id-group {stage.name}" style="--n:{len(steps)}"><div class="id-frames">{cells}</div>'
            f'<div class="id-group-name"><b>{stage.name}</b> {span}</div></div>'
        )
    label = "Film strip: the denoised preview at each step"
    return f'<div class="id-strip" role="group" aria-label="{label}">{"".join(groups)}</div>'


def _frame(i: int, n_steps: int, stage: str, frames: tuple[str, ...]) -> str:
    if i >= len(frames):
        return '<span class="id-frame blank"></span>'
    return (
        f'<button type="button" class="id-frame" data-step="{i}" data-stage="{stage}" aria-pressed="false" '
        f'aria-label="Step {i + 1} of {n_steps}, {stage}"><img src="{frames[i]}" alt="" draggable="false"></button>'
    )


def status_html(text: str = "", share: float | None = None, stale: str = "", kind: str = "", asked: str = "") -> str:
    """The status line.

    Args:
        text: What is being done, or what went wrong.
        share: The progress, 0..1; None if nothing is being done.
        stale: What is outdated: any of `image`, `words` and `edits`, with spaces between them.
        kind: `error`, or empty.
        asked: Query parameters of the image that a job just begun will draw; the address holds them from then on, so
            that a reload in mid-job loses nothing.
    """
    bar = "" if share is None else f'<i style="width:{100 * min(max(share, 0), 1):.1f}%"></i>'
    return (
        f'<div class="id-status {kind}" role="{"alert" if kind == "error" else "status"}" data-stale="{stale}"'
        f' data-asked="{escape(asked)}">'
        f'<span>{escape(text)}</span><div class="id-bar">{bar}</div></div>'
    )


def seconds_left(seconds: float | None) -> str:
    """A remaining time in words."""
    if seconds is None:
        return ""
    if seconds < 1.5:
        return " · about 1 s left"
    return f" · about {seconds:.0f} s left" if seconds < 90 else f" · about {seconds / 60:.0f} min left"
