"""The prompt's words as chips, and a card about each word."""

import json
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from core.arrays import Floats
from core.diffusion.text import delete_words, occurrences
from core.information.results import Attribution, Given
from core.spec import STAGES, Stage
from core.ui.look.colours import ink_on, scale_hex
from core.ui.look.images import data_url, layer
from core.ui.look.scene import contradicts, direct_half_width, half_width, stage_shares, t95, unsure
from core.ui.look.timeline import common_top, difference_svg, errors_svg, timeline_svg

_TWO_LN2 = 2 * math.log(2)
"""Divides the area between two error curves to give bits."""


def value_and_error(value: float, error: float) -> tuple[str, str]:
    """A number and its error as text, with the digits that the error makes meaningful."""
    digits = 2 if error < 0.095 else 1 if error < 9.95 else 0
    return f"{value:.{digits}f}".replace("-", "−"), f"{error:.{digits}f}"


def plus_minus(value: float, error: float) -> str:
    """A number and its error as one text."""
    return " ± ".join(value_and_error(value, error))


def chips(prompt: str, a: Attribution) -> str:
    """Every measured word or phrase of the prompt as a button, coloured and weighted by its bits; the rest as text."""
    top = float((a.bits + half_width(a)).max(initial=1e-9))
    index = {word: i for i, word in enumerate(a.words)}
    parts: list[str] = []
    at = 0
    for word in occurrences(prompt, a.words):
        parts.append(_gap(prompt[at : word.start]))
        parts.append(_chip(prompt[word.start : word.end], index[word.text], a, top))
        at = word.end
    parts.append(_gap(prompt[at:]))
    return f'<div class="id-words" role="group" aria-label="Words of the prompt">{"".join(parts)}</div>'


def _gap(text: str) -> str:
    return f'<span class="id-gap">{escape(text.strip())}</span>' if text.strip() else ""


def _chip(text: str, i: int, a: Attribution, top: float) -> str:
    bits, half = float(a.bits[i]), float(half_width(a)[i])
    share = bits / max(float(a.bits.max(initial=0.0)), 1e-9)
    low, high, dot = (100 * min(max(v / top, 0), 1) for v in (bits - half, bits + half, bits))
    shown, shown_error = value_and_error(bits, half)
    flag = ""
    if contradicts(a)[i]:
        flag = '<span class="id-flag">contradicts the picture</span>'
    elif unsure(a)[i]:
        flag = '<span class="id-flag">not sure</span>'
    classes = "id-chip" + (" contradicts" if contradicts(a)[i] else "") + (" unsure" if unsure(a)[i] else "")
    return (
        f'<button type="button" class="{classes}" data-word="{escape(a.words[i])}" data-bits="{bits:.4f}" '
        f'aria-pressed="false" '
        f'style="--c:{scale_hex(share)};--ink:{ink_on(share)};--w:{round(420 + 330 * min(share, 1))}">'
        f'<span class="id-word">{escape(text)}</span>'
        f'<span class="id-bits"><b>{shown}</b> ± {shown_error}<span class="id-sr"> bits</span></span>'
        f'<span class="id-whisker" aria-hidden="true"><i style="left:{low:.1f}%;right:{100 - high:.1f}%"></i>'
        f'<u style="left:{dot:.1f}%"></u></span>{flag}</button>'
    )


