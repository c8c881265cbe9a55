"""The Concepts tab: what the model was thinking of, where and when."""

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from core.ui.concepts.dictionary import block_words, no_concepts, no_concepts_html
from core.ui.inputs import concept_number, html
from core.ui.look.scene import Scene
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.concepts.trace import CodeTrace

_OPEN = (
    "window.idPage.openConcept = (way, number) => trigger('open', { way, number });"
    " document.addEventListener('click', (event) => { const button = event.target.closest('.id-concept-button');"
    " if (button) window.idPage.openConcept(button.dataset.way, Number(button.dataset.number)); });"
)
_FIND = (
    "element.addEventListener('click', (event) => { const button = event.target.closest('.id-find');"
    " if (button) trigger('find', { word: button.dataset.find ?? null, kind: button.dataset.kind ?? null }); });"
)


@dataclass(frozen=True)
class ConceptsTab:
    """The tab's components that the page wires up."""

    panel: Any
    """HTML of what was read of the current picture."""
    card: Any
    """HTML of one concept; its event `open` carries `way` and `number`."""
    query: Any
    """What is searched for."""
    found: Any
    """HTML of what was found; its event `find` carries a `word` to search for, or a `kind` to show."""


def build_concepts_tab(runtime: Runtime) -> ConceptsTab:
    """Put the tab's components where the caller's `with` is."""
    html(
        "<h2>What is the model thinking of here?</h2>"
        '<p class="id-intro">A sparse autoencoder (SAE) takes what the model adds to the picture at one position '
        "apart into a few <dfn>concepts</dfn> of many: directions that tend to come up for one thing, place or style. "
        "Choose a step on the film strip, click the picture to ask what is active there, or choose a concept.</p>"
    )
    panel = html(concepts_html(runtime, None, None), elem_id="id-concepts")
    card = html('<div class="id-concept-none"></div>', elem_id="id-concept", js_on_load=_OPEN)
    query = gr.Textbox(
        label="Search all concepts",
        placeholder="cat, sea, watercolour…",
        max_lines=1,
        elem_id="id-concept-query",
    )
    found = html('<div class="id-found-none"></div>', elem_id="id-concept-found", js_on_load=_FIND)
    return ConceptsTab(panel, card, query, found)


def concepts_html(runtime: Runtime, scene: Scene | None, trace: "CodeTrace | None") -> str:
    """The panel of a picture and its codes; without them, the room that it will take, or why it stays empty."""
    if scene is None or trace is None or runtime.dictionary is None or not trace.n_steps:
        return f'<div class="id-thoughts empty">{_why_empty(runtime)}</div>'
    from core.ui.concepts.card import BRANCH_WORDS  # which imports torch
    from core.ui.concepts.results import pack, usual_first

    sites = [site for site in usual_first(trace) if site in runtime.dictionary.tables]
    in_order = sorted(sites, key=trace.sites().index)
    blocks = {site.hookpoint: block_words(site.hookpoint) for site in in_order}
    branches = {str(site.branch): BRANCH_WORDS[site.branch] for site in sites}
    return (
        '<div class="id-thoughts"><p class="id-old">previous picture</p>'
        f'<div class="id-thoughts-data" hidden data-codes="{escape(pack(runtime.dictionary, trace))}"></div>'
        '<p class="id-thoughts-at" aria-live="polite"></p>'
        '<label class="id-thoughts-named"><input type="checkbox" checked> only those with a name</label>'
        '<ol class="id-thoughts-list"></ol>'
        '<p class="id-hint">Strength: a concept’s value, over the picture or at the point that you clicked, as a share '
        "of all active ones together.</p>"
        '<details class="id-more id-thoughts-ways"><summary>Read at: <span class="id-thoughts-way"></span></summary>'
        f"{_group('block', 'Block', blocks, sites[0].hookpoint)}"
        f"{_group('branch', 'Half', branches, sites[0].branch)}</details></div>"
    )


def _group(name: str, legend: str, options: dict[str, str], start: str) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="id-thoughts-{name}" value="{escape(value)}"'
        f"{' checked' if value == start else ''}> <span>{text}</span> <code>{escape(value)}</code></label>"
        for value, text in options.items()
    )
    return f'<fieldset data-way="{name}"><legend>{legend}</legend>{buttons}</fieldset>'


def _why_empty(runtime: Runtime) -> str:
    if not runtime.ready.is_set() or runtime.dictionary is not None:
        return '<p class="id-empty">The concepts of your picture will appear here.</p>'
    if runtime.error:
        return '<p class="id-empty">The model could not be loaded, so there is nothing to read.</p>'
    return no_concepts_html(runtime.name)


def _not_there(runtime: Runtime) -> str:
    if runtime.ready.is_set():
        return no_concepts(runtime.name)
    return "The concepts are still being loaded; try again in a moment."


def opened_html(runtime: Runtime, way: str, number: Any, trace: "CodeTrace | None") -> str:
    """The card of a concept, or why there is none."""
    from core.ui.concepts.card import card_html, problem_html
    from core.ui.concepts.results import find_site

    if runtime.dictionary is None:
        return problem_html(_not_there(runtime))
    site = find_site(runtime.dictionary, way)
    if site is None:
        return problem_html(f"No concepts are read at “{way[:80]}”.")
    try:
        return card_html(runtime.dictionary, site, concept_number(number), trace, runtime.spec.stages)
    except (IndexError, ValueError) as error:
        return problem_html(str(error))


def found_html(runtime: Runtime, query: str | None, kind: str | None = None) -> str:
    """What a search, or the choice of a kind, shows."""
    from core.ui.concepts.card import family_html, problem_html, search_html

    if runtime.dictionary is None:
        return problem_html(_not_there(runtime))
    if kind:
        return f'<div class="id-found-list">{family_html(runtime.dictionary, kind)}</div>'
    return f'<div class="id-found-list">{search_html(runtime.dictionary, query or "", runtime.model)}</div>'
