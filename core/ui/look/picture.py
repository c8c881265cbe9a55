"""The left column: the picture with its overlay, the film strip, and the line that says what is going on."""

from html import escape

from PIL import Image

from core.spec import STAGES, Stage
from core.ui.look.colours import scale_gradient
from core.ui.look.images import data_url
from core.ui.look.scene import Scene, step_stages

_SHOWN_SIDE = 768
"""Largest side at which a picture is sent to the page."""


def stage_html(scene: Scene | None, stages: tuple[Stage, ...] = STAGES, n_steps: int = 25) -> str:
    """The picture and its film strip; without a scene, the room they will take."""
    if scene is None:
        return _stage(None, "", (), n_steps, stages)
    return _stage(
        _shown(scene.image), scene.prompt, scene.frames, scene.steps, stages, own=scene.own, told=about(scene)
    )


def drawing_html(
    latest: Image.Image, prompt: str, frames: tuple[str, ...], n_steps: int, stages: tuple[Stage, ...]
) -> str:
    """The same while it is being drawn: the newest preview large, the strip as far as it is."""
    return _stage(_shown(latest, quality=85), prompt, frames, n_steps, stages, growing=True)


def about(scene: Scene) -> str:
    """Which picture it is, in a line."""
    if scene.own:
        return f"Your picture: “{scene.prompt}”"
    return f"“{scene.prompt}” · seed {scene.seed} · {scene.steps} steps · guidance {scene.guidance:g}"


def _shown(image: Image.Image, quality: int | None = None) -> str:
    shown = image.convert("RGB")
    shown.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return data_url(shown, quality if shown.width <= 256 else quality or 92)


def _stage(
    source: str | None,
    prompt: str,
    frames: tuple[str, ...],
    n_steps: int,
    stages: tuple[Stage, ...],
    own: bool = False,
    growing: bool = False,
    told: str = "",
) -> str:
    if source is None:
        picture = '<p class="id-empty">Your picture will appear here.</p>'
    else:
        picture = (
            f'<img class="id-picture" src="{source}" alt="{escape(prompt)}" decoding="sync" draggable="false">'
            '<img class="id-preview" alt="" hidden decoding="sync">'
            '<img class="id-overlay" alt="" hidden decoding="sync">'
        )
    strip = _own_strip() if own else _strip(frames, n_steps, stages)
    return (
        f'<section class="id-stage{" growing" if growing else ""}" data-about="{escape(told)}">'
        f'<div class="id-canvas">{picture}'
        '<span class="id-tag" aria-live="polite"></span><span class="id-old">previous picture</span></div>'
        f"{_tools()}{strip}</section>"
    )


def _tools() -> str:
    return (
        '<div class="id-tools"><label>overlay <input type="range" class="id-opacity" min="0" max="100" '
        'aria-label="Opacity of the overlay"></label>'
        '<label><input type="checkbox" class="id-common"> same scale for all words</label>'
        f'<span class="id-legend"><span>0</span><i style="background:{scale_gradient()}"></i>'
        '<span class="id-legend-top">bits a cell</span></span></div>'
    )


def _own_strip() -> str:
    text = "A picture of your own was not drawn here, so it has no steps to look at."
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
    label = "Film strip: what the model foresaw at each denoising step"
    return f'<div class="id-strip" role="group" aria-label="{label}">{"".join(groups)}</div>'


def _frame(i: int, n_steps: int, stage: str, frames: tuple[str, ...]) -> str:
    if i >= len(frames):
        return '<span class="id-frame blank"></span>'
    return (
        f'<button type="button" class="id-frame" data-step="{i}" data-stage="{stage}" aria-pressed="false" '
        f'aria-label="Step {i + 1} of {n_steps}, {stage}"><img src="{frames[i]}" alt="" draggable="false"></button>'
    )


def status_html(text: str = "", share: float | None = None, stale: str = "", kind: str = "") -> str:
    """What is being done and how far it is. `stale` names what is old on the page: `picture`, `words` or both."""
    bar = "" if share is None else f'<i style="width:{100 * min(max(share, 0), 1):.1f}%"></i>'
    return (
        f'<div class="id-status {kind}" role="{"alert" if kind == "error" else "status"}" data-stale="{stale}">'
        f'<span>{escape(text)}</span><div class="id-bar">{bar}</div></div>'
    )


def seconds_left(seconds: float | None) -> str:
    """A remaining time in words."""
    if seconds is None:
        return ""
    if seconds < 1.5:
        return " · about 1 s left"
    return f" · about {seconds:.0f} s left" if seconds < 90 else f" · about {seconds / 60:.0f} min left"
