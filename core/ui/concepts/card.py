"""HTML of one concept's card, of search results, and of the kinds of concept to browse."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import numpy as np

from core.concepts.io import EFFECTS, KINDS, Kind
from core.spec import STAGES, Stage
from core.ui.backend.dictionary import ConceptDictionary, block_words
from core.ui.concepts.results import search_all, site_key, title
from core.ui.look.blocks import downloads_html, folded_code_html
from core.ui.look.export import download_url
from core.ui.look.images import data_url, layer
from core.ui.look.timeline import strength_svg

if TYPE_CHECKING:
    from core.concepts.table import Concept, ConceptTable, Example, Hit
    from core.concepts.trace import CodeTrace, SaeSite
    from core.diffusion.diffuser import Diffuser

MAX_HITS = 60
"""Most concepts shown for a search."""
MAX_GROUP = 24
"""Most concepts shown for a label of a kind."""
KIND_WORDS: dict[Kind, str] = {
    "object": "object",
    "background": "background",
    "style": "style",
    "context-free": "fixed position",
    "unlabelled": "unnamed",
}
"""What the page calls the kinds."""
_FITS = {
    "object": "<small>IoU: overlap of where it is strong with the masks of its label; 1 is the same cells.</small>",
    "style": "<small>AUROC: how often an image of that style has more of it than another; 0.5 is chance.</small>",
}
_NEAR_COSINE = 0.5
"""Below it, two directions have little in common."""
BRANCH_WORDS = {"cond": "with the prompt (conditional)", "uncond": "without the prompt (unconditional)"}


def site_words(site: "SaeSite") -> str:
    """A block and branch in words."""
    return f"{block_words(site.hookpoint)}, {BRANCH_WORDS[site.branch].partition(' (')[0]}"


def card_html(
    dictionary: ConceptDictionary,
    site: "SaeSite",
    number: int,
    trace: "CodeTrace | None" = None,
    stages: tuple[Stage, ...] = STAGES,
) -> str:
    """Everything about a concept; with an image's codes, also its strength over the steps of that image.

    Raises:
        IndexError: There is no such concept; the message says which numbers there are.
    """
    table = dictionary.tables[site]
    concept = table[number]
    return (
        f'<article class="id-concept-card" data-site="{site_key(site)}" data-number="{number}">'
        '<button type="button" class="id-button id-concept-card-close" aria-label="Close this concept">×</button>'
        f'<h3 tabindex="-1">{escape(title(concept))} '
        f"<small>concept (SAE feature {number}) · {site_words(site)}</small></h3>"
        f"{_description(concept)}{_bridges(site, concept)}{_gallery(concept)}"
        f"{_over_steps(site, number, trace, stages)}{_scores(concept)}"
        f"{_related(dictionary, site, concept)}"
        f"{downloads_html([('CSV', f'concept-{number}.csv', _csv_url(table, number))], link='copy')}"
        f"{folded_code_html(_python(dictionary, site, number), 'Look it up in Python')}</article>"
    )


def problem_html(text: str) -> str:
    """A message in place of content."""
    return f'<p class="id-empty id-problem" role="alert">{escape(text)}</p>'


def search_html(dictionary: ConceptDictionary, query: str, model: "Diffuser | None") -> str:
    """Search results from all tables, best first; if there are none, the nearest labels."""
    wanted = query.strip()
    if not wanted:
        return kinds_html(dictionary)
    if wanted.isdecimal():
        return _numbered_html(dictionary, int(wanted))
    hits, nearest = search_all(dictionary.tables, _label_of(dictionary, wanted), model)
    if not hits:
        offered = " ".join(
            f'<button type="button" class="id-find" data-find="{escape(label)}">{escape(label)}</button>'
            for label in nearest
        )
        return f'<p class="id-found">No concept is labelled “{escape(wanted[:60])}”. The nearest labels: {offered}</p>'
    shown = "".join(_hit_html(site, hit) for site, hit in hits[:MAX_HITS])
    more = f", the best {MAX_HITS} shown" if len(hits) > MAX_HITS else ""
    plural = "s" if len(hits) > 1 else ""
    styles = any(hit.kind == "style" for _, hit in hits[:MAX_HITS])
    fits = _FITS["style"] if styles else _FITS["object"]
    return f'<p class="id-found">{len(hits)} concept{plural}{more}, best fit first. {fits}</p><ul>{shown}</ul>'


def _label_of(dictionary: ConceptDictionary, word: str) -> str:
    """The one label that a word is another word for, or the word itself."""
    table = next(iter(dictionary.tables.values()))
    labels = [name for name, words in table.info.words.items() if word.casefold() in map(str.casefold, words)]
    return labels[0] if len(labels) == 1 else word


def _numbered_html(dictionary: ConceptDictionary, number: int) -> str:
    """The concepts with a number, one per block and branch."""
    there = {site: table for site, table in dictionary.tables.items() if number < len(table.frame)}
    if not there:
        most = max(len(table.frame) for table in dictionary.tables.values()) - 1
        return f'<p class="id-found">There are concepts 0 to {most} here; none has the number {number}.</p>'
    rows = "".join(
        f'<li><button type="button" class="id-concept-button" data-site="{site_key(site)}" data-number="{number}">'
        f"<b>{escape(title(table[number]))}</b> <small>{number} · {site_words(site)}</small></button></li>"
        for site, table in there.items()
    )
    return f'<p class="id-found">Number {number} is another concept in every block and branch.</p><ul>{rows}</ul>'


def kinds_html(dictionary: ConceptDictionary) -> str:
    """The kinds to browse, one button each."""
    counts = {kind: sum(int((t.frame["kind"] == kind).sum()) for t in dictionary.tables.values()) for kind in KINDS}
    buttons = "".join(
        f'<button type="button" class="id-find" data-kind="{kind}">{KIND_WORDS[kind]} <b>{counts[kind]}</b></button>'
        for kind in KINDS
        if counts[kind]
    )
    return f'<p class="id-found">Or browse by kind: {buttons}</p>'


def kind_html(dictionary: ConceptDictionary, kind: str) -> str:
    """All concepts of a kind, grouped by label; unlabelled ones by the nearest class."""
    if kind not in KINDS:
        return problem_html(f"There is no kind “{kind[:40]}”: there are {', '.join(KINDS)}.")
    unnamed = kind in ("unlabelled", "context-free")
    groups: dict[str, list[tuple[float, SaeSite, int]]] = {}
    for site, table in dictionary.tables.items():
        of_kind = table.frame[table.frame["kind"] == kind]
        group_names, rates = of_kind["best_class" if unnamed else "label"], of_kind["firing_rate"]
        for number, group, rate in zip(of_kind["latent"], group_names, rates, strict=True):
            groups.setdefault(group, []).append((float(rate), site, int(number)))
    note = {
        "unlabelled": "None of the classes of the masks fits these better than chance. They are grouped by the nearest "
        "class, the most active first.",
        "context-free": "Where these are active depends on the position alone, whatever the picture shows.",
    }.get(kind, "Grouped by label, the most active first.")
    parts = []
    for group, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        members.sort(key=lambda member: -member[0])
        buttons = "".join(
            f'<button type="button" class="id-concept-button" data-site="{site_key(site)}" data-number="{number}">'
            f"<b>{number}</b> <small>{site_words(site)}, active on {_percent(rate)} of cells</small></button>"
            for rate, site, number in members[:MAX_GROUP]
        )
        rest = f"<p>and {len(members) - MAX_GROUP} less active ones</p>" if len(members) > MAX_GROUP else ""
        heading = f"nearest to {group}" if unnamed and group else group or "never active"
        parts.append(
            f"<details><summary>{escape(heading)} <b>{len(members)}</b></summary>"
            f'<div class="id-concept-group">{buttons}</div>{rest}</details>'
        )
    return (
        '<p class="id-found"><button type="button" class="id-find" data-find="">All kinds</button> '
        f"<b>{KIND_WORDS[kind]}</b>. {note}</p>{''.join(parts)}"
    )


def _hit_html(site: "SaeSite", hit: "Hit") -> str:
    score = f"{'AUROC' if hit.kind == 'style' else 'IoU'}\N{NO-BREAK SPACE}{hit.score:.2f}"
    return (
        f'<li><button type="button" class="id-concept-button" data-site="{site_key(site)}" data-number="{hit.number}">'
        f"<b>{escape(hit.label)}</b> <small>{hit.number} · {site_words(site)} · {score}</small></button></li>"
    )


def _description(concept: "Concept") -> str:
    """What the concept stands for, and how well, in two sentences."""
    scores, name = concept.scores, f"<b>{escape(concept.label)}</b>"
    if not scores.firing_rate:
        return "<p>It was not active in any of the images examined.</p>"
    active = f"It is active on {_percent(scores.firing_rate)} of all cells"
    if concept.kind == "style":
        text = (
            f"{active}, and more in {name} images: of a {name} image and another one, the {name} image has the "
            f"higher mean in {_percent(scores.style_auroc)} of pairs (chance: 50 %)."
        )
    elif concept.kind == "context-free":
        text = f"{active}; where depends on the position alone ({_percent(scores.position_share)} of its variance)."
    elif concept.kind == "unlabelled":
        text = (
            f"{active}. No class of the masks fits it better than chance; the nearest is {escape(scores.best_class)} "
            f"(IoU {scores.held_out_iou:.3f})."
        )
    else:
        text = (
            f"{active}. Where it is strong, {_percent(scores.precision)} of the cells are {name}, and it covers "
            f"{_percent(scores.recall)} of all cells of {name}."
        )
    when = f"Its mean diffusion time is t = {scores.typical_t:.2f} (1: the first step, noise; 0: the last)."
    return f'<p class="id-concept-card-summary">{text} {when}</p>'


def _bridges(site: "SaeSite", concept: "Concept") -> str:
    """What else to do with a concept."""
    steer = (
        f'<button type="button" class="id-button id-steer" data-site="{site_key(site)}" '
        f'data-number="{concept.number}">Steer this concept</button>'
    )
    label = escape(concept.label)
    same = f'<button type="button" class="id-button id-same" data-label="{label}">All concepts of “{label}”</button>'
    return f'<div class="id-actions">{steer}{same if label else ""}</div>'


def _gallery(concept: "Concept") -> str:
    if not concept.gallery:
        return ""
    images = "".join(_image(example, concept) for example in concept.gallery)
    return (
        "<h4>Where it is strongest <small>brighter = stronger; hover or tap to hide the map</small></h4>"
        f'<div class="id-concept-card-gallery">{images}</div>'
    )


def _image(example: "Example", concept: "Concept") -> str:
    heat = layer(example.map.astype(np.float64), np.zeros_like(example.map, dtype=np.float64), example.peak)
    prompt = escape(example.entry.prompt)
    link = escape(urlencode({"prompt": example.entry.prompt, "seed": example.entry.seed, "tab": "concepts"}))
    return (
        f'<figure title="{prompt}, seed {example.entry.seed}"><a href="?{link}" aria-label="Open {prompt}">'
        f'<img src="{data_url(example.image, quality=78)}" alt="{prompt}" loading="lazy"><img class="id-heat" '
        f'src="{data_url(heat, quality=60)}" alt="where concept {concept.number} is active"></a></figure>'
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
        ("overlap with the masks of its label (IoU), on held-out images", "held_out_iou"),
        ("the same by chance, with other images' masks", "chance_iou"),
        ("p value of that overlap", "p_value"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("mean where active", "mean"),
        ("99th percentile where active", "p99"),
        ("spread, in sides of the image", "spread"),
        ("variance explained by position", "position_share"),
    ]
    cells = "".join(f"<tr><td>{text}</td><td>{getattr(concept.scores, name):.3g}</td></tr>" for text, name in rows)
    return f'<details class="id-more"><summary>All scores</summary><table class="id-table">{cells}</table></details>'


def _related(dictionary: ConceptDictionary, site: "SaeSite", concept: "Concept") -> str:
    """Concepts with the nearest decoder directions here, and those with the same label elsewhere."""
    table = dictionary.tables[site]
    neighbours = table.neighbours(concept.number, 6)
    near = [
        (site, n.number, n.label or "unnamed", f"cosine {n.cosine:.2f}") for n in neighbours if n.cosine >= _NEAR_COSINE
    ]
    parts = [_row("Nearest directions", near)]
    if neighbours and not near:
        parts = [
            "<h4>Nearest directions</h4>"
            f"<p>No other concept here points in nearly the same direction: the largest cosine is "
            f"{neighbours[0].cosine:.2f}.</p>"
        ]
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
        f'<button type="button" class="id-concept-button" data-site="{site_key(site)}" data-number="{number}">'
        f"<b>{escape(label)}</b> <small>{number} · {note}</small></button>"
        for site, number, label, note in members
    )
    return f'<h4>{heading}</h4><div class="id-concept-group">{buttons}</div>' if members else ""


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "less than 0.1 %"
    return f"{100 * share:.1f} %" if 100 * share < 9.95 else f"{100 * share:.0f} %"


def _csv_url(table: "ConceptTable", number: int) -> str:
    text = table.frame.iloc[[number]].drop(columns=["runner_ups", EFFECTS], errors="ignore").to_csv(index=False)
    return download_url(text, "text/csv")


def _python(dictionary: ConceptDictionary, site: "SaeSite", number: int) -> str:
    return (
        "import core\n\n"
        f'table = core.load_concepts("{dictionary.source}", hookpoint="{site.hookpoint}", branch="{site.branch}")\n'
        f"concept = table[{number}]\n"
        "print(concept.label, concept.scores.held_out_iou)\n"
        f"table.neighbours({number})\n"
    )
