"""Partial information decomposition of two words, as the page shows it: four maps, their totals, a sentence each."""

from html import escape
from typing import NamedTuple

import numpy as np

from core.information.decomposition import Decomposition, Part, Total
from core.ui.backend.runtime import Runtime
from core.ui.look.blocks import folded_code_html, table_html
from core.ui.look.images import data_url, signed_layer
from core.ui.look.scene import Scene
from core.ui.look.words import given_phrase, plus_minus, value_and_error
from core.ui.questions.answers import answer_downloads, answer_html, stopped_note
from core.ui.questions.pair_export import pair_csv, pair_json, pair_python, pair_rows


class _ShownPart(NamedTuple):
    """One part of the decomposition, in words."""

    key: str
    title: str
    term: str
    part: Part
    meaning: str
    """What it means if it is larger than its error, above or below zero."""


def pair_html(runtime: Runtime, scene: Scene, d: Decomposition, running: bool = False) -> str:
    """Everything about one pair. Choosing a map happens in the browser."""
    pair, factor = d.pairs[0], d.interval_factor()
    first, second = pair.words
    top = max(float(abs(part.map).max(initial=0.0)) for part in pair.parts)
    whole = plus_minus(pair.together.bits, factor * pair.together.stderr)
    figures = "".join(_figure(shown, factor, top) for shown in _in_words(d))
    downloads = answer_downloads("pair", pair_csv(d), pair_json(scene, d, runtime.name), scene)
    data = {"first": first, "second": second, "given": d.given, "top": f"{top:.2g}"}
    body = (
        f'<p class="id-lead">“{escape(first)}” and “{escape(second)}” together contributed '
        f"<strong>{whole} bits</strong>{given_phrase(d.given, d.prompt, d.words)}.</p>"
        f"<p>{_conclusion(d)}</p>"
        f'<div class="id-parts" role="group" aria-label="The four parts of the decomposition">{figures}</div>'
        f'<p class="id-hint id-signed-legend"><span>−{top:.2g}</span><i aria-hidden="true"></i><span>{top:.2g} bits '
        "per cell.</span> One scale for all four: blue is negative, dark is zero or within the error. The four add up "
        "to what the two words contribute together. Choose a map to show it on the picture.</p>"
        f"{downloads}{_details(runtime, scene, d)}"
        f'<p class="id-hint id-notes">{stopped_note(d, running)} All errors are 95% intervals.</p>'
    )
    return answer_html("pair", scene, running, data, body)


def _in_words(d: Decomposition) -> list[_ShownPart]:
    pair = d.pairs[0]
    first, second = (f"“{word}”" for word in pair.words)
    alone = "Only {} gives this; {} does not."
    clash = "Negative: together the two words contribute less than their separate contributions add up to."
    return [
        _ShownPart("redundancy", "by either", "redundancy", pair.redundancy, "Either word alone would give this."),
        _ShownPart("first", f"only by {first}", "unique", pair.unique[0], alone.format(first, second)),
        _ShownPart("second", f"only by {second}", "unique", pair.unique[1], alone.format(second, first)),
        _ShownPart(
            "synergy",
            "only by both together",
            "synergy",
            pair.synergy,
            clash if pair.synergy.bits < 0 else "Neither word alone gives this; only the two together do.",
        ),
    ]


def _figure(shown: _ShownPart, factor: float, top: float) -> str:
    part = shown.part
    half = factor * part.stderr
    source = data_url(signed_layer(part.map, factor * part.map_stderr, top), quality=90)
    meaning = shown.meaning if abs(part.bits) > half else "Within the error: it may be zero."
    label = escape(f"{shown.title}: {' ± '.join(value_and_error(part.bits, half))} bits. Show this map on the picture")
    return (
        f'<figure><button type="button" class="id-part" data-part="{shown.key}" aria-pressed="false" '
        f'data-title="{escape(shown.title)}" aria-label="{label}"><img src="{source}" alt=""></button>'
        f"<figcaption><b>{escape(shown.title)}</b> <small>({shown.term})</small>"
        f'<span class="id-part-bits">{plus_minus(part.bits, half)} bits</span><span>{escape(meaning)}</span>'
        "</figcaption></figure>"
    )


