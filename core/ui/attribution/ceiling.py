"""What a word can tell at most, and how much of its bits a perfect model could not have told."""

from html import escape

from core.information.results import Attribution
from core.information.surprisal import ceiling, load_ceilings, load_excess
from core.spec import ModelSpec
from core.ui.look.scene import direct_half_width
from core.ui.look.words import plus_minus


def ceilings_html(spec: ModelSpec, a: Attribution) -> list[str]:
    """A paragraph for each word of an attribution; empty where it is not known what the word can tell."""
    return [_paragraph(spec, a, i) for i in range(len(a.words))]


def ceiling_cell(spec: ModelSpec, a: Attribution, i: int) -> str:
    """The most that a word can tell, for a table."""
    most = ceiling(spec, a.words[i], a.given)
    return "–" if most is None else f"{most:.1f}"


def _paragraph(spec: ModelSpec, a: Attribution, i: int) -> str:
    most = ceiling(spec, a.words[i], a.given)
    if most is None:
        return ""
    bits, half = float(a.direct_bits[i]), float(direct_half_width(a)[i])
    others = " after the other words" if a.given == "rest" else ""
    if bits - half > most:
        verdict = (
            f"So <b>{1 - most / bits:.0%}</b> of the {bits:.1f} bits of fit could not have been told by a perfect "
            "model: that part is this model’s own error."
        )
    else:
        verdict = "The fit does not exceed that beyond its error."
    return (
        f'<p class="id-hint"><b>The most it can tell</b>: {most:.1f} bits. In the captions that the model learned '
        f"from, “{escape(a.words[i])}” is never harder to guess{others}. {verdict}{_on_average(spec, a, i)}</p>"
    )


def _on_average(spec: ModelSpec, a: Attribution, i: int) -> str:
    """What the model adds to words of this kind on average, where that was measured and is clear."""
    entry = load_ceilings(spec).get(a.words[i])
    excess = load_excess(spec).get(entry.kind) if entry and a.given == "rest" else None
    if entry is None or excess is None or excess.low <= 0:
        return ""
    text = (
        f" On painted scenes that it had never seen, it gave words for {_NAMES[entry.kind]} {excess.bits:.1f} bits too "
        f"many on average ({excess.low:.1f} to {excess.high:.1f})"
    )
    if excess.half_width is None:
        return f"{text}; it varies too much to be subtracted from one picture’s bits."
    return f"{text}, which leaves {plus_minus(float(a.direct_bits[i]) - excess.bits, excess.half_width)} bits here."


_NAMES = {"object": "things", "background": "places", "style": "styles", "relation": "relations"}
"""The kinds of words, as the page calls them."""
