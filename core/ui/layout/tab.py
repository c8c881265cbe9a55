"""The Layout tab: when the model knew what would be where."""

import json
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from core.ui.concepts.dictionary import block_words, no_concepts_html
from core.ui.inputs import html
from core.ui.layout.export import python_lines, to_csv, to_json
from core.ui.look.colours import label_colours
from core.ui.look.export import download_url
from core.ui.look.images import data_url
from core.ui.look.scene import Scene, step_stages
from core.ui.look.timeline import agreement_svg
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.concepts.trace import CodeTrace
    from core.ui.layout.results import PredictedLayout, Reading

_SETTLED = 0.9
"""A layout is settled from the step on at which it agrees this much of the most that it ever does."""
_POOR = 0.1
"""A mean IoU below which a map says nothing of the things."""
_BRANCHES = {"cond": "with the prompt", "uncond": "without the prompt"}


@dataclass(frozen=True)
class LayoutTab:
    """The tab's components that the page wires up."""

    panel: Any
    """HTML of what was read of the current picture."""


def build_layout_tab(runtime: Runtime) -> LayoutTab:
    """Put the tab's components where the caller's `with` is."""
    html(
        "<h2>When did it know where things go?</h2>"
        '<p class="id-intro">At every step the model adds something to the picture at each position: its '
        "<dfn>concepts</dfn>, each of which tends to stand for a thing or a place. From them alone the map is "
        "foretold, often while the picture is still noise. Walk through the steps and see.</p>"
    )
    return LayoutTab(html(layout_html(runtime, None, None), elem_id="id-layout"))


def layout_html(runtime: Runtime, scene: Scene | None, trace: "CodeTrace | None") -> str:
    """The panel of a picture and its codes; without them, the room that it will take, or why it stays empty."""
    if scene is None or trace is None or runtime.dictionary is None or not trace.n_steps:
        return f'<div class="id-layout empty">{_why_empty(runtime)}</div>'
    from core.ui.layout.results import final_labels, read_scene  # which import torch

    dictionary, segmenter = runtime.dictionary, runtime.segmenter
    classes = next(iter(dictionary.tables.values())).class_names
    final = None if segmenter is None else final_labels(segmenter, scene.image, classes)
    reading = read_scene(dictionary, trace, scene.prompt, final)
    return (
        f'<div class="id-layout" data-steps="{trace.n_steps}"><p class="id-old">previous picture</p>'
        f'<div class="id-layout-data" hidden data-layout="{escape(_data(reading))}"></div>'
        f"{_walk(trace.n_steps)}{_images(scene, reading)}"
        f'<ul class="id-layout-legend" aria-label="Colours of the maps"></ul>'
        f"{_agreement(runtime, reading)}{_choices(reading)}{_keep(runtime, scene, reading)}"
        f"{_python(runtime, scene, reading)}</div>"
    )


def _why_empty(runtime: Runtime) -> str:
    if not runtime.ready.is_set() or runtime.dictionary is not None:
        return '<p class="id-empty">The layout of your picture will appear here, step by step.</p>'
    if runtime.error:
        return '<p class="id-empty">The model could not be loaded, so there is nothing to read.</p>'
    return no_concepts_html(runtime.name)


def _data(reading: "Reading") -> str:
    """What the script draws from: the maps as a character a cell, and their colours."""
    document = {
        "classes": reading.classes,
        "colours": _colours(reading),
        "objects": [reading.classes[i] for i in reading.things],
        "ways": {
            way.key: {"grid": of_way.labels.shape[1:], "cells": of_way.text} for way, of_way in reading.foretold.items()
        },
    }
    return json.dumps(document, ensure_ascii=False)


def _walk(n_steps: int) -> str:
    return (
        '<div class="id-layout-walk"><button type="button" class="id-button id-layout-play">Play</button>'
        f'<input type="range" class="id-layout-slider" min="1" max="{n_steps}" value="1" aria-label="Step">'
        '<output class="id-layout-at"></output></div>'
    )


def _images(scene: Scene, reading: "Reading") -> str:
    foreseen = "your picture" if scene.own else "denoised preview of that step"
    if reading.final is None:
        last = (
            '<p class="id-empty">No segmenter comes with this model, so there is no final map to compare with.</p>',
            "no final map",
        )
    else:
        last = f'<img src="{_map_url(reading)}" alt="Map of the final picture">', "final picture, segmented"
    return (
        '<div class="id-layout-row">'
        '<figure><canvas class="id-layout-map" role="img"></canvas>'
        "<figcaption><b>foretold</b> from concepts</figcaption></figure>"
        f'<figure><img class="id-layout-preview" alt="{escape(foreseen)}"><figcaption>{foreseen}</figcaption></figure>'
        f"<figure>{last[0]}<figcaption>{last[1]}</figcaption></figure></div>"
    )


def _colours(reading: "Reading") -> tuple[str, ...]:
    return label_colours(tuple(name in reading.sites for name in reading.classes))


def _map_url(reading: "Reading") -> str:
    assert reading.final is not None
    colours = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in _colours(reading)]
    palette = np.array([*((*rgb, 255) for rgb in colours), (0, 0, 0, 0)], dtype=np.uint8)
    return data_url(Image.fromarray(palette[reading.final], "RGBA"))


