"""A layout to take away: the curve as CSV, everything about it as JSON, the Python lines that read it again."""

import csv
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from core.diffusion.schedule import step_times
from core.spec import STAGES, Stage
from core.ui.look.scene import Scene, step_stages

if TYPE_CHECKING:
    from core.ui.layout.results import Choice, Reading

COLUMNS = ("hookpoint", "branch", "told", "step_from_0", "t", "stage", "mean_iou")


def curve_rows(reading: "Reading", stages: tuple[Stage, ...] = STAGES) -> list[dict[str, Any]]:
    """The curves, a row a step of each way of reading; the IoU of each thing that the prompt names follows the mean."""
    rows: list[dict[str, Any]] = []
    for way, of_way in reading.foretold.items():
        n_steps = len(of_way.labels)
        names, times = step_stages(n_steps, stages), step_times(n_steps)
        for step, (mean, ious) in enumerate(zip(of_way.mean, of_way.ious, strict=True)):
            told = "yes" if way.told else "no"
            values = (*way.site, told, step, round(float(times[step]), 4), names[step], _number(mean))
            things = {reading.classes[i]: _number(iou) for i, iou in zip(reading.things, ious, strict=True)}
            rows.append(dict(zip(COLUMNS, values, strict=True)) | things)
    return rows


def to_csv(reading: "Reading", stages: tuple[Stage, ...] = STAGES) -> str:
    """The curves as CSV."""
    rows = curve_rows(reading, stages)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0].keys() if rows else COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def to_json(
    scene: Scene, reading: "Reading", model_name: str, source: str, shown: "Choice", stages: tuple[Stage, ...] = STAGES
) -> str:
    """Settings, curves, and the label maps of one way of reading."""
    document = {
        "settings": {
            "model": model_name,
            "saes": source,
            "prompt": scene.prompt,
            "picture": "brought" if scene.own else "generated",
            "seed": scene.seed,
            "num_inference_steps": scene.steps,
            "guidance_scale": scene.guidance,
            "method": "readout",
            "among": list(reading.among),
        },
        "objects": [reading.classes[i] for i in reading.things],
        "classes": list(reading.classes),
        "curves": curve_rows(reading, stages),
        "labels": {
            "hookpoint": shown.site.hookpoint,
            "branch": shown.site.branch,
            "told": shown.told,
            "by_step": reading.foretold[shown].labels.tolist(),
        },
    }
    return json.dumps(document, ensure_ascii=False)


def python_lines(scene: Scene, reading: "Reading", model_name: str, source: str, way: "Choice") -> str:
    """Lines that foretell the layout in a notebook, at the first step."""
    options = [f"hookpoint={json.dumps(way.site.hookpoint)}", f"branch={json.dumps(way.site.branch)}"]
    if source != model_name:
        options.append(f"source={json.dumps(source)}")
    if way.told:
        options.append(f"candidate_classes={json.dumps(list(reading.among), ensure_ascii=False)}")
    options += [f"num_inference_steps={scene.steps}", f"guidance_scale={scene.guidance:g}"]
    return (
        "import core\n\n"
        f"model = core.load_model({json.dumps(model_name)})\n"
        "layout = core.predict_layout(\n"
        f"    model,\n    {json.dumps(scene.prompt, ensure_ascii=False)},\n    seed={scene.seed},\n"
        "    step=0,  # the first\n"
        + "".join(f"    {option},\n" for option in options)
        + ")\nfor row in layout.labels:\n"
        "    print(*(f\"{layout.classes[i] if i >= 0 else '.':10}\" for i in row))\n"
    )


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
