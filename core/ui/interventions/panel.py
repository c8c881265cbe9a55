"""HTML of what edits did: the wish, the figures in plain words, a map of the change, the three stages side by side."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from core.diffusion.schedule import stage_steps
from core.spec import Stage
from core.ui.interventions.export import link_query, png_url, python_lines, to_json
from core.ui.interventions.request import EditRequest
from core.ui.interventions.results import Moved, Outcome, Result
from core.ui.jobs import Redrawing
from core.ui.look.colours import scale_gradient, scale_rgb
from core.ui.look.export import download_url
from core.ui.look.images import data_url, layer
from core.ui.runtime import Runtime

_SIDE = 512
"""Pixels to which a small picture is enlarged for the slider."""
_MUCH = 0.25
"""Change, in shares of the range of grey, that has the brightest colour on the map: the same for all pictures."""


def outcome_html(runtime: Runtime, outcome: Outcome) -> str:
    """All that was found, and what can be kept of it."""
    assert runtime.dictionary is not None
    results = outcome.results
    compare = len(results) > 1
    asked = link_query(outcome.scene, outcome.asked, compare)
    body = _stages(outcome, runtime.spec.stages) if compare else _one(outcome)
    return (
        f'<div class="id-iv" data-query="{escape(asked)}" data-change="{_overlay_url(results[0])}">'
        f'<p class="id-old">previous picture</p>{_requests(outcome)}{body}{_explained(outcome)}'
        f"{_keep(runtime, outcome)}{_python(runtime, outcome)}</div>"
    )


def _requests(outcome: Outcome) -> str:
    compare = len(outcome.results) > 1
    told = "; ".join(escape(one.told(outcome.scene.steps, with_time=not compare)) for one in outcome.asked)
    return f'<p class="id-iv-lead"><b>{told}</b>{", at each of the three stages" if compare else ""}</p>'


def drawing_html(item: Redrawing, names: Sequence[str]) -> str:
    """The pictures as they are drawn, each with its name."""
    figures = "".join(
        f'<figure class="{name}"><img src="{frame}" alt=""><figcaption>{name}</figcaption></figure>'
        for name, frame in zip(names, item.frames, strict=True)
    )
    return (
        f'<div class="id-iv running"><p class="id-iv-lead">Step {item.done} of {item.n_steps}: what the pictures are '
        f'going to be.</p><div class="id-iv-row">{figures}</div></div>'
    )


def slider_images(outcome: Outcome, index: int = 0) -> tuple[Image.Image, Image.Image]:
    """The unedited and an edited picture, large enough to look at."""
    return _large(outcome.unedited), _large(outcome.results[index].image)


def _large(image: Image.Image) -> Image.Image:
    scale = max(round(_SIDE / image.width), 1)
    size = (image.width * scale, image.height * scale)
    return image.resize(size, Image.Resampling.BICUBIC) if scale > 1 else image


def _map_url(result: Result) -> str:
    shown = layer(result.change, np.zeros_like(result.change), _MUCH)
    return data_url(shown, quality=80)


def _overlay_url(result: Result) -> str:
    """The same to lie on the unedited picture, which is seen where nothing changed."""
    share = np.clip(result.change / _MUCH, 0, 1)
    rgba = np.concatenate([scale_rgb(share), np.minimum(2 * share, 1)[..., None]], axis=-1)
    return data_url(Image.fromarray((rgba * 255).round().astype(np.uint8), "RGBA"), quality=80)


def _one(outcome: Outcome) -> str:
    """The figures of a single result beside its map."""
    result = outcome.results[0]
    return (
        f'<div class="id-iv-one">{_figures(result, outcome)}'
        f'<figure><img src="{_map_url(result)}" alt="Map of what changed">'
        f"<figcaption>Where it changed: {_scale()}</figcaption></figure></div>"
    )


def _scale() -> str:
    return (
        f'<span class="id-iv-scale">nothing <i style="background:{scale_gradient()}"></i> {_MUCH:.0%} of the range of '
        "brightness or more</span>"
    )


def _figures(result: Result, outcome: Outcome) -> str:
    lines = [_moved_line(one, moved, outcome) for one, moved in zip(result.requests, result.moved, strict=True)]
    return f'<ul class="id-iv-said">{"".join(f"<li>{line}</li>" for line in (*lines, *_others(result, outcome)))}</ul>'


def _moved_line(request: EditRequest, moved: Moved | None, outcome: Outcome) -> str:
    """Was it done what was asked? In words."""
    name = escape(request.label or f"concepts {request.what}")
    if moved is None:
        if not outcome.segmented:
            return f"Did <b>{name}</b> do as asked? No segmenter comes with this model, so nobody but you can tell."
        return f"Did <b>{name}</b> do as asked? The segmenter finds things and places, not this: look for yourself."
    before, after = moved.there
    if request.kind != "move":
        areas = f"from {_percent(moved.area[0])} to <b>{_percent(moved.area[1])}</b> of the picture"
        gone = request.kind == "remove" and before and not after
        return f"{'Taken away: ' if gone else ''}<b>{name}</b> went {areas}, as the segmenter sees it."
    if not after:
        was = "was there and is lost" if before else "is not to be found, before or after"
        return f"Not done: <b>{name}</b> {was}, as the segmenter sees it."
    share = f"{_percent(moved.inside[1])} of it lies where you asked"
    if before:
        share += f", {_percent(moved.inside[0])} did before"
    done = "Done" if moved.centre_inside[1] else "Not done"
    where = "in" if moved.centre_inside[1] else "outside"
    drawn = "" if before else " was not there before;"
    return f"{done}: <b>{name}</b>{drawn} has its centre {where} the region ({share})."


def _others(result: Result, outcome: Outcome) -> list[str]:
    lines = []
    if math.isfinite(result.low):
        lines.append(
            f"Elsewhere, broad shapes and colours changed by <b>{_percent(result.low)}</b> of the range of brightness, "
            f"fine detail by <b>{_percent(result.high)}</b>."
        )
    else:
        lines.append("The edits reach everything, so there is no elsewhere in which to look for side effects.")
    if math.isfinite(result.layout):
        lines.append(f"What is where elsewhere stayed the same to <b>{result.layout:.2f}</b> of 1 (IoU).")
    elif not outcome.segmented:
        lines.append("Whether what is where stayed the same, nobody can tell: no segmenter comes with this model.")
    out_of_range = result.out_of_range
    if math.isfinite(out_of_range.share):
        lines.append(
            f"<b>{_percent(out_of_range.share)}</b> of the edited concepts’ values lie beyond what data have, the largest at "
            f"<b>{out_of_range.times:.1f}</b> times the usual most."
        )
    else:
        lines.append("None of the edited concepts is active where the edit acts: nothing lies beyond what data have.")
    return lines


def _stages(outcome: Outcome, stages: tuple[Stage, ...]) -> str:
    """The same edit at three stages: pictures to choose for the slider, and their figures as a table."""
    spans = {stage.name: stage_steps(stage, outcome.scene.steps, stages) for stage in stages}
    figures = "".join(
        f'<figure class="{result.stage}"><button type="button" class="id-iv-choose" data-index="{i}" '
        f'aria-pressed="{"true" if i == 0 else "false"}" data-change="{_overlay_url(result)}">'
        f'<img src="{data_url(result.image)}" alt="edited {result.stage}">'
        f'<img src="{_map_url(result)}" alt="what changed"></button>'
        f"<figcaption><b>{result.stage}</b> {spans[result.stage][0] + 1}–{spans[result.stage][-1] + 1}</figcaption>"
        "</figure>"
        for i, result in enumerate(outcome.results)
    )
    rows = [
        ("broad change elsewhere", [_maybe(result.low) for result in outcome.results]),
        ("fine change elsewhere", [_maybe(result.high) for result in outcome.results]),
        ("same layout elsewhere (IoU)", [_maybe(result.layout, "{:.2f}") for result in outcome.results]),
        ("values beyond data", [_maybe(result.out_of_range.share) for result in outcome.results]),
    ]
    asked = [
        (
            f"{escape(request.what)}: as asked?",
            [_short(request, result.moved[i]) for result in outcome.results],
        )
        for i, request in enumerate(outcome.asked)
    ]
    heads = "".join(
        f'<th scope="col"><span class="id-key {result.stage}"></span>{result.stage}</th>' for result in outcome.results
    )
    cells = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>'
        for name, values in (*asked, *rows)
    )
    return (
        f'<div class="id-iv-row three">{figures}</div><p class="id-hint">Choose one to see it under the slider. Below '
        f"each: where it changed, {_scale()}</p>"
        f'<div class="id-scroll id-more id-iv-table"><table><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{cells}</tbody></table></div>"
    )


def _short(request: EditRequest, moved: Moved | None) -> str:
    if moved is None:
        return "cannot tell"
    if request.kind == "move":
        return "yes" if moved.centre_inside[1] else "no" if moved.there[1] else "lost"
    return f"{_percent(moved.area[0])} → {_percent(moved.area[1])}"


def _explained(outcome: Outcome) -> str:
    """What the figures mean, a sentence each."""
    judge = (
        "Where things are, the model’s <dfn>segmenter</dfn> says: another network, which can err. "
        if outcome.segmented
        else ""
    )
    return (
        '<details class="id-more id-iv-explained"><summary>What these figures mean</summary>'
        f'<p class="id-hint">{judge if outcome.segmented else ""}<dfn>Elsewhere</dfn> is neither the region nor where '
        "the thing was; for a change of the whole picture it is everything. Change is the root mean square difference "
        "to the unedited picture of the same seed: <dfn>broad</dfn> (low spatial frequency) of the means over 8 × 8 "
        "pixels, <dfn>fine</dfn> (high) of the rest. <dfn>IoU</dfn> is the overlap of what each class covers before "
        "and after, as a part of what either covers; the mean over classes.</p>"
        '<p class="id-hint"><dfn>Beyond data</dfn> (out of distribution): each time an edited concept is active where '
        "and while the edit acts, its value is read back and compared with the value that only 1 % of its values in "
        "ordinary pictures exceed. Without an edit, about 1 % would lie beyond; the more do, the less the model has "
        "been taught what to do with them.</p></details>"
    )


def _keep(runtime: Runtime, outcome: Outcome) -> str:
    assert runtime.dictionary is not None
    document = download_url(to_json(outcome, runtime.name, runtime.dictionary.source), "application/json")
    pictures = [("unedited", outcome.unedited)]
    pictures += [(f"edited{f'-{one.stage}' if len(outcome.results) > 1 else ''}", one.image) for one in outcome.results]
    links = "".join(
        f'<a class="id-button" download="{name}.png" href="{png_url(image)}">PNG {name.replace("-", " ")}</a>'
        for name, image in pictures
    )
    return (
        '<div class="id-keep" role="group" aria-label="Keep this result"><span>Keep this:</span>'
        f'{links}<a class="id-button" download="interventions.json" href="{document}">JSON</a>'
        '<button type="button" class="id-button id-link">Copy link</button></div>'
    )


def _python(runtime: Runtime, outcome: Outcome) -> str:
    assert runtime.dictionary is not None
    stages = tuple(one.stage for one in outcome.results if one.stage)
    lines = python_lines(outcome.scene, outcome.asked, runtime.name, runtime.dictionary.source, stages)
    return (
        '<details class="id-more"><summary>Repeat this in Python</summary><div class="id-code">'
        f'<button type="button" class="id-button id-copy">Copy</button><pre>{escape(lines)}</pre></div></details>'
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"


def _maybe(value: float, form: str = "") -> str:
    if not math.isfinite(value):
        return "none"
    return form.format(value) if form else _percent(value)