def _agreement(runtime: Runtime, reading: "Reading") -> str:
    """The curve of each way of reading with its sentence; only the chosen one's is shown."""
    if reading.final is None:
        return ""
    stages = runtime.spec.stages
    curves = {way.key: of_way.mean for way, of_way in reading.foretold.items() if np.isfinite(of_way.mean).all()}
    sentences = "".join(
        f'<p class="id-layout-said" data-choice="{escape(way.key)}" hidden>'
        f"{_sentence(reading, of_way, step_stages(len(of_way.labels), stages))}</p>"
        for way, of_way in reading.foretold.items()
    )
    heading = f"<h4>How well did it agree with the final picture?</h4>{sentences}"
    if not curves:
        return heading
    chart = agreement_svg(curves, "Mean IoU of the foretold map with the final picture, step by step", stages)
    return (
        f'{heading}<p class="id-hint"><dfn>IoU</dfn> (intersection over union): of the cells that either map gives to '
        "a thing, the part that both give to it; 1 is the same cells. The mean is over the things that the prompt "
        f"names, on the block's own grid.</p>{chart}"
    )


def _sentence(reading: "Reading", of_way: "PredictedLayout", names: list[str]) -> str:
    """What a curve shows, in words."""
    mean = of_way.mean
    named = [escape(reading.classes[i]) for i, is_there in zip(reading.things, of_way.there, strict=True) if is_there]
    absent = [
        escape(reading.classes[i]) for i, is_there in zip(reading.things, of_way.there, strict=True) if not is_there
    ]
    if not named:
        why = f"no {' and no '.join(absent)} to be found in the final picture" if absent else "no thing that it knows"
        return f"Nothing to compare: {'there is' if absent else 'the prompt names'} {why}."
    of = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    best = float(mean.max())
    settled = int(np.argmax(mean >= _SETTLED * best))
    missing = f" The final picture has no {' and no '.join(absent)} that fills a cell." if absent else ""
    if best < _POOR:
        return f"This block never tells where {of} will be: its map agrees by {best:.2f} at most.{missing}"
    first = f"At the first step the map of {of} agrees with the final picture by <b>{mean[0]:.2f}</b>"
    if settled == 0:
        return f"{first}, which is already nine tenths or more of the most it reaches, {best:.2f}.{missing}"
    return (
        f"{first}; nine tenths of the most it reaches, {best:.2f}, are there at "
        f"<b>step {settled + 1} of {len(mean)}</b> ({names[settled]}).{missing}"
    )


def _choices(reading: "Reading") -> str:
    """What is read, folded behind one control."""
    ways = list(reading.foretold)
    first = ways[0]
    hookpoints = sorted({way.site.hookpoint for way in ways}, key=lambda name: (_depth(name), name))
    branches = [str(name) for name in dict.fromkeys(way.site.branch for way in ways)]
    told = [("told", "what the prompt names, and places"), ("any", "anything it knows")]
    groups = (
        ("block", "Read at", [(name, f"{block_words(name)} <code>{escape(name)}</code>") for name in hookpoints]),
        ("branch", "In the half that computes", [(name, _BRANCHES[name]) for name in branches]),
        ("told", "The reader may name", told if reading.among else told[1:]),
    )
    start = {"block": first.site.hookpoint, "branch": first.site.branch, "told": "told" if first.told else "any"}
    fields = "".join(_group(name, legend, options, start[name]) for name, legend, options in groups)
    return (
        '<details class="id-more id-layout-ways"><summary>What is read: <span class="id-layout-way"></span></summary>'
        f"{fields}</details>"
    )


def _group(name: str, legend: str, options: list[tuple[str, str]], start: str) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="id-layout-{name}" value="{escape(value)}"'
        f"{' checked' if value == start else ''}> <span>{text}</span></label>"
        for value, text in options
    )
    return f'<fieldset data-way="{name}"><legend>{legend}</legend>{buttons}</fieldset>'


def _depth(hookpoint: str) -> int:
    return next((i for i, part in enumerate(("down", "mid", "up")) if hookpoint.startswith(part)), 3)


def _keep(runtime: Runtime, scene: Scene, reading: "Reading") -> str:
    assert runtime.dictionary is not None
    stages, shown = runtime.spec.stages, next(iter(reading.foretold))
    csv_url = download_url(to_csv(reading, stages), "text/csv")
    document = to_json(scene, reading, runtime.name, runtime.dictionary.source, shown, stages)
    link = "" if scene.own else '<button type="button" class="id-button id-link">Copy link</button>'
    return (
        '<div class="id-keep" role="group" aria-label="Keep this result"><span>Keep this:</span>'
        '<button type="button" class="id-button id-png">PNG</button>'
        f'<a class="id-button" download="layout.csv" href="{csv_url}">CSV</a>'
        f'<a class="id-button" download="layout.json" href="{download_url(document, "application/json")}">JSON</a>'
        f"{link}</div>"
    )


def _python(runtime: Runtime, scene: Scene, reading: "Reading") -> str:
    if scene.own or runtime.dictionary is None:
        return ""
    source = runtime.dictionary.source
    blocks = "".join(
        f'<div class="id-code" data-choice="{escape(way.key)}" hidden>'
        '<button type="button" class="id-button id-copy">Copy</button>'
        f"<pre>{escape(python_lines(scene, reading, runtime.name, source, way))}</pre></div>"
        for way in reading.foretold
    )
    return f'<details class="id-more"><summary>Repeat this in Python</summary>{blocks}</details>'
