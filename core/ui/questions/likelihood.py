"""How likely an image is to the model: the answer on the page, and its downloads."""

import json
import math
from typing import TYPE_CHECKING

from core.ui.backend.runtime import Runtime
from core.ui.look.blocks import folded_code_html
from core.ui.look.export import csv_of, image_lines, image_settings, rounded
from core.ui.look.scene import Scene
from core.ui.look.timeline import errors_svg
from core.ui.look.words import curve_key, plus_minus
from core.ui.questions.answers import answer_downloads, answer_html, stopped_note

if TYPE_CHECKING:
    from core.information.likelihood import Likelihood

_STANDARD_NORMAL = math.log2(2 * math.pi * math.e) / 2
"""Bits per dimension, on average, of standard normal latents under a standard normal model."""


def likelihood_html(runtime: Runtime, scene: Scene, found: "Likelihood", running: bool = False) -> str:
    """Everything about the image's bits per dimension."""
    factor = found.interval_factor()
    downloads = answer_downloads(
        "likelihood",
        likelihood_csv(found),
        likelihood_json(scene, found, runtime.name),
        scene,
        image=False,
    )
    chart = errors_svg(
        found.edges,
        found.errors,
        factor * found.error_stderr,
        "Squared errors per dimension without and with the prompt",
        runtime.spec.stages,
    )
    body = (
        '<p class="id-lead">To the model, this picture has '
        f"<strong>{plus_minus(found.bits_per_dim, factor * found.stderr)} bits per dimension</strong> with its prompt, "
        f"and {plus_minus(found.unprompted_bits_per_dim, factor * found.unprompted_stderr)} without.</p>"
        f"<p>The fewer, the more likely; plain noise has {_STANDARD_NORMAL:.2f}. {_saved(found, factor)}</p>"
        '<p class="id-hint">A <dfn>dimension</dfn> is one of the '
        f"{found.n_dims:,} numbers (latents) that encode the picture. These are bits of a density, not of a "
        "file: they can be negative, and only compare pictures under the same model. All errors are 95% intervals.</p>"
        '<details class="id-more"><summary>The two error curves behind it</summary><p class="id-hint">How far off the '
        "model is when it predicts the noise in a noisy picture, as squared error per dimension: "
        f"{curve_key('dashed', 'without the prompt')} and {curve_key('', 'with it')}, each with its pale 95% band. The "
        f"smaller the errors, the fewer the bits.</p>{chart}</details>"
        f"{downloads}{folded_code_html(likelihood_python(scene, found, runtime.name))}"
        f'<p class="id-hint id-notes">{stopped_note(found, running)}</p>'
    )
    return answer_html("likelihood", scene, running, {}, body)


def _saved(found: "Likelihood", factor: float) -> str:
    half = factor * found.gain_stderr
    if abs(found.gain) <= half:
        return "Whether the prompt makes it more or less likely is within the error."
    bits = plus_minus(abs(found.gain), half)
    if found.gain < 0:
        return f"The prompt costs <strong>{bits} bits</strong> in all: with it, the picture is less likely."
    return f"The prompt saves <strong>{bits} bits</strong> in all."


def likelihood_csv(found: "Likelihood") -> str:
    """One row per bin of log-SNR: squared errors per dimension, without and with the prompt."""
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
    document = {"image": image_settings(scene, model_name), **rounded(found.to_dict())}
    return json.dumps(document, ensure_ascii=False)


def likelihood_python(scene: Scene, found: "Likelihood", model_name: str) -> str:
    """Lines that repeat the result in a notebook."""
    prompt = json.dumps(scene.prompt, ensure_ascii=False)
    return (
        f"{image_lines(scene, model_name)}"
        f"found = core.likelihood(\n    model, image, {prompt}, error={found.settings['error']:g}, seed={found.seed},\n"
        f"    num_inference_steps={found.settings['num_inference_steps']}\n)\n"
        'print(f"{found.bits_per_dim:.3f} bits per dimension, standard error {found.stderr:.3f}")\n'
    )
