"""Downloads of a layout: the curves as CSV, everything as JSON, and the Python lines that repeat it."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from core.diffusion.schedule import step_times
from core.spec import STAGES, Stage
from core.ui.look.export import csv_of, image_settings
from core.ui.look.scene import Scene, step_stages

if TYPE_CHECKING:
    from core.ui.layout.results import LayoutReading, Readout

FIRST_STEP = 0
"""The step in the Python lines."""
COLUMNS = ("hookpoint", "branch", "uses_prompt_classes", "step_from_0", "t", "stage", "mean_iou")


def curve_rows(reading: "LayoutReading", stages: tuple[Stage, ...] = STAGES) -> list[dict[str, Any]]:
    """The curves, one row per readout and step; after the mean follows the IoU of each object named in the prompt."""
    rows: list[dict[str, Any]] = []
    for readout, layout in reading.predicted.items():
        n_steps = len(layout.labels)
        names, times = step_stages(n_steps, stages), step_times(n_steps)
        for step, (mean, ious) in enumerate(zip(layout.mean, layout.ious, strict=True)):
            values = (
                *readout.site,
                readout.uses_prompt_classes,
                step,
                round(float(times[step]), 4),
                names[step],
                _number(mean),
            )
            objects = {reading.classes[i]: _number(iou) for i, iou in zip(reading.objects, ious, strict=True)}
            rows.append(dict(zip(COLUMNS, values, strict=True)) | objects)
    return rows


def to_csv(reading: "LayoutReading", stages: tuple[Stage, ...] = STAGES) -> str:
    """The curves as CSV."""
    return csv_of(curve_rows(reading, stages), COLUMNS)


def to_json(
    scene: Scene,
    reading: "LayoutReading",
    model_name: str,
    source: str,
    readout: "Readout",
    stages: tuple[Stage, ...] = STAGES,
) -> str:
    """Settings, all curves, and the label maps of one readout."""
    document = {
        "settings": {
            **image_settings(scene, model_name),
            "saes": source,
            "method": "readout",
            "candidate_classes": list(reading.candidate_classes),
        },
        "objects": [reading.classes[i] for i in reading.objects],
        "classes": list(reading.classes),
        "curves": curve_rows(reading, stages),
        "labels": {
            "hookpoint": readout.site.hookpoint,
            "branch": readout.site.branch,
            "uses_prompt_classes": readout.uses_prompt_classes,
            "by_step": reading.predicted[readout].labels.tolist(),
        },
    }
    return json.dumps(document, ensure_ascii=False)


def python_lines(scene: Scene, reading: "LayoutReading", model_name: str, source: str, readout: "Readout") -> str:
    """Lines that predict the layout at the first step in a notebook; the page replaces the step by the one it shows."""
    options = [f"hookpoint={json.dumps(readout.site.hookpoint)}", f"branch={json.dumps(readout.site.branch)}"]
    if source != model_name:
        options.append(f"source={json.dumps(source)}")
    if readout.uses_prompt_classes:
        options.append(f"candidate_classes={json.dumps(list(reading.candidate_classes), ensure_ascii=False)}")
    options += [f"num_inference_steps={scene.steps}", f"guidance_scale={scene.guidance:g}"]
    return (
        "import core\n\n"
        f"model = core.load_model({json.dumps(model_name)})\n"
        "layout = core.predict_layout(\n"
        f"    model,\n    {json.dumps(scene.prompt, ensure_ascii=False)},\n    seed={scene.seed},\n"
        f"    step={FIRST_STEP},  # counted from 0\n"
        + "".join(f"    {option},\n" for option in options)
        + ")\nfor row in layout.labels:\n"
        "    print(*(f\"{layout.classes[i] if i >= 0 else '.':10}\" for i in row))\n"
    )


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
