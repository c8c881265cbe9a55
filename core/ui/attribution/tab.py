"""The Attribution tab: which word shaped the image, where and when."""

import time
from collections.abc import Generator
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from core.information.results import Attribution
from core.ui.attribution.ceiling import ceiling_cell, ceilings_html
from core.ui.backend.errors import sentence
from core.ui.backend.fields import html
from core.ui.backend.jobs import MeasurementProgress, Waiting, measure
from core.ui.backend.runtime import Runtime
from core.ui.look.blocks import downloads_html, folded_code_html, link_or_reason, table_html
from core.ui.look.export import download_url, link_query, python_lines, steps_csv, table_rows, to_csv, to_json
from core.ui.look.scene import Scene
from core.ui.look.viewer import seconds_left, status_html
from core.ui.look.words import cards, chips, layers_json, plus_minus

GIVEN = (("on top of the others", "rest"), ("on its own", "nothing"))
REL_ERRORS = (("20%", 0.2), ("10%", 0.1), ("5%", 0.05))
_STOPPED = {
    "converged": "the requested precision was reached",
    "budget": "the budget was spent before the requested precision was reached",
    "cancelled": "stopped early",
}
_REFRESH_SECONDS = 0.7
"""An unfinished measurement is rendered anew this often, its progress twice as often."""


@dataclass(frozen=True)
class AttributionTab:
    """The tab's components that the page wires up."""

    panel: gr.HTML
    """The chips, cards, downloads and tables."""
    given: gr.Radio
    """What the bits are measured against."""
    rel_error: gr.Radio
    """The relative error to measure to."""


def build_attribution_tab(runtime: Runtime, first: tuple[Scene, Attribution] | None) -> AttributionTab:
    """Create the tab's components inside the caller's `with` block; `first` is what they show at the start."""
    html(
        "<h2>Which word shaped the picture, and where?</h2>"
        '<p class="id-intro">How much did each word contribute? One <dfn>bit</dfn> is the answer to one yes-or-no '
        "question about the picture. Choose a word to see where and when it mattered.</p>"
    )
    panel = html(panel_html(runtime, *first) if first else empty_panel_html(), elem_id="id-panel")
    with gr.Accordion("How it is measured", open=False, elem_id="id-measured"), gr.Row(elem_classes="id-settings"):
        given = gr.Radio(
            GIVEN,
            value="rest",
            label="Measure each word",
            info="What it adds to the other words (CMI), or what it gives without them (MI).",
        )
        rel_error = gr.Radio(
            REL_ERRORS,
            value=0.1,
            label="Precision",
            info="Relative standard error; half the error takes four times as long.",
        )
    return AttributionTab(panel, given, rel_error)


def measure_updates(
    runtime: Runtime, ticket: int | None, scene: Scene, given: str, rel_error: float
) -> Generator[tuple[Any, Any], None, str | None]:
    """Look up or measure, and yield (panel, status) as it goes.

    Returns None, or if the work was cancelled, what of the page is outdated.
    """
    cached = runtime.cached_attribution(scene.key, given, rel_error)
    if cached is not None:
        yield panel_html(runtime, scene, cached), status_html()
        return None
    shown, shown_at, reported_at = None, 0.0, 0.0
    work = measure(runtime, ticket, scene, given, rel_error)
    try:
        for item in work:
            now = time.monotonic()
            if isinstance(item, Waiting):
                yield gr.skip(), status_html(item.text, stale="" if shown else "words")
            elif isinstance(item, Attribution):
                runtime.cache_attribution(scene.key, item)
                yield panel_html(runtime, scene, item), status_html()
                return None
            elif item.partial is not None and item.partial is not shown and now - shown_at > _REFRESH_SECONDS:
                shown, shown_at, reported_at = item.partial, now, now
                yield panel_html(runtime, scene, shown, running=True), _status(item, rel_error, stale="")
            elif now - reported_at > _REFRESH_SECONDS / 2:
                reported_at = now
                yield gr.skip(), _status(item, rel_error, stale="" if shown else "words")
    except Exception as error:
        yield gr.skip(), status_html(sentence(error), kind="error", stale="words")
        return None
    finally:
        work.close()
    if shown is None:
        return "words"
    yield panel_html(runtime, scene, shown), gr.skip()
    return ""


