"""Builds the page: prompt bar on top, the image and its film strip on the left, one tab per question on the right."""

from html import escape

import gradio as gr

from core.ui.api import build_api
from core.ui.attribution.tab import build_attribution_tab
from core.ui.backend.fields import IMAGE_OPTIONS, ImageField, NumberField, TextField, html
from core.ui.backend.runtime import Runtime
from core.ui.backend.server import KEEP_FILES, PageBlocks
from core.ui.backend.wordlist import load_wordlist
from core.ui.components import Page, PromptBar
from core.ui.concepts.tab import build_concepts_tab
from core.ui.events import wire
from core.ui.examples import PageExample, cache_example, load_examples
from core.ui.interventions.tab import build_interventions_tab
from core.ui.layout.tab import build_layout_tab
from core.ui.look.viewer import status_html, viewer_html
from core.ui.look.words import badge_html
from core.ui.questions.api import build_questions_api
from core.ui.questions.tab import build_questions

_PICK = (
    "element.addEventListener('click', (event) => { const button = event.target.closest('[data-example]');"
    " if (button) trigger('pick', { name: button.dataset.example }); });"
)


def build_demo(runtime: Runtime) -> gr.Blocks:
    """The whole page. It needs no weights: stored examples are shown at once, the rest waits for the model."""
    examples = load_examples(runtime.examples_dir)
    # Only the first is read now, the others on demand, so that the page opens sooner.
    first = (examples[0].scene, cache_example(runtime, examples[0], "rest")) if examples else None
    spec = runtime.spec
    demo = PageBlocks(
        title="Interpretable Diffusion", analytics_enabled=False, fill_width=True, delete_cache=KEEP_FILES
    )
    with demo:
        with gr.Row(elem_id="id-head"):
            html(_title_html())
            badge = html(badge_html(*runtime.badge()), elem_id="id-badge")
        bar = _prompt_bar(runtime, examples)
        with gr.Row(elem_id="id-main"):
            with gr.Column(elem_id="id-left", min_width=300):
                with gr.Row(elem_id="id-progress"):
                    status = html(status_html())
                    cancel = gr.Button("Cancel", size="sm", elem_id="id-cancel", min_width=84)
                viewer = html(viewer_html(first[0] if first else None, spec.stages, spec.num_inference_steps))
            with gr.Column(elem_id="id-right", min_width=300), gr.Tabs():
                with gr.Tab("Attribution"):
                    attribution = build_attribution_tab(runtime, first)
                    questions = build_questions()
                with gr.Tab("Concepts", render_children=True):
                    concepts = build_concepts_tab(runtime)
                with gr.Tab("Layout", render_children=True):
                    layout = build_layout_tab(runtime)
                with gr.Tab("Interventions", render_children=True):
                    interventions = build_interventions_tab(runtime)
        page = Page(
            badge=badge,
            clock=gr.Timer(1.0),
            bar=bar,
            viewer=viewer,
            status=status,
            cancel=cancel,
            scene=gr.State(first[0] if first else None),
            # A gr.State would be read when the request is served, not when it is made.
            ticket=gr.Number(visible=False, value=0),
            autorun=gr.State(0),
            attribution=attribution,
            questions=questions,
            concepts=concepts,
            layout=layout,
            interventions=interventions,
            examples={example.name: example for example in examples},
            load=demo.load,
            unload=demo.unload,
        )
        wire(runtime, page)
        build_api(runtime)
        build_questions_api(runtime)
    # Not limited in size, which would count every event of every page; `ModelQueue` limits the jobs.
    demo.queue(max_size=None, default_concurrency_limit=None)
    return demo


def _prompt_bar(runtime: Runtime, examples: list[PageExample]) -> PromptBar:
    spec = runtime.spec
    start = examples[0] if examples else None
    with gr.Column(elem_id="id-bar"):
        with gr.Row(elem_id="id-ask"):
            prompt = TextField(
                value=start.prompt if start else "",
                label="Describe a picture",
                placeholder="a cat on the grass",
                lines=1,
                max_lines=3,
                scale=1,
                elem_id="id-prompt",
            )
            generate = gr.Button("Generate", variant="primary", scale=0, min_width=130, elem_id="id-generate")
        with gr.Row(elem_id="id-writing"):
            wordlist = load_wordlist(runtime.spec.assets)
            html(wordlist.html if wordlist else "", visible=wordlist is not None)
            with gr.Accordion("Seed, steps, guidance, or your own picture", open=False, elem_id="id-options"):
                with gr.Row():
                    seed = NumberField(
                        value=start.seed if start else 0,
                        label="Seed",
                        info="Change for a new variation.",
                        elem_id="id-seed",
                    )
                    steps = NumberField(
                        value=spec.num_inference_steps,
                        label="Steps",
                        info="Denoising steps; more are slower and finer.",
                        elem_id="id-steps",
                    )
                    guidance = NumberField(
                        value=spec.guidance_scale,
                        label="Guidance",
                        info="How strongly to follow the prompt; 1 = off.",
                        elem_id="id-guidance",
                    )
                with gr.Row(elem_id="id-upload-row"):
                    image = ImageField(label="Your own picture", height=180, elem_id="id-upload-image", **IMAGE_OPTIONS)
                    with gr.Column():
                        caption = TextField(label="Caption", placeholder="a dog on the beach", max_lines=3, lines=1)
                        analyse = gr.Button("Analyse my picture", elem_id="id-analyse")
        hints = html('<div class="id-hints"></div>')
        gallery = html(_examples_html(examples), js_on_load=_PICK, elem_id="id-examples")
    return PromptBar(prompt, generate, hints, seed, steps, guidance, image, caption, analyse, gallery)


_PAPERS = (
    ("Bits per word: Kong et al. 2024", "2310.07972"),
    ("Redundancy and synergy: Dewan et al. 2024", "2406.05191"),
    ("Concepts and stages: Tinaz et al. 2025", "2504.15473"),
)
"""What the page builds on: title, arXiv number."""


def _title_html() -> str:
    papers = "".join(f'<a href="https://arxiv.org/abs/{n}" target="_blank">{title}</a>' for title, n in _PAPERS)
    return (
        '<div class="id-title"><h1>Interpretable Diffusion</h1>'
        "<p>See which words, concepts and moments made this picture.</p>"
        f'<nav class="id-links"><details><summary>Papers</summary><div>{papers}</div></details>'
        '<a href="?view=api" target="_blank">API</a>'
        '<button type="button" class="id-keys" aria-label="Keys">?</button></nav></div>'
    )


def _examples_html(examples: list[PageExample]) -> str:
    buttons = "".join(
        f'<button type="button" class="id-example" data-example="{escape(e.name)}" title="{escape(e.prompt)}">'
        f'<img src="{e.thumbnail}" alt=""><span>{escape(e.prompt)}</span></button>'
        for e in examples
    )
    return (
        f'<div class="id-examples" role="group" aria-label="Examples with stored results">{buttons}</div>'
        '<div class="id-pictures" hidden></div>'
    )