def cards(a: Attribution, stages: tuple[Stage, ...] = STAGES, notes: Sequence[str] = ()) -> str:
    """One card per word, with its note as HTML if there are notes; the page's script shows the chosen one's."""
    shares = stage_shares(a, stages)
    half = a.timeline.stderr * t95(a.n_replicates)
    top = common_top(a.timeline.edges, a.timeline.bits, half, stages)
    parts = []
    for i, word in enumerate(a.words):
        label = escape(f"When “{word}” mattered")
        own, same = (
            timeline_svg(a.timeline.edges, a.timeline.bits[i], half[i], label, axis_top, stages)
            for axis_top in (None, top)
        )
        parts.append(
            f'<section class="id-card" data-for="{escape(word)}" hidden>{_actions(word)}{_sentence(a, i)}'
            f"{notes[i] if notes else ''}"
            f'<h3>When it mattered</h3><p class="id-hint">The picture grows out of noise from left to right; '
            f"<dfn>log-SNR</dfn> says how much picture there is relative to noise (log signal-to-noise ratio), and the "
            f"area under the curve is the word’s bits. The pale band is the 95% error.</p>"
            f'<div class="id-own">{own}</div><div class="id-same">{same}</div>{_share_bar(shares[i], stages)}'
            f"{_curves(a, i, stages)}</section>"
        )
    return "".join(parts)


def _actions(word: str) -> str:
    """What to do next with a word, one click each; the page's script adds the words to swap it for."""
    label = escape(word)
    out, concepts, pair = (
        f'<button type="button" class="id-button id-act" data-act="{act}">{text}</button>'
        for act, text in (("out", "take it out"), ("concepts", "its concepts"), ("pair", "compare with another word"))
    )
    return (
        f'<div class="id-actions" data-word="{label}" role="group" aria-label="What to do with “{label}”">'
        f'<b>“{label}”</b> {out}<span class="id-swaps" data-word="{label}"></span>{concepts}{pair}</div>'
    )


def _curves(a: Attribution, i: int, stages: tuple[Stage, ...]) -> str:
    """The two error curves behind a word's direct bits, folded; empty if they were not stored."""
    if a.curves is None:
        return ""
    word, factor, edges = escape(a.words[i]), t95(a.n_replicates), a.timeline.edges
    errors = np.stack([a.curves.without[i], a.curves.with_word[i]])
    half = factor * np.stack([a.curves.without_stderr[i], a.curves.with_word_stderr[i]])
    difference_stderr = a.curves.difference_stderr
    known = None if difference_stderr is None else factor * difference_stderr[i] / _TWO_LN2
    curve_error = float(np.linalg.norm(half[1] * np.diff(edges))) / _TWO_LN2
    alone = f"{float(f'{curve_error:.2g}'):,g}"
    without, with_word = (
        ("without", f"with “{word}”") if a.given == "rest" else ("with no prompt", f"with “{word}” alone")
    )
    total = plus_minus(float(a.direct_bits[i]), float(direct_half_width(a)[i]))
    labels = (
        f"Squared errors without “{a.words[i]}” and with it",
        f"Half the difference between them for “{a.words[i]}”",
    )
    return (
        '<details class="id-more id-curves"><summary>The two error curves behind the signed check</summary>'
        '<p class="id-hint">At every noise level the model predicts the noise. The curves show how far off it is, '
        f"as <dfn>squared error</dfn> summed over the latents: {curve_key('dashed', without)} and "
        f"{curve_key('', with_word)}, each with its pale 95% band.</p>"
        f"{errors_svg(edges, errors, half, escape(labels[0]), stages)}"
        '<p class="id-hint">Half of the area between the two curves is the word’s direct information in nats; divided '
        f"by ln 2 it is the signed check above, <b>{total} bits</b>. It is known far better than the area under either "
        f"curve (half of which is uncertain by about {alone} bits), because both curves see the same noise. "
        f"Half the difference, in bits{'' if known is None else ', with its band'}:</p>"
        f"{difference_svg(edges, (errors[0] - errors[1]) / _TWO_LN2, known, escape(labels[1]), stages)}</details>"
    )


def curve_key(kind: str, text: str) -> str:
    """A legend entry: a piece of the line and its text; `kind` is `dashed` or empty."""
    return f'<span class="id-curve"><i class="{kind}" aria-hidden="true"></i>{text}</span>'


