"""The Concepts tab: which features were active, where and when."""

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from core.ui.backend.dictionary import block_words, no_concepts, no_concepts_html
from core.ui.backend.errors import sentence
from core.ui.backend.fields import TextField, html
from core.ui.backend.inputs import MAX_QUERY, concept_number, text_problem
from core.ui.backend.runtime import Runtime
from core.ui.look.scene import Scene

if TYPE_CHECKING:
    from core.concepts.trace import CodeTrace

_OPEN = (
    "window.idPage.openConcept = (site, number) => trigger('open', { site, number });"
    " document.addEventListener('click', (event) => { const button = event.target.closest('.id-concept-button');"
    " if (button) window.idPage.openConcept(button.dataset.site, Number(button.dataset.number)); });"
)
_FIND = (
    "element.addEventListener('click', (event) => { const button = event.target.closest('.id-find');"
    " if (button) trigger('find', { word: button.dataset.find ?? null, kind: button.dataset.kind ?? null }); });"
)


@dataclass(frozen=True)
class ConceptsTab:
    """The tab's components that the page wires up."""

    panel: gr.HTML
    """The concepts of the current image."""
    card: gr.HTML
    """The card of one concept; its event `open` carries `site` and `number`."""
    query: gr.Textbox
    """The search field."""
    found: gr.HTML
    """Search results; its event `find` carries a `word` to search for, or a `kind` to show."""


def build_concepts_tab(runtime: Runtime) -> ConceptsTab:
    """Create the tab's components inside the caller's `with` block."""
    html(
        "<h2>What is the model representing here?</h2>"
        '<p class="id-intro">A sparse autoencoder (SAE) splits what the model adds to the picture at each spot '
        "into a few active features out of thousands: <dfn>concepts</dfn> that tend to stand for one object, "
        "background or style. Choose a step on the film strip, "
        "click the picture to see what is active there, or choose a concept."
        "</p>"
    )
    panel = html(concepts_html(runtime, None, None), elem_id="id-concepts")
    card = html('<div class="id-concept-none"></div>', elem_id="id-concept", js_on_load=_OPEN)
    query = TextField(
        label="Search all concepts",
        placeholder="cat, sea, watercolour…",
        max_lines=1,
        max_length=MAX_QUERY,
        elem_id="id-concept-query",
    )
    found = html('<div class="id-found-none"></div>', elem_id="id-concept-found", js_on_load=_FIND)
    return ConceptsTab(panel, card, query, found)


def concepts_html(runtime: Runtime, scene: Scene | None, trace: "CodeTrace | None") -> str:
    """The panel of an image and its codes; without codes, a placeholder that says why."""
    if scene is None or trace is None or runtime.dictionary is None or not trace.n_steps:
        return f'<div class="id-active empty">{_why_empty(runtime)}</div>'
    from core.ui.concepts.card import BRANCH_WORDS  # which imports torch
    from core.ui.concepts.results import default_first, pack

    sites = [site for site in default_first(trace.sites()) if site in runtime.dictionary.tables]
    blocks = {site.hookpoint: block_words(site.hookpoint) for site in trace.sites() if site in sites}
    branches = {str(site.branch): BRANCH_WORDS[site.branch] for site in sites}
    return (
        '<div class="id-active"><p class="id-old">previous picture</p>'
        f'<div class="id-active-data" hidden data-codes="{escape(pack(runtime.dictionary, trace))}"></div>'
        '<p class="id-active-at" aria-live="polite"></p>'
        '<label class="id-active-named"><input type="checkbox" checked> named only</label> '
        '<button type="button" class="id-button id-random">A random concept</button>'
        '<ol class="id-active-list"></ol>'
        '<p class="id-hint">Sorted by how much more active a concept is than in most pictures, in the whole picture or '
        "at the point you clicked: 5 × means five times its usual share of all activation.</p>"
        '<details class="id-more id-active-sites"><summary>Read from: <span class="id-active-site"></span></summary>'
        f"{_group('block', 'Block', blocks, sites[0].hookpoint)}"
        f"{_group('branch', 'Branch', branches, sites[0].branch)}</details></div>"
    )


def _group(name: str, legend: str, options: dict[str, str], start: str) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="id-active-{name}" value="{escape(value)}"'
        f"{' checked' if value == start else ''}> <span>{text}</span> <code>{escape(value)}</code></label>"
        for value, text in options.items()
    )
    return f'<fieldset data-option="{name}"><legend>{legend}</legend>{buttons}</fieldset>'


def _why_empty(runtime: Runtime) -> str:
    if not runtime.ready.is_set() or runtime.dictionary is not None:
        return '<p class="id-empty">The concepts of your picture will appear here.</p>'
    if runtime.error:
        return '<p class="id-empty">The model could not be loaded, so it has no concepts to show.</p>'
    return no_concepts_html(runtime.name)


def _not_there(runtime: Runtime) -> str:
    if runtime.ready.is_set():
        return no_concepts(runtime.name)
    return "The concepts are still being loaded; try again in a moment."


def opened_html(runtime: Runtime, key: str, number: Any, trace: "CodeTrace | None") -> str:
    """The card of concept `number` at the site with this key, or why there is none."""
    from core.ui.concepts.card import card_html, problem_html
    from core.ui.concepts.results import find_site

    if runtime.dictionary is None:
        return problem_html(_not_there(runtime))
    site = find_site(runtime.dictionary, key)
    if site is None:
        return problem_html(f"There are no concepts at “{key[:80]}”.")
    try:
        return card_html(runtime.dictionary, site, concept_number(number), trace, runtime.spec.stages)
    except (IndexError, ValueError) as error:
        return problem_html(sentence(error))


def found_html(runtime: Runtime, query: str | None, kind: str | None = None) -> str:
    """The results of a search, or all concepts of a kind."""
    from core.ui.concepts.card import kind_html, problem_html, search_html

    if runtime.dictionary is None:
        return problem_html(_not_there(runtime))
    if kind:
        return f'<div class="id-found-list">{kind_html(runtime.dictionary, kind)}</div>'
    if problem := text_problem("search", query, MAX_QUERY):
        return problem_html(problem)
    return f'<div class="id-found-list">{search_html(runtime.dictionary, query or "", runtime.model)}</div>'
