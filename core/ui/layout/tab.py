"""The Layout tab: when the model knew what would go where."""

import json
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import gradio as gr
import numpy as np
from PIL import Image

from core.ui.backend.dictionary import block_words, no_concepts_html
from core.ui.backend.fields import html
from core.ui.backend.runtime import Runtime
from core.ui.layout.export import FIRST_STEP, python_lines, to_csv, to_json
from core.ui.look.blocks import code_html, downloads_html, link_or_reason
from core.ui.look.colours import label_colours
from core.ui.look.export import download_url
from core.ui.look.images import data_url
from core.ui.look.scene import Scene, step_stages
from core.ui.look.timeline import agreement_svg

if TYPE_CHECKING:
    from core.concepts.trace import CodeTrace
    from core.ui.layout.results import LayoutReading, PredictedLayout

_SETTLED = 0.9
"""A layout counts as settled from the step at which its agreement reaches this fraction of its maximum."""
_POOR = 0.1
"""Mean IoU below which a map says nothing about the objects."""
_BRANCHES = {"cond": "with the prompt (conditional)", "uncond": "without the prompt (unconditional)"}


@dataclass(frozen=True)
class LayoutTab:
    """The tab's components that the page wires up."""

    panel: gr.HTML
    """The layout of the current image."""


def build_layout_tab(runtime: Runtime) -> LayoutTab:
    """Create the tab's components inside the caller's `with` block."""
    html(
        "<h2>When did it know where things go?</h2>"
        '<p class="id-intro">At every step some <dfn>concepts</dfn> are active at each spot of the picture, and each '
        "tends to stand for an object or a background. From them alone the final layout can be predicted, often while "
        "the picture is still noise. Step through and see.</p>"
    )
    return LayoutTab(html(layout_html(runtime, None, None), elem_id="id-layout"))


def layout_html(runtime: Runtime, scene: Scene | None, trace: "CodeTrace | None") -> str:
    """The panel of an image and its codes; without codes, a placeholder that says why."""
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
        f"{_player(trace.n_steps)}{_images(scene, reading)}"
        f'<ul class="id-layout-legend" aria-label="Colours of the maps"></ul>'
        f"{_agreement(runtime, reading)}{_choices(reading)}{_downloads(runtime, scene, reading)}"
        f"{_python(runtime, scene, reading)}</div>"
    )


def _why_empty(runtime: Runtime) -> str:
    if not runtime.ready.is_set() or runtime.dictionary is not None:
        return '<p class="id-empty">The layout of your picture will appear here, step by step.</p>'
    if runtime.error:
        return '<p class="id-empty">The model could not be loaded, so there is no layout to show.</p>'
    return no_concepts_html(runtime.name)


def _data(reading: "LayoutReading") -> str:
    """The maps, one character per cell, and their colours as JSON for the page's script."""
    document = {
        "classes": reading.classes,
        "colours": _colours(reading),
        "objects": [reading.classes[i] for i in reading.objects],
        "readouts": {
            readout.key: {"grid": layout.labels.shape[1:], "cells": layout.text}
            for readout, layout in reading.predicted.items()
        },
    }
    return json.dumps(document, ensure_ascii=False)


def _player(n_steps: int) -> str:
    return (
        '<div class="id-layout-player"><button type="button" class="id-button id-layout-play">Play</button>'
        f'<input type="range" class="id-layout-slider" min="1" max="{n_steps}" value="1" aria-label="Step">'
        '<output class="id-layout-at"></output></div>'
    )


def _images(scene: Scene, reading: "LayoutReading") -> str:
    preview = "your picture" if scene.uploaded else "denoised preview of that step"
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
        "<figcaption><b>predicted</b> from concepts</figcaption></figure>"
        f'<figure><img class="id-layout-preview" alt="{escape(preview)}"><figcaption>{preview}</figcaption></figure>'
        f"<figure>{last[0]}<figcaption>{last[1]}</figcaption></figure></div>"
    )


def _colours(reading: "LayoutReading") -> tuple[str, ...]:
    return label_colours(tuple(name in reading.backgrounds for name in reading.classes))


def _map_url(reading: "LayoutReading") -> str:
    assert reading.final is not None
    colours = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in _colours(reading)]
    palette = np.array([*((*rgb, 255) for rgb in colours), (0, 0, 0, 0)], dtype=np.uint8)
    return data_url(Image.fromarray(palette[reading.final], "RGBA"))


def _agreement(runtime: Runtime, reading: "LayoutReading") -> str:
    """Curve and sentence of each readout; the page's script shows those of the chosen one."""
    if reading.final is None:
        return ""
    stages = runtime.spec.stages
    curves = {
        readout.key: layout.mean for readout, layout in reading.predicted.items() if np.isfinite(layout.mean).all()
    }
    sentences = "".join(
        f'<p class="id-layout-summary" data-choice="{escape(readout.key)}" hidden>'
        f"{_sentence(reading, layout, step_stages(len(layout.labels), stages))}</p>"
        for readout, layout in reading.predicted.items()
    )
    heading = f"<h3>How well does it agree with the final picture?</h3>{sentences}"
    if not curves:
        return heading
    chart = agreement_svg(curves, "Mean IoU of the predicted map with the final picture, step by step", stages)
    return (
        f'{heading}<p class="id-hint"><dfn>IoU</dfn> (intersection over union): of the cells that either map gives to '
        "an object, the part that both give to it; 1 is the same cells. The mean is over the objects named in the "
        f"prompt, on the block’s own grid.</p>{chart}"
    )