def _sentence(a: Attribution, i: int) -> str:
    word, bits, half = escape(a.words[i]), float(a.bits[i]), float(half_width(a)[i])
    direct, direct_half = float(a.direct_bits[i]), float(direct_half_width(a)[i])
    who = f"“{word}”" + ("" if a.given == "rest" else " alone")
    given = given_phrase(a.given, a.prompt, [a.words[i]])
    if unsure(a)[i]:
        meaning = "That is within the error: this word may contribute nothing."
    elif contradicts(a)[i]:
        meaning = (
            "But the signed check is negative: the picture fits <em>worse</em> with this word than without it, so the "
            "word contradicts the picture."
        )
    else:
        meaning = f"One bit halves the possible pictures; this word leaves {_left(bits)}."
    return (
        f'<p class="id-lead">{who} contributed <strong>{plus_minus(bits, half)} bits</strong>{given}.</p>'
        f"<p>{meaning}</p>"
        f'<p class="id-hint"><b>Signed check</b>: does the word fit this picture? {plus_minus(direct, direct_half)} '
        "bits; negative where it does not. It answers whether a text is right, and can be compared with what a word "
        "can tell at all. The first figure answers how strongly the word moves what the model draws, rightly or "
        "wrongly: it is never negative, far less noisy, and can be shown where and when. All errors are 95% "
        "intervals.</p>"
    )


def given_phrase(given: Given, prompt: str, words: Sequence[str]) -> str:
    """What the bits of some words are measured against, as the end of a sentence."""
    rest = delete_words(prompt, words)
    return " beyond the other words" if given == "rest" and rest else " compared with an empty prompt"


def _left(bits: float) -> str:
    """The share of the possible pictures that so many bits leave, in words."""
    if bits < 3:
        return f"about {2**-bits:.0%} of them"
    if bits >= 60:
        return f"one in 2 to the power of {bits:.0f}"
    whole = 2**bits
    for size, name in ((1e15, " million billion"), (1e12, " million million"), (1e9, " billion"), (1e6, " million")):
        if whole >= size:
            return f"about one in {_two_digits(whole / size)}{name}"
    return f"about one in {_two_digits(whole)}"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0")


def _share_bar(shares: Floats, stages: tuple[Stage, ...]) -> str:
    values = [float(v) for v in shares]
    parts = "".join(
        f'<span class="{stage.name}" style="flex-grow:{max(value, 0.001):.4f}"></span>'
        for stage, value in zip(stages, values, strict=True)
    )
    names = " · ".join(f"{stage.name} {value:.0%}" for stage, value in zip(stages, values, strict=True))
    return (
        f'<div class="id-shares"><div class="id-share-bar" aria-hidden="true">{parts}</div><span>{names}</span></div>'
    )


def layers_json(a: Attribution) -> str:
    """The overlays of all words, each on its own and on the common scale, as JSON for the page's script."""
    half = a.map_stderr * t95(a.n_replicates)
    common = float(a.maps.max(initial=0.0))
    layers = {}
    for word, bits, error in zip(a.words, a.maps, half, strict=True):
        own = float(bits.max(initial=0.0))
        layers[word] = {
            "own": data_url(layer(bits, error, own), quality=90),
            "same": data_url(layer(bits, error, common), quality=90),
            "ownTop": f"{own:.2g}",
            "sameTop": f"{common:.2g}",
        }
    return json.dumps(layers)


def badge_html(state: str, text: str) -> str:
    """The model and its state: `loading`, `ready` or `failed`."""
    return f'<div class="id-badge {state}" role="status"><i></i>{escape(text)}</div>'


def hints(unknown: dict[str, list[str]], model_name: str) -> str:
    """Words outside the model's vocabulary, each with suggestions to click."""
    parts = []
    for word, near in unknown.items():
        buttons = "".join(
            f'<button type="button" class="id-suggest" data-word="{escape(word)}" data-with="{escape(other)}">'
            f"{escape(other)}</button>"
            for other in near
        )
        parts.append(
            f'<span class="id-unknown">“<u>{escape(word)}</u>” is not in the vocabulary of {escape(model_name)}'
            f"{': did you mean ' + buttons if near else ': remove it'}</span>"
        )
    return f'<div class="id-hints" role="status">{"".join(parts)}</div>'
