"""Downloads of interventions: images, JSON with all settings and figures, the Python lines, the link."""

import base64
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from core.ui.interventions.request import GRID, PAINTED, EditRequest, edit_class, to_text
from core.ui.look.export import image_settings
from core.ui.look.scene import Scene

if TYPE_CHECKING:
    from core.ui.interventions.results import EditComparison, EditResult, ObjectChange

TAB = "interventions"
"""The tab's name in a link."""


def png_url(image: Image.Image) -> str:
    """An image as a lossless data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def settings(scene: Scene, model_name: str, source: str) -> dict[str, Any]:
    """Everything but the edits that is needed to reproduce the images."""
    return {**image_settings(scene, model_name), "saes": source}


def figures(result: "EditResult") -> dict[str, Any]:
    """All that was measured for one edited image; null for what could not be measured."""
    return {
        "stage": result.stage or None,
        "edits": [one.to_dict() for one in result.requests],
        "change_elsewhere_low": _number(result.low),
        "change_elsewhere_high": _number(result.high),
        "layout_iou_elsewhere": _number(result.layout),
        "out_of_range": {"share": _number(result.out_of_range.share), "times_p99": _number(result.out_of_range.times)},
        "objects_lost": list(result.lost),
        "objects": [None if one is None else _object_change(one) for one in result.objects],
    }


def to_document(comparison: "EditComparison", model_name: str, source: str) -> dict[str, Any]:
    """Settings and figures of a run."""
    return {
        "settings": settings(comparison.scene, model_name, source),
        "results": [figures(result) for result in comparison.results],
    }


def to_json(comparison: "EditComparison", model_name: str, source: str) -> str:
    """Settings and figures of a run as JSON."""
    return json.dumps(to_document(comparison, model_name, source), ensure_ascii=False)


def link_query(scene: Scene, requests: Sequence[EditRequest], compare: bool) -> str:
    """Query parameters that restore the image and its edits."""
    query = {
        "prompt": scene.prompt,
        "seed": scene.seed,
        "steps": scene.steps,
        "guidance": f"{scene.guidance:g}",
        "tab": TAB,
        "edits": to_text(requests),
    }
    return urlencode(query | ({"compare": "stages"} if compare else {}))


def python_lines(
    scene: Scene, requests: Sequence[EditRequest], model_name: str, source: str, stages: Sequence[str] = ()
) -> str:
    """Lines that generate the images in a notebook; with `stages`, one edited image per stage."""
    painted = any(one.region == PAINTED for one in requests)
    edits = "".join(f"    {_edit_line(one, bool(stages))},\n" for one in requests)
    if source == model_name:
        imports, with_edits, before = "", "edits=edits", ""
    else:
        imports, with_edits = "from core.edits import load_editor\n", "contexts=[editor.editing(edits, {steps})]"
        with_edits = with_edits.format(steps=scene.steps)
        before = f"editor = load_editor(model, {json.dumps(source)})\n"
    run = (
        f"{json.dumps(scene.prompt, ensure_ascii=False)}, seed={scene.seed}, num_inference_steps={scene.steps}, "
        f"guidance_scale={scene.guidance:g}"
    )
    last = f"model.generate({run}, {with_edits}).image\n"
    if stages:
        edits = f"edits = [\n{edits}]\n"
        each = "".join(f"    {line}\n" for line in edits.splitlines())
        edited = f"edited = {{}}\nfor stage in {json.dumps(list(stages))}:\n{each}    edited[stage] = {last}"
    else:
        edited = f"edits = [\n{edits}]\nedited = {last}"
    return (
        f"import core\n{imports}{_PAINTED_LINES if painted else ''}\n"
        f"model = core.load_model({json.dumps(model_name)})\n{before}"
        f"unedited = model.generate({run}).image\n{edited}"
    )


_PAINTED_LINES = f"""import numpy as np


def painted(cells, size):
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(cells), dtype=np.uint8)).reshape({GRID}, {GRID})
    index = np.arange(size) * {GRID} // size
    return bits[index][:, index]

"""
"""`painted` does the same as `cells_mask`."""


def _edit_line(request: EditRequest, each_stage: bool) -> str:
    if request.label:
        parts = [f"label={json.dumps(request.label, ensure_ascii=False)}"]
    else:
        parts = [
            f"concepts={list(request.concepts)}",
            f'hookpoints=["{request.hookpoint}"]',
            f'branches=["{request.branch}"]',
        ]
    if request.region == PAINTED:
        parts.append(f'region=painted("{request.cells}", model.image_size)')
    elif request.kind != "global":
        parts.append(f'region="{request.region}"')
    when = "stage=stage" if each_stage else f"steps={request.steps}" if request.steps else f'stage="{request.stage}"'
    parts += [f"strength={request.strength:g}", when]
    return f"core.{edit_class(request.kind).__name__}({', '.join(parts)})"


def _object_change(one: "ObjectChange") -> dict[str, Any]:
    before_and_after = {
        "present": one.present,
        "area": one.area,
        "inside_region": one.inside,
        "centre_in_region": one.centre_inside,
    }
    return {
        "name": one.name,
        **{name: [_number(value) for value in values] for name, values in before_and_after.items()},
    }


def _number(value: float | bool) -> float | bool | None:
    if isinstance(value, bool):
        return value
    return round(float(value), 4) if np.isfinite(value) else None