def _status(item: MeasurementProgress, target: float, stale: str) -> str:
    # No error: that of the first few repeats is too uncertain to stop at, and would seem to have reached the target.
    text = f"Measuring the words to {target:.0%}: {item.share:.0%} done{seconds_left(item.seconds_left)}"
    return status_html(text, item.share, stale)


def empty_panel_html() -> str:
    """The space reserved for an attribution."""
    return '<div class="id-panel empty"><p class="id-empty">The words and their bits will appear here.</p></div>'


def panel_html(runtime: Runtime, scene: Scene, a: Attribution, running: bool = False) -> str:
    """The whole attribution. Choosing a word happens in the browser."""
    height, width = a.maps.shape[1:]
    return (
        f'<div class="id-panel{" running" if running else ""}" data-query="{escape(link_query(scene, a))}" '
        f'data-uploaded="{int(scene.uploaded)}" data-cells="{width} × {height}">'
        f'<div class="id-layers" hidden data-layers="{escape(layers_json(a))}"></div>'
        f"{chips(scene.prompt, a)}"
        f'<div class="id-cards">{cards(a, runtime.spec.stages, ceilings_html(runtime.spec, a))}</div>'
        f"{_downloads(runtime, scene, a)}{_details(runtime, scene, a)}{_notes(scene, a, running)}</div>"
    )


def _downloads(runtime: Runtime, scene: Scene, a: Attribution) -> str:
    stages = runtime.spec.stages
    csv_url = download_url(to_csv(a, stages), "text/csv")
    steps_url = download_url(steps_csv(a, stages), "text/csv")
    json_url = download_url(to_json(scene, a, runtime.name, stages), "application/json")
    files = (
        ("CSV", "attribution.csv", csv_url),
        ("CSV by step", "attribution-steps.csv", steps_url),
        ("JSON", "attribution.json", json_url),
    )
    return downloads_html(files, "id-png", link_or_reason(scene.uploaded))


def _details(runtime: Runtime, scene: Scene, a: Attribution) -> str:
    stages = runtime.spec.stages
    rows = "".join(
        f'<tr data-row="{escape(row["word"])}"><th scope="row">{escape(row["word"])}</th>'
        f"<td>{plus_minus(row['bits'], row['bits_95'])}</td>"
        f"<td>{plus_minus(row['direct_bits'], row['direct_bits_95'])}</td>"
        f"<td>{ceiling_cell(runtime.spec, a, i)}</td>"
        + "".join(f"<td>{row[s.name]:.0%}</td>" for s in stages)
        + "</tr>"
        for i, row in enumerate(table_rows(a, stages))
    )
    heads = "".join(f'<th scope="col"><span class="id-key {s.name}"></span>{s.name}</th>' for s in stages)
    titles = "".join(f'<th scope="col">{title}</th>' for title in ("word", "bits", "signed check", "at most"))
    table = table_html(f"<thead><tr>{titles}{heads}</tr></thead><tbody>{rows}</tbody>", "All numbers")
    return (
        f'<details class="id-more"><summary>All numbers</summary>{table}</details>'
        f"{folded_code_html(python_lines(scene, a, runtime.name))}"
    )


def _notes(scene: Scene, a: Attribution, running: bool) -> str:
    guided = (
        " Guidance makes a picture more typical of its words than those that the model learned from; there its errors "
        "weigh more."
        if not scene.uploaded and scene.guidance > 1
        else ""
    )
    height, width = a.maps.shape[1:]
    ended = "still measuring" if running else _STOPPED.get(a.stopped, a.stopped)
    return (
        f'<p class="id-hint id-notes">{a.n_evals:,} U-Net evaluations in {a.n_replicates} independent repeats; '
        f"{ended}. Maps have {width} × {height} cells, also dark where the error exceeds the value.{guided}</p>"
    )
