"""Downloads of results: CSV, JSON with all settings, the Python lines that repeat them, the link that restores them."""

import base64
import csv
import io
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from core.information.results import Attribution, Curves
from core.spec import STAGES, Stage
from core.ui.look.scene import (
    Scene,
    contradicts,
    direct_half_width,
    half_width,
    requested_rel_error,
    stage_shares,
    step_stages,
    t95,
)

COLUMNS = ("word", "bits", "bits_95", "direct_bits", "direct_bits_95")


def table_rows(a: Attribution, stages: tuple[Stage, ...] = STAGES) -> list[dict[str, Any]]:
    """All numbers of an attribution, one row per word.

    `_95` is the half-width of a 95% interval; a stage's column is its fraction of the bits.
    """
    shares = stage_shares(a, stages)
    rows: list[dict[str, Any]] = []
    for i, word in enumerate(a.words):
        values = (a.bits[i], half_width(a)[i], a.direct_bits[i], direct_half_width(a)[i])
        row: dict[str, Any] = {"word": word}
        row.update({name: round(float(v), 4) for name, v in zip(COLUMNS[1:], values, strict=True)})
        row.update({s.name: round(float(v), 4) for s, v in zip(stages, shares[i], strict=True)})
        row["contradicts_image"] = bool(contradicts(a)[i])
        rows.append(row)
    return rows


def to_csv(a: Attribution, stages: tuple[Stage, ...] = STAGES) -> str:
    """The table as CSV."""
    return csv_of(table_rows(a, stages), COLUMNS)


def steps_csv(a: Attribution, stages: tuple[Stage, ...] = STAGES) -> str:
    """The timeline as CSV, one row per word and step: bits per unit of log-SNR, and the two error curves if known."""
    when, factor = a.timeline, t95(a.n_replicates)
    parts = {"bits": when.bits, "bits_95": factor * when.stderr}
    if a.curves is not None:
        parts |= {
            "error_without": a.curves.without,
            "error_without_95": factor * a.curves.without_stderr,
            "error_with": a.curves.with_word,
            "error_with_95": factor * a.curves.with_word_stderr,
        }
        if a.curves.difference_stderr is not None:
            parts["error_difference_95"] = factor * a.curves.difference_stderr
    rows = [
        {
            "word": word,
            "step": step + 1,
            "stage": stage,
            "log_snr_from": round(float(when.edges[step]), 4),
            "log_snr_to": round(float(when.edges[step + 1]), 4),
            **{name: round(float(values[i, step]), 6) for name, values in parts.items()},
        }
        for i, word in enumerate(a.words)
        for step, stage in enumerate(step_stages(when.bits.shape[1], stages))
    ]
    return csv_of(rows, ("word", "step"))


def csv_of(rows: list[dict[str, Any]], columns: Sequence[str] = ()) -> str:
    """Rows as CSV; `columns` is the header if there are no rows."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0].keys() if rows else columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def image_settings(scene: Scene, model_name: str) -> dict[str, Any]:
    """The settings of the image that a result is about."""
    return {
        "model": model_name,
        "prompt": scene.prompt,
        "image": "uploaded" if scene.uploaded else "generated",
        "seed": scene.seed,
        "num_inference_steps": scene.steps,
        "guidance_scale": scene.guidance,
    }


def settings(scene: Scene, a: Attribution, model_name: str) -> dict[str, Any]:
    """Everything needed to reproduce the result."""
    return {
        **image_settings(scene, model_name),
        "given": a.given,
        "rel_error": requested_rel_error(a),
        "attribution_seed": a.seed,
    }


def to_json(scene: Scene, a: Attribution, model_name: str, stages: tuple[Stage, ...] = STAGES) -> str:
    """All settings and all numbers, maps and timeline included, in bits."""
    document = {
        "settings": settings(scene, a, model_name),
        "n_evals": a.n_evals,
        "n_replicates": a.n_replicates,
        "stopped": a.stopped,
        "words": table_rows(a, stages),
        "stderr": _rounded(a.stderr),
        "direct_stderr": _rounded(a.direct_stderr),
        "maps": _rounded(a.maps),
        "map_stderr": _rounded(a.map_stderr),
        "timeline": {
            "edges": _rounded(a.timeline.edges),
            "bits": _rounded(a.timeline.bits),
            "stderr": _rounded(a.timeline.stderr),
        },
        "curves": None if a.curves is None else _curves(a.curves),
    }
    return json.dumps(document, ensure_ascii=False)


def _curves(curves: Curves) -> dict[str, Any]:
    return {name: None if part is None else _rounded(part) for name, part in curves._asdict().items()}


def _rounded(values: Any) -> Any:
    return values.round(6).tolist()


def rounded(value: Any) -> Any:
    """A JSON document with its floats rounded to six decimals."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    return round(value, 6) if isinstance(value, float) else value


def image_lines(scene: Scene, model_name: str) -> str:
    """Lines that load the model and the image in a notebook."""
    prompt = json.dumps(scene.prompt, ensure_ascii=False)
    if scene.uploaded:
        image = 'image = core.prepare_image("your-image.png", model.image_size)  # the file that you uploaded\n'
    else:
        image = (
            f"image = model.generate(\n    {prompt}, seed={scene.seed}, num_inference_steps={scene.steps}, "
            f"guidance_scale={scene.guidance:g}\n).image\n"
        )
    return f"import core\n\nmodel = core.load_model({json.dumps(model_name)})\n{image}"


def python_lines(scene: Scene, a: Attribution, model_name: str) -> str:
    """Lines that repeat the result in a notebook."""
    prompt = json.dumps(scene.prompt, ensure_ascii=False)
    return (
        f"{image_lines(scene, model_name)}"
        f"a = core.attribute(\n    model, image, {prompt}, seed={a.seed}, "
        f'given="{a.given}", rel_error={requested_rel_error(a):g}\n)\n'
        "for word, bits, stderr in zip(a.words, a.bits, a.stderr):\n"
        '    print(f"{word:12} {bits:6.2f} bits, standard error {stderr:.2f}")\n'
    )


def link_query(scene: Scene, a: Attribution) -> str:
    """Query parameters that restore a generated image and its attribution; empty for an uploaded image."""
    if scene.uploaded:
        return ""
    query = image_query(scene.prompt, scene.seed, scene.steps, scene.guidance)
    return query if a.given == "rest" else f"{query}&given={a.given}"


def image_query(prompt: str, seed: int, steps: int, guidance: float) -> str:
    """Query parameters that restore a generated image."""
    return urlencode({"prompt": prompt, "seed": seed, "steps": steps, "guidance": f"{guidance:g}"})


def download_url(text: str, mime: str) -> str:
    """A text as a data URL, so that a download needs no file on the server."""
    return f"data:{mime};charset=utf-8;base64," + base64.b64encode(text.encode()).decode()
