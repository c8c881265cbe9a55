"""Charts over the denoising as SVGs: a word's bits and error curves, a layout's agreement, a concept's strength."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from core.arrays import Floats
from core.spec import STAGES, Stage
from core.ui.look.scene import step_stages

_WIDTH, _HEIGHT = 640.0, 234.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 8.0, 34.0, 46.0


def timeline_svg(
    edges: Floats,
    bits: Floats,
    half_width: Floats,
    label: str,
    top: float | None = None,
    stages: tuple[Stage, ...] = STAGES,
) -> str:
    """One word's timeline as a step function, so that areas are bits; noise on the left, the image on the right.

    `edges` [S + 1] are log-SNRs; `bits` [S] and their 95 % half-widths [S] are per unit of log-SNR; `top` is the upper
    end of the axis, by default this word's own. Colours come from the page's CSS variables.
    """
    joined, bits, half_width = merge_narrow(edges, bits, half_width, step_stages(len(bits), stages))
    xs = _across(joined, edges)
    top = nice_ceiling(float((bits + half_width).max(initial=0.0)) if top is None else top)
    height = partial(_height, top)
    parts = [
        *_axis((0.0, top / 2, top), height, "bits per unit of log-SNR"),
        f'<path class="id-band" d="{_band(xs, height(bits + half_width), height(np.maximum(bits - half_width, 0)))}"/>',
        _area(xs, height(bits), _HEIGHT - _BOTTOM),
        f'<path class="id-line" d="{_steps(xs, height(bits))}"/>',
    ]
    return _over_log_snr(edges, parts, len(bits), label, stages)


def errors_svg(
    edges: Floats, errors: Floats, half_width: Floats, label: str, stages: tuple[Stage, ...] = STAGES
) -> str:
    """Squared errors of two predictions [2, S] with their 95 % half-widths [2, S], on a log axis; the first dashed."""
    names = step_stages(errors.shape[1], stages)
    joined = [merge_narrow(edges, e, h, names) for e, h in zip(errors, half_width, strict=True)]
    drawn = np.array([e for _, e, _ in joined])
    known = drawn[drawn > 0]
    top = nice_ceiling(float(max(e.max() + h[e.argmax()] for _, e, h in joined)))
    bottom = max(1 / nice_ceiling(float(1 / known.min())) if len(known) else 0.0, top / 1e6)
    decades = [10.0**power for power in range(-12, 12) if 1.9 * bottom < 10.0**power < top / 1.9]

    def height(values: Floats) -> Floats:
        return _height(1.0, np.log(np.maximum(values, bottom) / bottom) / np.log(top / bottom))

    parts = _axis((bottom, *decades, top), height, "squared error, logarithmic")
    for (at, values, half), kind in zip(joined, (" dashed", ""), strict=True):
        xs = _across(at, edges)
        parts.append(f'<path class="id-band" d="{_band(xs, height(values + half), height(values - half))}"/>')
        parts.append(f'<path class="id-line{kind}" d="{_steps(xs, height(values))}"/>')
    return _over_log_snr(edges, parts, drawn.shape[1], label, stages)


def difference_svg(
    edges: Floats, bits: Floats, half_width: Floats | None, label: str, stages: tuple[Stage, ...] = STAGES
) -> str:
    """Signed bits [S] per unit of log-SNR: the area above zero minus the area below is in bits."""
    half = np.zeros_like(bits) if half_width is None else half_width
    joined, bits, half = merge_narrow(edges, bits, half, step_stages(len(bits), stages))
    xs = _across(joined, edges)
    top = nice_ceiling(float((bits + half).max(initial=0.0)))
    below = float((half - bits).max(initial=0.0))
    low = nice_ceiling(below) if below > 0 else 0.0

    def height(values: Floats) -> Floats:
        return _height(top + low, values + low)

    zero = float(height(np.array(0.0)))
    ticks = (-low, 0.0, top) if low > top / 6 else (0.0, top)
    parts = [
        *_axis(ticks, height, "bits per unit of log-SNR"),
        f'<path class="id-band" d="{_band(xs, height(bits + half), height(bits - half))}"/>',
        _area(xs, height(bits), zero),
        f'<path class="id-line" d="{_steps(xs, height(bits))}"/>',
    ]
    return _over_log_snr(edges, parts, len(bits), label, stages)


def _over_log_snr(edges: Floats, drawn: list[str], n_drawn: int, label: str, stages: tuple[Stage, ...]) -> str:
    """A chart with log-SNR as its horizontal axis around the parts drawn on it."""
    xs, names = _across(edges, edges), step_stages(len(edges) - 1, stages)
    parts = [
        f'<svg class="id-timeline" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{label}">',
        *_stage_bands(xs, names, stages),
        *drawn,
        *_step_marks(xs, names),
        f'<text class="id-axis" x="{_LEFT}" y="{_HEIGHT - 6}">log-SNR {_signed(edges[0])} (noise)</text>',
        f'<text class="id-axis end" x="{_WIDTH - _RIGHT}" y="16">{_joined_note(n_drawn, len(names))}</text>',
        f'<text class="id-axis end" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}">{_signed(edges[-1])} (picture)</text>',
        "</svg>",
    ]
    return "".join(parts)


def agreement_svg(curves: Mapping[str, Floats], label: str, stages: tuple[Stage, ...] = STAGES) -> str:
    """Mean IoU over the steps, one curve [S] per key; all but the first are hidden, and each carries its key."""
    return _over_steps(curves, 1.0, label, "mean IoU with the final picture", stages)


def strength_svg(strength: Floats, label: str, stages: tuple[Stage, ...] = STAGES) -> str:
    """A concept's mean activation [S] over the steps."""
    return _over_steps({"": strength}, nice_ceiling(float(strength.max())), label, "mean over the picture", stages)


