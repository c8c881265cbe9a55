"""HTML of an edit's effect: the request, the figures in words, a map of the change, the three stages side by side."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from core.diffusion.schedule import stage_steps
from core.spec import Stage
from core.ui.backend.jobs import EditProgress
from core.ui.backend.runtime import Runtime
from core.ui.interventions.export import link_query, png_url, python_lines, to_json
from core.ui.interventions.request import EditRequest
from core.ui.interventions.results import EditComparison, EditResult, ObjectChange
from core.ui.look.blocks import downloads_html, folded_code_html, table_html
from core.ui.look.colours import scale_gradient, scale_rgb
from core.ui.look.export import download_url
from core.ui.look.images import data_url, layer

_FULL_SCALE = 0.25
"""Change (0..1) with the brightest colour on the map: the same for all images."""


def comparison_html(runtime: Runtime, comparison: EditComparison) -> str:
    """All that was measured, and its downloads."""
    assert runtime.dictionary is not None
    results = comparison.results
    compare = len(results) > 1
    query = link_query(comparison.scene, comparison.requests, compare)
    body = _stages(comparison, runtime.spec.stages) if compare else _one(comparison)
    return (
        f'<div class="id-iv" data-query="{escape(query)}" data-change="{_overlay_url(results[0])}" '
        f'data-edited="{data_url(results[0].image)}">'
        f'<p class="id-old">previous picture</p>{_requests(comparison)}{body}{_explained(comparison)}'
        f"{_downloads(runtime, comparison)}{_python(runtime, comparison)}</div>"
    )


def _requests(comparison: EditComparison) -> str:
    compare = len(comparison.results) > 1
    text = "; ".join(escape(one.describe(comparison.scene.steps, with_time=not compare)) for one in comparison.requests)
    return f'<p class="id-iv-lead"><b>{text}</b>{", at each of the three stages" if compare else ""}</p>'


def edit_progress_html(item: EditProgress, names: Sequence[str]) -> str:
    """Previews of the images while they are generated, each with its name."""
    figures = "".join(
        f'<figure class="{name}"><img src="{frame}" alt=""><figcaption>{name}</figcaption></figure>'
        for name, frame in zip(names, item.frames, strict=True)
    )
    return (
        f'<div class="id-iv running"><p class="id-iv-lead">Step {item.done} of {item.n_steps}: denoised '
        f'previews.</p><div class="id-iv-row">{figures}</div></div>'
    )


def _map_url(result: EditResult) -> str:
    shown = layer(result.change, np.zeros_like(result.change), _FULL_SCALE)
    return data_url(shown, quality=80)


def _overlay_url(result: EditResult) -> str:
    """The change map as an overlay, transparent where nothing changed."""
    share = np.clip(result.change / _FULL_SCALE, 0, 1)
    rgba = np.concatenate([scale_rgb(share), np.minimum(2 * share, 1)[..., None]], axis=-1)
    return data_url(Image.fromarray((rgba * 255).round().astype(np.uint8), "RGBA"), quality=80)


def _one(comparison: EditComparison) -> str:
    """The figures of a single result next to its map."""
    result = comparison.results[0]
    return (
        f'<div class="id-iv-one">{_figures(result, comparison)}'
        f'<figure><img src="{_map_url(result)}" alt="Map of what changed">'
        f"<figcaption>Where it changed: {_scale()}</figcaption></figure></div>"
    )


def _scale() -> str:
    return (
        f'<span class="id-iv-scale">nothing <i style="background:{scale_gradient()}"></i> {_FULL_SCALE:.0%} of full '
        "brightness or more</span>"
    )


def _figures(result: EditResult, comparison: EditComparison) -> str:
    lines = [_object_line(one, change, comparison) for one, change in zip(result.requests, result.objects, strict=True)]
    if result.lost:
        lines.append(f"<b>{_lost(result.lost)}</b>, according to the segmenter.")
    items = "".join(f"<li>{line}</li>" for line in (*lines, *_others(result, comparison)))
    return f'<ul class="id-iv-findings">{items}</ul>'


def _object_line(request: EditRequest, change: ObjectChange | None, comparison: EditComparison) -> str:
    """Whether the edit did what was requested, in words."""
    name = escape(request.label or f"concepts {request.what}")
    if change is None:
        if not comparison.segmented:
            return f"Without a segmenter we cannot measure whether <b>{name}</b> worked; compare the pictures."
        return f"We cannot measure automatically whether <b>{name}</b> worked; compare the pictures."
    before, after = change.present
    if request.kind != "move":
        areas = f"from {_percent(change.area[0])} to <b>{_percent(change.area[1])}</b> of the picture"
        gone = request.kind == "remove" and before and not after
        return f"{'Removed: ' if gone else ''}<b>{name}</b> went {areas}, according to the segmenter."
    if not after:
        was = "was there before and is gone" if before else "is in neither picture"
        return f"Not done: <b>{name}</b> {was}, according to the segmenter."
    share = f"{_percent(change.inside[1])} of it lies there now"
    if before:
        share += f", {_percent(change.inside[0])} before"
    done = "Done" if change.centre_inside[1] else "Not done"
    where = "in" if change.centre_inside[1] else "outside"
    added = "" if before else ", which was not there before,"
    return f"{done}: the centre of <b>{name}</b>{added} is {where} the region ({share})."


def _lost(names: Sequence[str]) -> str:
    each = [f"the {escape(name)}" for name in names]
    listed = " and ".join([", ".join(each[:-1]), each[-1]] if len(each) > 1 else each)
    return f"But {listed} {'is' if len(each) == 1 else 'are'} gone"


def _others(result: EditResult, comparison: EditComparison) -> list[str]:
    lines = []
    if math.isfinite(result.low):
        lines.append(
            f"Elsewhere, broad shapes and colours changed by <b>{_percent(result.low)}</b> of full brightness, "
            f"fine detail by <b>{_percent(result.high)}</b>."
        )
    else:
        lines.append("The edit covers the whole picture, so side effects cannot be separated.")
    if math.isfinite(result.layout):
        lines.append(f"Rest of the layout: <b>{result.layout:.0%}</b> unchanged (IoU {result.layout:.2f}).")
    elif not comparison.segmented:
        lines.append("Whether the rest of the layout changed cannot be measured: this model comes without a segmenter.")
    out_of_range = result.out_of_range
    if math.isfinite(out_of_range.share):
        lines.append(
            f"<b>{_percent(out_of_range.share)}</b> of the edited concepts’ values are outside the normal range (up to "
            f"<b>{out_of_range.times:.1f}</b> ×)."
        )
    else:
        lines.append(
            "None of the edited concepts is active where the edit acts, so no value is outside the normal range."
        )
    return lines


def _stages(comparison: EditComparison, stages: tuple[Stage, ...]) -> str:
    """The same edit at three stages: images to choose, and their figures as a table."""
    spans = {stage.name: stage_steps(stage, comparison.scene.steps, stages) for stage in stages}
    figures = "".join(
        f'<figure class="{result.stage}"><button type="button" class="id-iv-choose" data-index="{i}" '
        f'aria-pressed="{"true" if i == 0 else "false"}" data-change="{_overlay_url(result)}" '
        f'data-edited="{data_url(result.image)}">'
        f'<img src="{data_url(result.image)}" alt="edited {result.stage}">'
        f'<img src="{_map_url(result)}" alt="what changed"></button>'
        f"<figcaption><b>{result.stage}</b> {spans[result.stage][0] + 1}–{spans[result.stage][-1] + 1}</figcaption>"
        "</figure>"
        for i, result in enumerate(comparison.results)
    )
    rows = [
        ("other objects gone", [escape(", ".join(result.lost)) or "none" for result in comparison.results]),
        ("broad change elsewhere", [_maybe(result.low) for result in comparison.results]),
        ("fine change elsewhere", [_maybe(result.high) for result in comparison.results]),
        ("same layout elsewhere (IoU)", [_maybe(result.layout, "{:.2f}") for result in comparison.results]),
        ("values outside the normal range", [_maybe(result.out_of_range.share) for result in comparison.results]),
    ]
    outcomes = [
        (
            f"{escape(request.what)}: worked?",
            [_short(request, result.objects[i]) for result in comparison.results],
        )
        for i, request in enumerate(comparison.requests)
    ]
    heads = "".join(
        f'<th scope="col"><span class="id-key {result.stage}"></span>{result.stage}</th>'
        for result in comparison.results
    )
    cells = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>'
        for name, values in (*outcomes, *rows)
    )
    return (
        f'<div class="id-iv-row three">{figures}</div><p class="id-hint">Choose one to see it large. Below '
        f"each: where it changed, {_scale()}</p>"
        + table_html(
            f"<thead><tr><td></td>{heads}</tr></thead><tbody>{cells}</tbody>", "Figures", "id-more id-iv-table"
        )
    )


def _short(request: EditRequest, change: ObjectChange | None) -> str:
    if change is None:
        return "unknown"
    if request.kind == "move":
        return "yes" if change.centre_inside[1] else "no" if change.present[1] else "gone"
    return f"{_percent(change.area[0])} → {_percent(change.area[1])}"


def _explained(comparison: EditComparison) -> str:
    """What the figures mean, one sentence each."""
    judge = (
        "Objects are located by the model’s <dfn>segmenter</dfn>, another network, which can err. "
        if comparison.segmented
        else ""
    )
    return (
        '<details class="id-more id-iv-explained"><summary>What these figures mean</summary>'
        f'<p class="id-hint">{judge}<dfn>Elsewhere</dfn> is outside the region and where '
        "the object was; for a change of the whole picture it is everything. Change is the root mean square difference "
        "to the unedited picture of the same seed: <dfn>broad</dfn> (low spatial frequency) for means over 8 × 8 "
        "pixels, <dfn>fine</dfn> (high) for the rest. <dfn>IoU</dfn> (intersection over union) compares the cells of "
        "each class before and after; the mean is over classes.</p>"
        '<p class="id-hint"><dfn>Outside the normal range</dfn> (out of distribution): whenever an edited concept is '
        "active where and while the edit acts, its value is compared with the 99th percentile of its values in "
        "ordinary pictures. Without an edit, about 1 % exceed it; the more do, the further the model is from what it "
        "was trained on.</p></details>"
    )


def _downloads(runtime: Runtime, comparison: EditComparison) -> str:
    assert runtime.dictionary is not None
    document = download_url(to_json(comparison, runtime.name, runtime.dictionary.source), "application/json")
    images = [("unedited", comparison.unedited)]
    images += [
        (f"edited{f'-{one.stage}' if len(comparison.results) > 1 else ''}", one.image) for one in comparison.results
    ]
    files = [(f"PNG {name.replace('-', ' ')}", f"{name}.png", png_url(image)) for name, image in images]
    return downloads_html([*files, ("JSON", "interventions.json", document)], link="copy")


def _python(runtime: Runtime, comparison: EditComparison) -> str:
    assert runtime.dictionary is not None
    stages = tuple(one.stage for one in comparison.results if one.stage)
    lines = python_lines(comparison.scene, comparison.requests, runtime.name, runtime.dictionary.source, stages)
    return folded_code_html(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"


def _maybe(value: float, form: str = "") -> str:
    if not math.isfinite(value):
        return "none"
    return form.format(value) if form else _percent(value)
