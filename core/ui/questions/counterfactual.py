"""Counterfactual word removal: the image with and without a word, from the same noise, compared with the word's map."""

import json
from html import escape
from typing import Any

import numpy as np

from core.arrays import Floats
from core.ui.backend.runtime import Runtime
from core.ui.look.blocks import folded_code_html
from core.ui.look.export import csv_of, image_lines, image_settings, rounded
from core.ui.look.images import data_url, layer
from core.ui.look.scene import Scene, t95
from core.ui.look.words import plus_minus
from core.ui.questions.answers import answer_downloads, answer_html
from core.ui.questions.jobs import Counterfactual

_LITTLE = 2.0
"""A change below this many times the reconstruction error is called negligible."""
_STRONG, _WEAK = 0.5, 0.15
"""Correlations above which the maps are called in agreement, and below which they are not."""


def counterfactual_html(runtime: Runtime, scene: Scene, counterfactual: Counterfactual, running: bool = False) -> str:
    """Everything about one word that is removed or replaced."""
    change = counterfactual.change
    word, to = change.word, change.to
    gone = f"without “{escape(word)}”" if to is None else f"with “{escape(to)}” for “{escape(word)}”"
    downloads = answer_downloads(
        "without-word",
        counterfactual_csv(counterfactual),
        counterfactual_json(scene, counterfactual, runtime.name),
        scene,
    )
    before, after = (f'<img src="{data_url(image)}" alt="">' for image in (change.before, change.after))
    figures = [
        _figure(before, f"with “{escape(word)}”", "redrawn, unchanged prompt"),
        _figure(after, gone, "redrawn from the same noise"),
        _figure(_map(change.change), "what changed", "brighter = more"),
        _figure(*_word_map(counterfactual)),
    ]
    body = (
        f'<p class="id-lead">{_sentence(counterfactual, gone)}</p><div class="id-parts">{"".join(figures)}</div>'
        f"<p>{_agreement_sentence(counterfactual)}</p>"
        f'<p class="id-hint id-notes">{_method(counterfactual)}</p>{downloads}'
        f"{folded_code_html(counterfactual_python(scene, counterfactual, runtime.name))}"
    )
    return answer_html("counterfactual", scene, running, {"word": word, "to": to or ""}, body)


def agreement(counterfactual: Counterfactual) -> float | None:
    """Pearson correlation over the cells of the change and the word's bits; None if a map is constant or missing."""
    bits = _bits_map(counterfactual)
    if bits is None:
        return None
    maps = counterfactual.change.change.ravel(), bits.ravel()
    if min(float(np.ptp(values)) for values in maps) == 0:
        return None
    return float(np.corrcoef(*maps)[0, 1])


def _bits_map(counterfactual: Counterfactual) -> Floats | None:
    a = counterfactual.attribution
    return None if a is None else a.maps[a.words.index(counterfactual.change.word)]


def _figure(image: str, title: str, note: str) -> str:
    caption = f"<figcaption><b>{title}</b><span>{note}</span></figcaption>"
    return f'<figure><div class="id-part">{image}</div>{caption}</figure>'


def _map(values: Floats, half_width: Floats | None = None) -> str:
    half = np.zeros_like(values) if half_width is None else half_width
    return f'<img src="{data_url(layer(values, half, float(values.max(initial=0.0))), quality=90)}" alt="">'


def _word_map(counterfactual: Counterfactual) -> tuple[str, str, str]:
    a, word = counterfactual.attribution, counterfactual.change.word
    title = f"where “{escape(word)}” mattered"
    if a is None:
        return '<p class="id-empty">being measured…</p>', title, "bits beyond the other words"
    i = a.words.index(word)
    half = t95(a.n_replicates)
    bits = plus_minus(float(a.bits[i]), half * float(a.stderr[i]))
    return _map(a.maps[i], half * a.map_stderr[i]), title, f"{bits} bits beyond the other words"


def _sentence(counterfactual: Counterfactual, gone: str) -> str:
    change = counterfactual.change
    if change.relative_change < _LITTLE * change.reconstruction_error:
        return f"Redrawn {gone}, the picture changes hardly more than by redrawing it unchanged."
    rest = "" if change.changed_prompt else " That leaves an empty prompt."
    return f"Redrawn {gone}, <strong>{change.relative_change:.0%}</strong> of the picture changes.{rest}"


def _agreement_sentence(counterfactual: Counterfactual) -> str:
    r = agreement(counterfactual)
    if r is None:
        return (
            "The word's own map is not measured yet."
            if counterfactual.attribution is None
            else "One of the two maps is constant."
        )
    if r > _STRONG:
        how = "The change is where the word mattered most"
    elif r > _WEAK:
        how = "The change is partly where the word mattered, partly elsewhere"
    else:
        how = "The change is not where the word mattered"
    return (
        f"{how}: cell by cell, the two maps have a <dfn>correlation</dfn> of <strong>{_signed(r)}</strong> "
        "(1 is the same pattern, 0 none)."
    )


def _method(counterfactual: Counterfactual) -> str:
    change = counterfactual.change
    return (
        "The sampler is run backwards to the noise from which it would have drawn this picture, without guidance, and "
        f"forwards again. With the same prompt this reproduces the picture to "
        f"<b>{change.reconstruction_error:.1%}</b>; ignore smaller changes. {change.n_evals:,} U-Net evaluations."
    )


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def counterfactual_values(counterfactual: Counterfactual) -> dict[str, Any]:
    """The figures, without maps."""
    change = counterfactual.change
    r = agreement(counterfactual)
    return {
        "word": change.word,
        "to": change.to,
        "changed_prompt": change.changed_prompt,
        "relative_change": round(change.relative_change, 6),
        "reconstruction_error": round(change.reconstruction_error, 6),
        "correlation": None if r is None else round(r, 4),
        "n_evals": change.n_evals,
    }


def counterfactual_csv(counterfactual: Counterfactual) -> str:
    """One row per latent cell: how much it changed, and the bits of the word there."""
    bits = _bits_map(counterfactual)
    rows = [
        {
            "row": row,
            "column": column,
            "change": round(float(value), 6),
            "bits": "" if bits is None else round(float(bits[row, column]), 6),
        }
        for (row, column), value in np.ndenumerate(counterfactual.change.change)
    ]
    return csv_of(rows)


def counterfactual_json(scene: Scene, counterfactual: Counterfactual, model_name: str) -> str:
    """All settings, figures and maps."""
    bits = _bits_map(counterfactual)
    document = {
        "image": image_settings(scene, model_name),
        **counterfactual_values(counterfactual),
        "change": rounded(counterfactual.change.change.tolist()),
        "bits": None if bits is None else rounded(bits.tolist()),
    }
    return json.dumps(document, ensure_ascii=False)


def counterfactual_python(scene: Scene, counterfactual: Counterfactual, model_name: str) -> str:
    """Lines that repeat the result in a notebook."""
    arguments = [
        scene.prompt,
        counterfactual.change.word,
        *([] if counterfactual.change.to is None else [counterfactual.change.to]),
    ]
    texts = ", ".join(json.dumps(text, ensure_ascii=False) for text in arguments)
    return (
        f"{image_lines(scene, model_name)}"
        f"changed = core.change_word(model, image, {texts})\n"
        "changed.before, changed.after  # two images from one noise\n"
        'print(f"{changed.relative_change:.1%} changed, error {changed.reconstruction_error:.1%}")\n'
    )