def _over_steps(curves: Mapping[str, Floats], top: float, label: str, unit: str, stages: tuple[Stage, ...]) -> str:
    n_steps = len(next(iter(curves.values())))
    edges = np.arange(n_steps + 1.0)
    names, xs = step_stages(n_steps, stages), _across(edges, edges)
    height = partial(_height, top)
    lines = "".join(
        f'<path class="id-line" data-choice="{key}"{" hidden" if i else ""} '
        f'd="{_points((xs[1:] + xs[:-1]) / 2, height(values))}"/>'
        for i, (key, values) in enumerate(curves.items())
    )
    parts = [
        f'<svg class="id-timeline" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{label}">',
        *_stage_bands(xs, names, stages),
        *_axis((0.0, top / 2, top), height, unit),
        lines,
        *_step_marks(xs, names),
        f'<text class="id-axis" x="{_LEFT}" y="{_HEIGHT - 6}">step 1 (noise)</text>',
        f'<text class="id-axis end" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}">step {n_steps} (picture)</text>',
        "</svg>",
    ]
    return "".join(parts)


def common_top(edges: Floats, bits: Floats, half_width: Floats, stages: tuple[Stage, ...] = STAGES) -> float:
    """The upper end of an axis shared by all words [W, S]."""
    names = step_stages(bits.shape[1], stages)
    merged = [merge_narrow(edges, b, h, names) for b, h in zip(bits, half_width, strict=True)]
    return max((float((b + h).max(initial=0.0)) for _, b, h in merged), default=0.0)


def merge_narrow(
    edges: Floats, bits: Floats, half_width: Floats, names: list[str], share: float = 0.045
) -> tuple[Floats, Floats, Floats]:
    """Merge neighbouring bins of one stage until each is at least `share` of the axis wide; areas are preserved.

    Early steps are so close in log-SNR that few noise samples fall into each. Errors are combined as if independent.
    """
    least = share * float(edges[-1] - edges[0])
    groups: list[list[int]] = []
    for i, name in enumerate(names):
        open_one = groups[-1] if groups and names[groups[-1][0]] == name else None
        if open_one and edges[open_one[-1] + 1] - edges[open_one[0]] < least:
            open_one.append(i)
        else:
            groups.append([i])
    widths = np.diff(edges)
    totals = np.array([float((bits[g] * widths[g]).sum()) for g in groups])
    errors = np.array([float(np.sqrt(((half_width[g] * widths[g]) ** 2).sum())) for g in groups])
    joined = np.array([edges[0], *(edges[g[-1] + 1] for g in groups)])
    across = np.maximum(np.diff(joined), 1e-12)
    return joined, totals / across, errors / across