def _conclusion(d: Decomposition) -> str:
    pair = d.pairs[0]
    whole = pair.together.bits
    if whole <= d.interval_factor() * pair.together.stderr:
        return "That is within the error: the two words may contribute nothing."
    first, second = pair.unique
    unique = Total(first.bits + second.bits, float(np.hypot(first.stderr, second.stderr)))
    parts: dict[str, Part | Total] = {
        "Mostly redundant: either word alone would give {} of it.": pair.redundancy,
        "Mostly unique: {} of it comes from one of the words alone.": unique,
        "Mostly synergy: {} of it takes both words together.": pair.synergy,
    }
    sentence, most = max(parts.items(), key=lambda item: item[1].bits)
    if most.bits - d.interval_factor() * most.stderr <= whole / 2:
        return "No part is clearly more than half of it."
    return sentence.format(f"{min(most.bits / whole, 1):.0%}")


def _details(runtime: Runtime, scene: Scene, d: Decomposition) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(row["part"])}</th><td>{plus_minus(row["bits"], row["bits_95"])}</td>'
        f"<td>{row['estimate']}</td></tr>"
        for row in pair_rows(d)
        if "by surprisal" not in row["part"]
    )
    titles = "".join(f'<th scope="col">{title}</th>' for title in ("part", "bits", "estimate"))
    head, body = f"<thead><tr>{titles}</tr></thead>", f"<tbody>{rows}</tbody>"
    return (
        f'<details class="id-more"><summary>All numbers</summary>{table_html(head + body, "All numbers")}'
        '<p class="id-hint">The maps show how strongly words move '
        "what the model draws: that is never negative, has a place, and the redundancy of a cell is the smaller of the "
        "two words’ bits there (estimate “orthogonal”). How well words fit can be negative and has no place, but can "
        "be added and compared on one picture (“direct”): redundancy minus synergy is how much less the two words "
        "contribute together than one by one, however redundancy is defined.</p></details>"
        f"{_by_surprisal(d)}{folded_code_html(pair_python(scene, d, runtime.name))}"
    )


def _by_surprisal(d: Decomposition) -> str:
    pair, factor = d.pairs[0], d.interval_factor()
    summary = '<details class="id-more"><summary>Another definition of redundancy: by the words’ surprisal</summary>'
    other = pair.by_surprisal
    if other is None:
        why = (
            "This needs the surprisal of each word without context: measure the two words “on their own”."
            if d.given == "rest"
            else "The surprisal of this model’s words is not known, so this cannot be measured."
        )
        return f'{summary}<p class="id-hint">{why}</p></details>'
    totals: dict[str, Total] = {
        "by either (redundancy)": other.redundancy,
        **{f"only by “{word}”": part for word, part in zip(pair.words, other.unique, strict=True)},
        "only by both together (synergy)": other.synergy,
    }
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{plus_minus(total.bits, factor * total.stderr)}</td></tr>'
        for name, total in totals.items()
    )
    rare = " and ".join(f"“{escape(word)}” {bits:.1f}" for word, bits in zip(pair.words, other.surprisals, strict=True))
    over = [f"“{escape(word)}”" for word, more in zip(pair.words, other.exceeded, strict=True) if more]
    flag = (
        f" But {' and '.join(over)} contributed more bits than that, which guidance can cause, so these values "
        "mean little here."
        if over
        else ""
    )
    return (
        f"{summary}{table_html(f'<tbody>{rows}</tbody>', 'By surprisal')}"
        '<p class="id-hint">A word’s '
        f"<dfn>surprisal</dfn> is how many bits it takes to guess it: {rare}. Redundancy is then the information that "
        "either word gives about the less surprising one (by fit; totals only, which may be negative)."
        f"{flag}</p></details>"
    )
