"""What two words tell a picture together and apart, as the page shows it: four maps, their totals, a sentence each."""

from html import escape
from typing import NamedTuple

from core.information.decomposition import Decomposition, Part, Total
from core.ui.look.images import data_url, signed_layer
from core.ui.look.scene import Scene
from core.ui.look.words import against, plus_minus
from core.ui.look.words import pair as digits
from core.ui.questions.answers import answer_html, code_html, ended, keep_html
from core.ui.questions.pair_export import pair_csv, pair_json, pair_python, pair_rows
from core.ui.runtime import Runtime


class _Shown(NamedTuple):
    """A part of what two words tell, in words."""

    key: str
    title: str
    term: str
    part: Part
    meaning: str
    """What it says where it is larger than its error, above or below zero."""


def pair_html(runtime: Runtime, scene: Scene, d: Decomposition, running: bool = False) -> str:
    """Everything about one pair. Choosing a map happens in the browser."""
    told, factor = d.pairs[0], d.interval_factor()
    first, second = told.words
    top = max(float(abs(part.map).max(initial=0.0)) for part in told.parts)
    whole = plus_minus(told.together.bits, factor * told.together.stderr)
    figures = "".join(_figure(shown, factor, top) for shown in _in_words(d))
    keep = keep_html("pair", pair_csv(d), pair_json(scene, d, runtime.name), link=not scene.own)
    data = {"first": first, "second": second, "given": d.given, "top": f"{top:.2g}"}
    body = (
        f'<p class="id-lead">“{escape(first)}” and “{escape(second)}” together told the picture '
        f"<strong>{whole} bits</strong>{against(d.given, d.prompt, d.words)}.</p>"
        f"<p>{_conclusion(d)}</p>"
        f'<div class="id-parts" role="group" aria-label="Four parts of what the two words tell">{figures}</div>'
        f'<p class="id-hint id-signed-legend"><span>−{top:.2g}</span><i aria-hidden="true"></i><span>{top:.2g} bits a '
        "cell.</span> One scale for all four: blue is below zero, dark is zero or not more than the error. The four "
        "add up to what the two words tell together. Choose a map to lay it on the picture.</p>"
        f"{keep}{_details(runtime, scene, d)}"
        f'<p class="id-hint id-notes">{ended(d, running)} All errors are 95% intervals.</p>'
    )
    return answer_html("pair", scene, running, data, body)


def _in_words(d: Decomposition) -> list[_Shown]:
    told = d.pairs[0]
    first, second = (f"“{word}”" for word in told.words)
    alone = "It takes {}; {} does not tell it."
    clash = "Less than nothing: the two words together tell less than what each tells would add up to."
    return [
        _Shown("redundancy", "by either", "redundancy", told.redundancy, "Read either word, and you know this."),
        _Shown("first", f"only by {first}", "unique", told.unique[0], alone.format(first, second)),
        _Shown("second", f"only by {second}", "unique", told.unique[1], alone.format(second, first)),
        _Shown(
            "synergy",
            "only by both together",
            "synergy",
            told.synergy,
            clash if told.synergy.bits < 0 else "Neither word alone tells this; the two together do.",
        ),
    ]


def _figure(shown: _Shown, factor: float, top: float) -> str:
    part = shown.part
    half = factor * part.stderr
    picture = data_url(signed_layer(part.map, factor * part.map_stderr, top), quality=90)
    meaning = shown.meaning if abs(part.bits) > half else "Not more than the error: there may be none of it."
    label = escape(f"{shown.title}: {' ± '.join(digits(part.bits, half))} bits. Lay this map on the picture")
    return (
        f'<figure><button type="button" class="id-part" data-part="{shown.key}" aria-pressed="false" '
        f'data-title="{escape(shown.title)}" aria-label="{label}"><img src="{picture}" alt=""></button>'
        f"<figcaption><b>{escape(shown.title)}</b> <small>({shown.term})</small>"
        f'<span class="id-part-bits">{plus_minus(part.bits, half)} bits</span><span>{escape(meaning)}</span>'
        "</figcaption></figure>"
    )


def _conclusion(d: Decomposition) -> str:
    told = d.pairs[0]
    whole = told.together.bits
    if whole <= d.interval_factor() * told.together.stderr:
        return "That is not more than the error: the two words may have told it nothing."
    shares = {
        "Mostly the two say the same: {} of it either word would have told.": told.redundancy.bits,
        "Mostly each tells what the other does not: {} of it comes from one word alone.": sum(
            part.bits for part in told.unique
        ),
        "Mostly it takes both: {} of it is told by the two words together and by neither alone.": told.synergy.bits,
    }
    sentence, most = max(shares.items(), key=lambda item: item[1])
    return sentence.format(f"{min(most / whole, 1):.0%}")


def _details(runtime: Runtime, scene: Scene, d: Decomposition) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(row["what"])}</th><td>{plus_minus(row["bits"], row["bits_95"])}</td>'
        f"<td>{row['estimate']}</td></tr>"
        for row in pair_rows(d)
        if "by surprisal" not in row["what"]
    )
    return (
        '<details class="id-more"><summary>All numbers</summary><div class="id-scroll"><table><thead><tr>'
        '<th scope="col">what</th><th scope="col">bits</th><th scope="col">estimate</th></tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="id-hint">Orthogonal bits, which the maps show, are never '
        "negative for a word or for both; in each cell the smaller of what the two tell is told by either. Direct bits "
        "can be added and compared on one picture: redundancy less synergy is what the two words tell less together "
        "than one by one, whichever way redundancy is counted.</p></details>"
        f"{_by_surprisal(d)}{code_html(pair_python(scene, d, runtime.name))}"
    )


def _by_surprisal(d: Decomposition) -> str:
    told, factor = d.pairs[0], d.interval_factor()
    summary = '<details class="id-more"><summary>Counted the other way, by how rare the words are</summary>'
    other = told.by_surprisal
    if other is None:
        why = (
            "This way needs to know how rare each word is when nothing else is known: count the two “alone”."
            if d.given == "rest"
            else "How rare this model’s words are is not known here, so that this way cannot be counted."
        )
        return f'{summary}<p class="id-hint">{why}</p></details>'
    totals: dict[str, Total] = {
        "by either (redundancy)": other.redundancy,
        **{f"only by “{word}”": part for word, part in zip(told.words, other.unique, strict=True)},
        "only by both together (synergy)": other.synergy,
    }
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{plus_minus(total.bits, factor * total.stderr)}</td></tr>'
        for name, total in totals.items()
    )
    rare = " and ".join(f"“{escape(word)}” {bits:.1f}" for word, bits in zip(told.words, other.surprisals, strict=True))
    over = [f"“{escape(word)}”" for word, more in zip(told.words, other.exceeded, strict=True) if more]
    flag = (
        f" But {' and '.join(over)} told more bits than that, as guided pictures can make a word do, so this count "
        "means little here."
        if over
        else ""
    )
    return (
        f'{summary}<div class="id-scroll"><table><tbody>{rows}</tbody></table></div><p class="id-hint">A word’s '
        f"<dfn>surprisal</dfn> is how many bits it takes to guess it: {rare}. What either tells is then counted as the "
        "bits of the likelier word that are known from either (direct bits; totals only, which may be negative)."
        f"{flag}</p></details>"
    )
