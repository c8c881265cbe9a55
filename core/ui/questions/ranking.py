"""Captions ranked by how well they fit an image: the answer on the page, and its downloads."""

import json
from html import escape
from typing import Any

from core.information.ranking import Ranking
from core.ui.backend.runtime import Runtime
from core.ui.look.blocks import folded_code_html, table_html
from core.ui.look.export import csv_of, image_lines, image_settings, rounded
from core.ui.look.scene import Scene
from core.ui.look.words import plus_minus
from core.ui.questions.answers import answer_downloads, answer_html, stopped_note

_SURE = 0.9
"""Certainty from which an order is stated as a fact."""


def ranking_html(runtime: Runtime, scene: Scene, r: Ranking, running: bool = False) -> str:
    """Everything about a ranking of captions."""
    rows = ranking_rows(r)
    heads = (
        "caption",
        "behind the best",
        "chance to beat the next",
        "fit, bits",
        "influence, bits",
    )
    titles = "".join(f'<th scope="col">{head}</th>' for head in heads)
    downloads = answer_downloads("captions", csv_of(rows), ranking_json(scene, r, runtime.name), scene, image=False)
    body = (
        f'<p class="id-lead">{_verdict(r)}</p><p>{_next(r)}</p>'
        + table_html(
            f"<thead><tr>{titles}</tr></thead><tbody>{''.join(_row(row) for row in rows)}</tbody>",
            "Captions",
            table_class="id-table",
        )
        + '<p class="id-hint">Bits have 95% intervals; one bit less means half as likely. Differences between captions '
        "are known better than the bits of each, since all captions see the same noise. <b>Fit</b> falls where a "
        "text is wrong, so it says which text describes this picture. <b>Influence</b> is how much a text changes what "
        f"the model draws, rightly or wrongly; it says where and when words matter.{_kong_order(r)}</p>"
        f"{downloads}{folded_code_html(ranking_python(scene, r, runtime.name))}"
        f'<p class="id-hint id-notes">{stopped_note(r, running)}</p>'
    )
    return answer_html("ranking", scene, running, {"captions": "\n".join(r.captions)}, body)


def ranking_rows(r: Ranking) -> list[dict[str, Any]]:
    """One row per caption, best first; `_95` is the half-width of a 95% interval."""
    factor = r.interval_factor()
    best, p_ahead = r.order[0], r.p_ahead
    rows: list[dict[str, Any]] = []
    for position, i in enumerate(r.order):
        following = r.order[position + 1] if position + 1 < len(r.order) else None
        row: dict[str, Any] = {
            "rank": position + 1,
            "caption": r.captions[i],
            "behind_best": round(float(r.ahead[best, i]), 4),
            "behind_best_95": round(factor * float(r.ahead_stderr[best, i]), 4),
            "p_ahead_of_next": None if following is None else round(float(p_ahead[i, following]), 4),
            "bits": round(float(r.bits[i]), 4),
            "bits_95": round(factor * float(r.stderr[i]), 4),
        }
        if r.orthogonal_bits is not None and r.orthogonal_stderr is not None:
            row["orthogonal_bits"] = round(float(r.orthogonal_bits[i]), 4)
            row["orthogonal_bits_95"] = round(factor * float(r.orthogonal_stderr[i]), 4)
        rows.append(row)
    return rows


def _row(row: dict[str, Any]) -> str:
    behind = "" if row["rank"] == 1 else plus_minus(row["behind_best"], row["behind_best_95"])
    ahead = "" if row["p_ahead_of_next"] is None else chance(row["p_ahead_of_next"])
    has_orthogonal = "orthogonal_bits" in row
    orthogonal = plus_minus(row["orthogonal_bits"], row["orthogonal_bits_95"]) if has_orthogonal else ""
    return (
        f'<tr><th scope="row"><b>{row["rank"]}</b> {escape(row["caption"])}</th><td>{behind}</td><td>{ahead}</td>'
        f"<td>{plus_minus(row['bits'], row['bits_95'])}</td><td>{orthogonal}</td></tr>"
    )


def chance(p: float) -> str:
    """A probability, never rounded to certainty."""
    return "over 99.9%" if p > 0.999 else f"{p:.1%}" if p > 0.99 else f"{p:.0%}"


def _at_least(p: float) -> str:
    text = chance(p)
    return text if text.startswith("over") else f"at least {text}"


def _verdict(r: Ranking) -> str:
    best = f"“{escape(r.captions[r.order[0]])}”"
    if r.p_best < _SURE:
        return f"{best} is ahead, but may not be the best: the certainty is only {chance(r.p_best)}."
    if len(r.captions) == 2:
        return f"{best} <strong>fits better</strong>, with a certainty of {chance(r.p_best)}."
    whole = f"that of the whole order is {_at_least(r.p_order)}" if r.p_order > 0.5 else "the order of the rest is open"
    return f"{best} <strong>fits best</strong>, with a certainty of {_at_least(r.p_best)}; {whole}."


def _next(r: Ranking) -> str:
    first, second = r.order[:2]
    bits = float(r.ahead[first, second])
    half = r.interval_factor() * float(r.ahead_stderr[first, second])
    if bits <= half:
        return f"The next is {plus_minus(bits, half)} bits behind, which is within the error."
    times = f"{2**bits:.1f}" if bits < 3 else f"{2**bits:.0f}" if bits < 10 else f"2<sup>{bits:.0f}</sup>"
    return (
        f"The next is {plus_minus(bits, half)} bits behind: to the model, this picture is about {times} times as "
        "likely under the first."
    )


def _kong_order(r: Ranking) -> str:
    order = r.orthogonal_order
    if order is None:
        return ""
    if order == r.order:
        return " Kong et al. 2024 rank by influence; here that gives the same order."
    return f" Kong et al. 2024 rank by influence; here that would put “{escape(r.captions[order[0]])}” first."


def ranking_json(scene: Scene, r: Ranking, model_name: str) -> str:
    """All settings and all numbers, in bits."""
    document = {"image": image_settings(scene, model_name), **ranking_dict(r)}
    return json.dumps(rounded(document), ensure_ascii=False)


def ranking_dict(r: Ranking) -> dict[str, Any]:
    """Everything about a ranking as plain JSON types, with the order and probabilities derived from it."""
    return {
        "order": list(r.order),
        "p_best": r.p_best,
        "p_order": r.p_order,
        "p_ahead": r.p_ahead.tolist(),
        "orthogonal_order": None if r.orthogonal_order is None else list(r.orthogonal_order),
        **r.to_dict(),
    }


def ranking_python(scene: Scene, r: Ranking, model_name: str) -> str:
    """Lines that repeat the result in a notebook."""
    captions = "".join(f"    {json.dumps(caption, ensure_ascii=False)},\n" for caption in r.captions)
    return (
        f"{image_lines(scene, model_name)}captions = [\n{captions}]\n"
        f"r = core.rank_captions(model, image, captions, certainty={r.settings['certainty']:g}, seed={r.seed})\n"
        "for i in r.order:\n"
        '    print(f"{r.bits[i]:6.2f} bits  {captions[i]}")\n'
        "print(r.p_order)  # a lower bound on the probability that this order is right\n"
    )