def _sentence(reading: "LayoutReading", layout: "PredictedLayout", names: list[str]) -> str:
    """What the curve shows, in words."""
    mean = layout.mean
    objects = [
        (escape(reading.classes[i]), is_there) for i, is_there in zip(reading.objects, layout.present, strict=True)
    ]
    named = [name for name, is_there in objects if is_there]
    absent = [name for name, is_there in objects if not is_there]
    if not named:
        if absent:
            return f"Nothing to compare: the final picture has no {' and no '.join(absent)}."
        return "Nothing to compare: the prompt names no object that the concepts know."
    of = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    best = float(mean.max())
    settled = int(np.argmax(mean >= _SETTLED * best))
    missing = f" The final picture has no {' and no '.join(absent)} that fills a cell." if absent else ""
    if best < _POOR:
        return f"This block never predicts where {of} will be: its IoU is {best:.2f} at most.{missing}"
    if settled == 0:
        return (
            f"The layout of {of} is at least 90% as good as it gets (IoU {best:.2f}) from the first step on, with an "
            f"IoU of <b>{mean[0]:.2f}</b>.{missing}"
        )
    return (
        f"By <b>step {settled + 1} of {len(mean)}</b> ({names[settled]}) the layout of {of} is 90% as good as it gets "
        f"(IoU {best:.2f}); at step 1 its IoU is <b>{mean[0]:.2f}</b>.{missing}"
    )


def _choices(reading: "LayoutReading") -> str:
    """The choice of a readout, folded."""
    readouts = list(reading.predicted)
    first = readouts[0]
    hookpoints = sorted({readout.site.hookpoint for readout in readouts}, key=lambda name: (_depth(name), name))
    branches = [str(name) for name in dict.fromkeys(readout.site.branch for readout in readouts)]
    classes = [("prompt", "objects in the prompt, and backgrounds"), ("any", "all classes")]
    groups = (
        ("block", "Block", [(name, f"{block_words(name)} <code>{escape(name)}</code>") for name in hookpoints]),
        ("branch", "Branch", [(name, _BRANCHES[name]) for name in branches]),
        ("classes", "Possible classes", classes if reading.candidate_classes else classes[1:]),
    )
    start = dict(zip(("block", "branch", "classes"), first.key.split("|"), strict=True))
    fields = "".join(_group(name, legend, options, start[name]) for name, legend, options in groups)
    return (
        '<details class="id-more id-layout-options"><summary>Predicted from: '
        '<span class="id-layout-option"></span></summary>'
        f"{fields}</details>"
    )


def _group(name: str, legend: str, options: list[tuple[str, str]], start: str) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="id-layout-{name}" value="{escape(value)}"'
        f"{' checked' if value == start else ''}> <span>{text}</span></label>"
        for value, text in options
    )
    return f'<fieldset data-option="{name}"><legend>{legend}</legend>{buttons}</fieldset>'


def _depth(hookpoint: str) -> int:
    return next((i for i, part in enumerate(("down", "mid", "up")) if hookpoint.startswith(part)), 3)


def _downloads(runtime: Runtime, scene: Scene, reading: "LayoutReading") -> str:
    assert runtime.dictionary is not None
    stages, readout = runtime.spec.stages, next(iter(reading.predicted))
    csv_url = download_url(to_csv(reading, stages), "text/csv")
    document = to_json(scene, reading, runtime.name, runtime.dictionary.source, readout, stages)
    files = (
        ("CSV", "layout.csv", csv_url),
        ("JSON", "layout.json", download_url(document, "application/json")),
    )
    return downloads_html(files, "id-png", link_or_reason(scene.uploaded))


def _python(runtime: Runtime, scene: Scene, reading: "LayoutReading") -> str:
    if scene.uploaded or runtime.dictionary is None:
        return ""
    source = runtime.dictionary.source
    blocks = "".join(
        code_html(
            _step_marked(python_lines(scene, reading, runtime.name, source, readout)),
            f' data-choice="{escape(readout.key)}" hidden',
            marked=True,
        )
        for readout in reading.predicted
    )
    return f'<details class="id-more"><summary>Repeat this in Python</summary>{blocks}</details>'


def _step_marked(lines: str) -> str:
    """The lines with the number of the step in an element of its own, into which the page's script writes the step that
    is shown.
    """
    return escape(lines).replace(f"step={FIRST_STEP}", f'step=<span class="id-layout-code-step">{FIRST_STEP}</span>')
