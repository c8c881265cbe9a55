"""A picture with a word and without it, from the same noise, and whether the change is where the word had told it."""

import json
from html import escape
from typing import Any

import numpy as np

from core.arrays import Floats
from core.ui.look.export import csv_of, image_lines, image_settings, rounded
from core.ui.look.images import data_url, layer
from core.ui.look.scene import Scene, t95
from core.ui.look.words import plus_minus
from core.ui.questions.answers import answer_html, code_html, keep_html
from core.ui.questions.jobs import Absence
from core.ui.runtime import Runtime

_LITTLE = 2.0
"""A change below this many times the error of the way back is hardly one."""
_SIMILARITY_THRESHOLD, _UNLIKE = 0.5, 0.15
"""Correlations above which two maps are called alike, and below which they are not."""


def absence_html(runtime: Runtime, scene: Scene, absence: Absence, running: bool = False) -> str:
    """Everything about one word that is left out or replaced."""
    change = absence.change
    word, to = change.word, change.to
    gone = f"without “{escape(word)}”" if to is None else f"with “{escape(to)}” for “{escape(word)}”"
    keep = keep_html(
        "without-word", absence_csv(absence), absence_json(scene, absence, runtime.name), link=not scene.own
    )
    before, after = (f'<img src="{data_url(image)}" alt="">' for image in (change.before, change.after))
    figures = [
        _figure(before, f"with “{escape(word)}”", "drawn again from its noise"),
        _figure(after, gone, "drawn from the same noise"),
        _figure(_map(change.change), "what changed", "brighter is more"),
        _figure(*_told(absence)),
    ]
    body = (
        f'<p class="id-lead">{_sentence(absence, gone)}</p><div class="id-parts">{"".join(figures)}</div>'
        f"<p>{_agreement(absence)}</p>"
        f'<p class="id-hint id-notes">{_how(absence)}</p>{keep}'
        f"{code_html(absence_python(scene, absence, runtime.name))}"
    )
    return answer_html("absence", scene, running, {"word": word, "to": to or ""}, body)


def agreement(absence: Absence) -> float | None:
    """Pearson's correlation, cell by cell, of the change and of what the word told; None where either is flat."""
    told = _told_map(absence)
    if told is None:
        return None
    maps = absence.change.change.ravel(), told.ravel()
    if min(float(np.ptp(values)) for values in maps) == 0:
        return None
    return float(np.corrcoef(*maps)[0, 1])


def _told_map(absence: Absence) -> Floats | None:
    told = absence.told
    return None if told is None else told.maps[told.words.index(absence.change.word)]


def _figure(picture: str, title: str, note: str) -> str:
    caption = f"<figcaption><b>{title}</b><span>{note}</span></figcaption>"
    return f'<figure><div class="id-part">{picture}</div>{caption}</figure>'


def _map(values: Floats, half_width: Floats | None = None) -> str:
    half = np.zeros_like(values) if half_width is None else half_width
    return f'<img src="{data_url(layer(values, half, float(values.max(initial=0.0))), quality=90)}" alt="">'


def _told(absence: Absence) -> tuple[str, str, str]:
    told, word = absence.told, absence.change.word
    title = f"where “{escape(word)}” told it"
    if told is None:
        return '<p class="id-empty">being measured…</p>', title, "bits given the rest of the prompt"
    i = told.words.index(word)
    half = t95(told.n_replicates)
    bits = plus_minus(float(told.bits[i]), half * float(told.stderr[i]))
    return _map(told.maps[i], half * told.map_stderr[i]), title, f"{bits} bits given the rest of the prompt"


def _sentence(absence: Absence, gone: str) -> str:
    change = absence.change
    if change.relative_change < _LITTLE * change.reconstruction_error:
        return f"Drawn {gone}, the picture changes by hardly more than drawing it again does."
    rest = "" if change.changed_prompt else " That leaves no prompt at all."
    return f"Drawn {gone}, the picture changes by <strong>{change.relative_change:.0%}</strong> of itself.{rest}"


def _agreement(absence: Absence) -> str:
    r = agreement(absence)
    if r is None:
        return "Of what the word told there is no map yet." if absence.told is None else "One of the two maps is flat."
    if r > _SIMILARITY_THRESHOLD:
        how = "It changed where the word had told it most"
    elif r > _UNLIKE:
        how = "It changed where the word had told it, and elsewhere"
    else:
        how = "It did not change where the word had told it"
    return (
        f"{how}: cell by cell, the two maps have a <dfn>correlation</dfn> of <strong>{_signed(r)}</strong> "
        "(1 is the same pattern, 0 none)."
    )


def _how(absence: Absence) -> str:
    change = absence.change
    return (
        "The sampler is run backwards to the noise from which it would have drawn this picture, without guidance, and "
        "forwards again. With the same prompt that leads back to the picture but for "
        f"<b>{change.reconstruction_error:.1%}</b>; smaller changes mean nothing. {change.n_evals:,} U-Net evaluations."
    )


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def absence_values(absence: Absence) -> dict[str, Any]:
    """The figures, without maps."""
    change = absence.change
    r = agreement(absence)
    return {
        "word": change.word,
        "to": change.to,
        "changed_prompt": change.changed_prompt,
        "relative_change": round(change.relative_change, 6),
        "reconstruction_error": round(change.reconstruction_error, 6),
        "correlation": None if r is None else round(r, 4),
        "n_evals": change.n_evals,
    }


def absence_csv(absence: Absence) -> str:
    """A row a latent cell: how much it changed, and what the word had told it."""
    told = _told_map(absence)
    rows = [
        {
            "row": row,
            "column": column,
            "change": round(float(value), 6),
            "bits": "" if told is None else round(float(told[row, column]), 6),
        }
        for (row, column), value in np.ndenumerate(absence.change.change)
    ]
    return csv_of(rows)


def absence_json(scene: Scene, absence: Absence, model_name: str) -> str:
    """All settings, figures and maps."""
    told = _told_map(absence)
    document = {
        "picture": image_settings(scene, model_name),
        **absence_values(absence),
        "change": rounded(absence.change.change.tolist()),
        "bits": None if told is None else rounded(told.tolist()),
    }
    return json.dumps(document, ensure_ascii=False)


def absence_python(scene: Scene, absence: Absence, model_name: str) -> str:
    """Lines that repeat the result in a notebook."""
    asked = [scene.prompt, absence.change.word, *([] if absence.change.to is None else [absence.change.to])]
    texts = ", ".join(json.dumps(text, ensure_ascii=False) for text in asked)
    return (
        f"{image_lines(scene, model_name)}"
        f"changed = core.change_word(model, image, {texts})\n"
        "changed.before, changed.after  # two pictures from one noise\n"
        'print(f"{changed.relative_change:.1%} changed, error {changed.reconstruction_error:.1%}")\n'
    )
