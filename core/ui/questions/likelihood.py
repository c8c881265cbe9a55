"""How well the model expects a picture, as the page shows it and as it is taken away."""

import json
import math
from typing import TYPE_CHECKING

from core.ui.look.export import csv_of, image_lines, image_settings, rounded
from core.ui.look.scene import Scene
from core.ui.look.timeline import errors_svg
from core.ui.look.words import curve_key, plus_minus
from core.ui.questions.answers import answer_html, code_html, ended, keep_html
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.information.likelihood import Likelihood

_STANDARD_NORMAL = math.log2(2 * math.pi * math.e) / 2
"""Bits a dimension of standard normal latents, on average, to a model that expects such."""


def likelihood_html(runtime: Runtime, scene: Scene, found: "Likelihood", running: bool = False) -> str:
    """Everything about the picture's bits a dimension."""
    factor = found.interval_factor()
    keep = keep_html(
        "likelihood",
        likelihood_csv(found),
        likelihood_json(scene, found, runtime.name),
        link=not scene.own,
        pictures=False,
    )
    chart = errors_svg(
        found.edges,
        found.errors,
        factor * found.error_stderr,
        "Squared errors a dimension without the prompt and with it",
        runtime.spec.stages,
    )
    body = (
        '<p class="id-lead">To the model, this picture has '
        f"<strong>{plus_minus(found.bits_per_dim, factor * found.stderr)} bits a dimension</strong> with its prompt, "
        f"and {plus_minus(found.unprompted_bits_per_dim, factor * found.unprompted_stderr)} without.</p>"
        f"<p>The fewer, the better it is expected; plain noise has {_STANDARD_NORMAL:.2f}, even to a model that "
        f"expects nothing else. {_saved(found, factor)}</p>"
        '<p class="id-hint">A <dfn>dimension</dfn> is one of the '
        f"{found.n_dims:,} numbers (latents) that the picture is to the model. These are bits of a density, not of a "
        "file: they can be below zero, and compare pictures of one model only. All errors are 95% intervals.</p>"
        '<details class="id-more"><summary>The two error curves behind it</summary><p class="id-hint">How far off the '
        "model is when it guesses which part of the noisy picture is noise, as squared error a dimension: "
        f"{curve_key('dashed', 'without the prompt')} and {curve_key('', 'with it')}, each with its pale 95% band. The "
        f"smaller the errors, the fewer the bits.</p>{chart}</details>"
        f"{keep}{code_html(likelihood_python(scene, found, runtime.name))}"
        f'<p class="id-hint id-notes">{ended(found, running)}</p>'
    )
    return answer_html("likelihood", scene, running, {}, body)


def _saved(found: "Likelihood", factor: float) -> str:
    half = factor * found.gain_stderr
    if abs(found.gain) <= half:
        return "Whether the prompt makes it more or less likely is within the error."
    told = plus_minus(abs(found.gain), half)
    if found.gain < 0:
        return f"The prompt costs <strong>{told} bits</strong> in all: with it, the picture is expected less."
    return f"The prompt saves <strong>{told} bits</strong> in all."


def likelihood_csv(found: "Likelihood") -> str:
    """A row a bin of log-SNR: squared errors a dimension, without the prompt and with it."""
    factor = found.interval_factor()
    names = ("error_without", "error_with")
    rows = [
        {
            "log_snr_from": round(float(found.edges[i]), 4),
            "log_snr_to": round(float(found.edges[i + 1]), 4),
            **{name: round(float(found.errors[side, i]), 6) for side, name in enumerate(names)},
            **{f"{name}_95": round(factor * float(found.error_stderr[side, i]), 6) for side, name in enumerate(names)},
        }
        for i in range(found.errors.shape[1])
    ]
    return csv_of(rows)


def likelihood_json(scene: Scene, found: "Likelihood", model_name: str) -> str:
    """All settings and all numbers."""
    document = {"picture": image_settings(scene, model_name), **rounded(found.to_dict())}
    return json.dumps(document, ensure_ascii=False)


def likelihood_python(scene: Scene, found: "Likelihood", model_name: str) -> str:
    """Lines that repeat the result in a notebook."""
    prompt = json.dumps(scene.prompt, ensure_ascii=False)
    return (
        f"{image_lines(scene, model_name)}"
        f"found = core.likelihood(\n    model, image, {prompt}, error={found.settings['error']:g}, seed={found.seed},\n"
        f"    num_inference_steps={found.settings['num_inference_steps']}\n)\n"
        'print(f"{found.bits_per_dim:.3f} bits a dimension, standard error {found.stderr:.3f}")\n'
    )
