"""HTML of one concept, of what a search finds, and of the families without a name."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from core.concepts.io import EFFECTS, KINDS, Kind
from core.spec import STAGES, Stage
from core.ui.concepts.dictionary import Dictionary, block_words
from core.ui.concepts.results import search_all, title, way_key
from core.ui.look.export import download_url
from core.ui.look.images import data_url, layer
from core.ui.look.timeline import strength_svg

if TYPE_CHECKING:
    from core.concepts.table import Concept, ConceptTable, Example, Hit
    from core.concepts.trace import CodeTrace, SaeSite
    from core.diffusion.diffuser import Diffuser

MAX_HITS = 60
"""Concepts that a search shows."""
MAX_FAMILY = 24
"""Concepts that a family shows."""
KIND_WORDS: dict[Kind, str] = {
    "object": "a thing",
    "background": "a place",
    "style": "a style",
    "context-free": "a part of the frame",
    "unlabelled": "no name",
}
"""What the kinds are called on the page."""
_FITS = {
    "object": "<small>IoU: where it is strong, against the masks of what it is called; 1 is the same cells.</small>",
    "style": "<small>AUROC: how often a picture of that style has more of it than another; a half is chance.</small>",
}
BRANCH_WORDS = {"cond": "with the prompt", "uncond": "without the prompt"}


def site_words(site: "SaeSite") -> str:
    """Where a concept is read."""
    return f"{block_words(site.hookpoint)}, {BRANCH_WORDS[site.branch]}"


def card_html(
    dictionary: Dictionary,
    site: "SaeSite",
    number: int,
    trace: "CodeTrace | None" = None,
    stages: tuple[Stage, ...] = STAGES,
) -> str:
    """Everything about a concept. With a picture's codes, its strength over the steps of that, too.

    Raises:
        IndexError: There is no such concept; the message says which there are.
    """
    table = dictionary.tables[site]
    concept = table[number]
    return (
        f'<article class="id-concept-card" data-way="{way_key(site)}" data-number="{number}">'
        '<button type="button" class="id-button id-concept-card-close" aria-label="Close this concept">×</button>'
        f"<h3>{escape(title(concept))} <small>concept (SAE feature {number}) · {site_words(site)}</small></h3>"
        f"{_said(concept)}{_gallery(concept)}{_over_steps(site, number, trace, stages)}{_scores(concept)}"
        f"{_others(dictionary, site, concept)}"
        '<div class="id-keep" role="group" aria-label="Keep this concept"><span>Keep this:</span>'
        f'<a class="id-button" download="concept-{number}.csv" href="{_csv_url(table, number)}">CSV</a>'
        '<button type="button" class="id-button id-link">Copy link</button></div>'
        '<details class="id-more"><summary>Look it up in Python</summary><div class="id-code">'
        '<button type="button" class="id-button id-copy">Copy</button>'
        f"<pre>{escape(_python(dictionary, site, number))}</pre></div></details></article>"
    )


def problem_html(text: str) -> str:
    """Why there is nothing to show."""
    return f'<p class="id-empty id-problem" role="alert">{escape(text)}</p>'


def search_html(dictionary: Dictionary, query: str, model: "Diffuser | None") -> str:
    """What a word finds in all tables, best first; where it finds nothing, the nearest labels."""
    wanted = query.strip()
    if not wanted:
        return families_html(dictionary)
    hits, nearest = search_all(dictionary.tables, wanted, model)
    if not hits:
        offered = " ".join(
            f'<button type="button" class="id-find" data-find="{escape(label)}">{escape(label)}</button>'
            for label in nearest
        )
        return f'<p class="id-found">No concept is called “{escape(wanted[:60])}”. The nearest are: {offered}</p>'
    shown = "".join(_hit_html(site, hit) for site, hit in hits[:MAX_HITS])
    more = f", the best {MAX_HITS} of them here" if len(hits) > MAX_HITS else ""
    plural = "s" if len(hits) > 1 else ""
    styles = any(hit.kind == "style" for _, hit in hits[:MAX_HITS])
    fits = _FITS["style"] if styles else _FITS["object"]
    return f'<p class="id-found">{len(hits)} concept{plural}{more}, the best fitting first. {fits}</p><ul>{shown}</ul>'


def families_html(dictionary: Dictionary) -> str:
    """What there is to browse, a button a kind."""
    counts = {kind: sum(int((t.frame["kind"] == kind).sum()) for t in dictionary.tables.values()) for kind in KINDS}
    buttons = "".join(
        f'<button type="button" class="id-find" data-kind="{kind}">{KIND_WORDS[kind]} <b>{counts[kind]}</b></button>'
        for kind in KINDS
        if counts[kind]
    )
    return f'<p class="id-found">Or browse what they stand for: {buttons}</p>'


def family_html(dictionary: Dictionary, kind: str) -> str:
    """The page of a kind: its labels and the concepts of each; of those without a name, what they come nearest to."""
    if kind not in KINDS:
        return problem_html(f"There is no kind {kind!r}: there are {', '.join(KINDS)}.")
    unnamed = kind in ("unlabelled", "context-free")
    groups: dict[str, list[tuple[float, SaeSite, int]]] = {}
    for site, table in dictionary.tables.items():
        of_kind = table.frame[table.frame["kind"] == kind]
        groups_of, rates = of_kind["best_class" if unnamed else "label"], of_kind["firing_rate"]
        for number, group, rate in zip(of_kind["latent"], groups_of, rates, strict=True):
            groups.setdefault(group, []).append((float(rate), site, int(number)))
    said = {
        "unlabelled": "Whatever these stand for, it is none of the classes that the masks know: none fits better "
        "than chance. They are put where they come nearest, the most active first.",
        "context-free": "Where these are active is told by the position alone, whatever the picture shows.",
    }.get(kind, "By name, the most active first.")
    parts = []
    for group, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        members.sort(key=lambda member: -member[0])
        buttons = "".join(
            f'<button type="button" class="id-concept-button" data-way="{way_key(site)}" data-number="{number}">'
            f"<b>{number}</b> <small>{site_words(site)}, active on {_percent(rate)} of cells</small></button>"
            for rate, site, number in members[:MAX_FAMILY]
        )
        left = (
            f"<p>and {len(members) - MAX_FAMILY} that are active more seldom</p>" if len(members) > MAX_FAMILY else ""
        )
        heading = f"nearest to {group}" if unnamed and group else group or "never active"
        parts.append(
            f"<details><summary>{escape(heading)} <b>{len(members)}</b></summary>"
            f'<div class="id-family">{buttons}</div>{left}</details>'
        )
    return (
        '<p class="id-found"><button type="button" class="id-find" data-find="">All kinds</button> '
        f"<b>{KIND_WORDS[kind]}</b>. {said}</p>{''.join(parts)}"
    )


def _hit_html(site: "SaeSite", hit: "Hit") -> str:
    score = f"{'AUROC' if hit.kind == 'style' else 'IoU'}\N{NO-BREAK SPACE}{hit.score:.2f}"
    return (
        f'<li><button type="button" class="id-concept-button" data-way="{way_key(site)}" data-number="{hit.number}">'
        f"<b>{escape(hit.label)}</b> <small>{hit.number} · {site_words(site)} · {score}</small></button></li>"
    )


def _said(concept: "Concept") -> str:
    """What it stands for, and how well, in a sentence or two."""
    scores, name = concept.scores, f"<b>{escape(concept.label)}</b>"
    if not scores.firing_rate:
        return "<p>It was never active in any picture that was looked at.</p>"
    active = f"It is active on {_percent(scores.firing_rate)} of all cells"
    if concept.kind == "style":
        text = (
            f"{active}, more so in {name} pictures: a {name} picture has the higher mean in "
            f"{_percent(scores.style_auroc)} of pairs with another (half would be chance)."
        )
    elif concept.kind == "context-free":
        text = f"{active}; where, is told by the position alone ({_percent(scores.position_share)} of its variance)."
    elif concept.kind == "unlabelled":
        text = (
            f"{active}. No class of the masks fits it better than chance; the nearest is {escape(scores.best_class)} "
            f"(overlap {scores.held_out_iou:.3f})."
        )
    else:
        text = (
            f"{active}. Where it is strong, {_percent(scores.precision)} of the cells are {name}, and it covers "
            f"{_percent(scores.recall)} of all cells of {name}."
        )
    when = f"On average that is at t = {scores.typical_t:.2f} (1 is the first step, noise; 0 the last)."
    return f'<p class="id-concept-card-said">{text} {when}</p>'


def _gallery(concept: "Concept") -> str:
    if not concept.gallery:
        return ""
    pictures = "".join(_image(example, concept) for example in concept.gallery)
    return (
        "<h4>Where it is strongest <small>bright: much of it; point at a picture to see it bare</small></h4>"
        f'<div class="id-concept-card-gallery">{pictures}</div>'
    )


def _image(example: "Example", concept: "Concept") -> str:
    heat = layer(example.map.astype(np.float64), np.zeros_like(example.map, dtype=np.float64), example.peak)
    prompt = escape(example.entry.prompt)
    return (
        f'<figure title="{prompt}, seed {example.entry.seed}"><img src="{data_url(example.image, quality=78)}" '
        f'alt="{prompt}" loading="lazy"><img class="id-heat" src="{data_url(heat, quality=60)}" alt="where concept '
        f'{concept.number} is active"></figure>'
    )


def _over_steps(site: "SaeSite", number: int, trace: "CodeTrace | None", stages: tuple[Stage, ...]) -> str:
    if trace is None or site not in trace.sites():
        return ""
    mean = trace.evolution(site, number).mean.astype(np.float64)
    if not mean.any():
        return "<h4>In your picture</h4><p>It is not active at any step of your picture.</p>"
    chart = strength_svg(mean, f"Mean strength of concept {number}, step by step", stages)
    return f"<h4>In your picture, step by step</h4>{chart}"


def _scores(concept: "Concept") -> str:
    rows = [
        ("overlap with its class's masks (IoU), on pictures that did not choose the name", "held_out_iou"),
        ("the same by chance, with other pictures' masks", "chance_iou"),
        ("how often chance does as well (p)", "p_value"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("mean where active", "mean"),
        ("99th percentile where active", "p99"),
        ("spread, in sides of the picture", "spread"),
        ("variance that position explains", "position_share"),
    ]
    cells = "".join(f"<tr><td>{text}</td><td>{getattr(concept.scores, name):.3g}</td></tr>" for text, name in rows)
    return f'<details class="id-more"><summary>All scores</summary><table class="id-table">{cells}</table></details>'


def _others(dictionary: Dictionary, site: "SaeSite", concept: "Concept") -> str:
    """Concepts that write in nearly the same direction here, and those of the same name elsewhere."""
    table = dictionary.tables[site]
    near = [
        (site, n.number, n.label or "no name", f"cosine {n.cosine:.2f}") for n in table.neighbours(concept.number, 6)
    ]
    parts = [_row("Neighbours, which write nearly the same", near)]
    if concept.label:
        same = [
            (other, hit.number, hit.label, site_words(other))
            for other, of in dictionary.tables.items()
            if other != site
            for hit in table.counterparts(concept.number, of, 2)
        ]
        parts.append(_row(f"“{escape(concept.label)}” elsewhere", same))
    return "".join(parts)


def _row(heading: str, members: "Sequence[tuple[SaeSite, int, str, str]]") -> str:
    buttons = "".join(
        f'<button type="button" class="id-concept-button" data-way="{way_key(site)}" data-number="{number}">'
        f"<b>{escape(label)}</b> <small>{number} · {note}</small></button>"
        for site, number, label, note in members
    )
    return f'<h4>{heading}</h4><div class="id-family">{buttons}</div>' if members else ""


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "less than 0.1 %"
    return f"{100 * share:.1f} %" if 100 * share < 9.95 else f"{100 * share:.0f} %"


def _csv_url(table: "ConceptTable", number: int) -> str:
    text = table.frame.iloc[[number]].drop(columns=["runner_ups", EFFECTS], errors="ignore").to_csv(index=False)
    return download_url(text, "text/csv")


def _python(dictionary: Dictionary, site: "SaeSite", number: int) -> str:
    return (
        "import core\n\n"
        f'table = core.load_concepts("{dictionary.source}", hookpoint="{site.hookpoint}", branch="{site.branch}")\n'
        f"concept = table[{number}]\n"
        "print(concept.label, concept.scores.held_out_iou)\n"
        f"table.neighbours({number})\n"
    )