def nice_ceiling(value: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is at least `value`."""
    if not np.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9)))


def _stage_bands(xs: Floats, names: list[str], stages: tuple[Stage, ...]) -> list[str]:
    parts = []
    for stage in stages:
        inside = [i for i, name in enumerate(names) if name == stage.name]
        if not inside:
            continue
        x0, x1 = float(xs[inside[0]]), float(xs[inside[-1] + 1])
        parts.append(
            f'<rect class="id-stage-band {stage.name}" x="{x0:.1f}" y="{_TOP:g}" width="{max(x1 - x0, 0):.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM:g}"/>'
            f'<rect class="id-stage-edge {stage.name}" x="{x0:.1f}" y="{_HEIGHT - _BOTTOM:g}" '
            f'width="{max(x1 - x0, 0):.1f}" height="4"/>'
        )
        if x1 - x0 > 36:
            parts.append(
                f'<text class="id-stage-name {stage.name}" x="{(x0 + x1) / 2:.1f}" y="{_HEIGHT - _BOTTOM + 18:g}">'
                f"{stage.name}</text>"
            )
    return parts


def _axis(ticks: Sequence[float], height: Callable[[Floats], Floats], unit: str) -> list[str]:
    parts = []
    for value in ticks:
        y = float(height(np.array(value)))
        parts.append(
            f'<line class="id-grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="id-axis end" x="{_LEFT - 6}" y="{y + 4:.1f}">{_tick(value)}</text>'
        )
    parts.append(f'<text class="id-axis" x="0" y="16">{unit}</text>')
    return parts


def _step_marks(xs: Floats, names: list[str]) -> list[str]:
    """Invisible columns: hovering shows the step's number, clicking selects the step."""
    return [
        f'<rect class="id-bin" data-step="{i}" x="{xs[i]:.1f}" y="{_TOP:g}" width="{max(xs[i + 1] - xs[i], 0):.1f}" '
        f'height="{_HEIGHT - _TOP - _BOTTOM:g}"><title>step {i + 1}, {name}</title></rect>'
        for i, name in enumerate(names)
    ]


def _joined_note(n_drawn: int, n_steps: int) -> str:
    return "" if n_drawn == n_steps else f"{n_steps} steps, the narrowest merged"


def _across(edges: Floats, whole: Floats) -> Floats:
    share = (edges - whole[0]) / max(float(whole[-1] - whole[0]), 1e-9)
    return np.asarray(_LEFT + share * (_WIDTH - _LEFT - _RIGHT))


def _height(top: float, values: Floats) -> Floats:
    return np.asarray(_HEIGHT - _BOTTOM - np.clip(values / top, 0, 1) * (_HEIGHT - _TOP - _BOTTOM))


def _tick(value: float) -> str:
    """A number short enough for the axis of a narrow chart."""
    if 0 < value < 0.1:
        return f"{value:g}".removeprefix("0")
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


def _steps(xs: Floats, ys: Floats) -> str:
    return f"M{xs[0]:.1f},{ys[0]:.1f}" + "".join(f"V{y:.1f}H{x:.1f}" for x, y in zip(xs[1:], ys, strict=True))


def _area(xs: Floats, ys: Floats, zero: float) -> str:
    return f'<path class="id-area" d="{_steps(xs, ys)}V{zero:g}H{xs[0]:.1f}Z"/>'


def _points(xs: Floats, ys: Floats) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _band(xs: Floats, upper: Floats, lower: Floats) -> str:
    back = "".join(f"V{y:.1f}H{x:.1f}" for x, y in zip(xs[-2::-1], lower[::-1], strict=True))
    return _steps(xs, upper) + back + "Z"
