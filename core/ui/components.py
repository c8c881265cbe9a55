"""The page's components, by what they are for: what its events read and write."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.events import Dependency

from core.ui.attribution.tab import AttributionTab
from core.ui.backend.fields import ImageField, NumberField
from core.ui.concepts.tab import ConceptsTab
from core.ui.examples import PageExample
from core.ui.interventions.tab import InterventionsTab
from core.ui.layout.tab import LayoutTab
from core.ui.questions.tab import Questions


@dataclass(frozen=True)
class PromptBar:
    """What an image is generated from: a prompt with its settings, an uploaded image, or a stored example."""

    prompt: gr.Textbox
    generate: gr.Button
    hints: gr.HTML
    """Words the model does not know, with suggestions."""
    seed: NumberField
    steps: NumberField
    guidance: NumberField
    image: ImageField
    """The uploaded image."""
    caption: gr.Textbox
    """The caption of the uploaded image."""
    analyse: gr.Button
    """Reads the uploaded image."""
    examples: gr.HTML
    """Its event `pick` carries the `name` of a stored example."""


@dataclass(frozen=True)
class Page:
    """Every component that an event reads or writes."""

    badge: gr.HTML
    """Which model is loaded, and whether it is ready."""
    clock: gr.Timer
    """Ticks while the model is being loaded."""
    bar: PromptBar
    viewer: gr.HTML
    """The image with its overlay and film strip."""
    status: gr.HTML
    """What is being computed and how far it is."""
    cancel: gr.Button
    scene: gr.State
    """The `Scene` that is shown, or None."""
    ticket: gr.Number
    """Of the current job. A component, not a state: it has to travel with the request that uses it."""
    autorun: gr.State
    """Changes when the page's address asks for an image to be generated."""
    attribution: AttributionTab
    questions: Questions
    concepts: ConceptsTab
    layout: LayoutTab
    interventions: InterventionsTab
    examples: dict[str, PageExample]
    """The stored examples by name."""
    load: Callable[..., Dependency]
    """Attaches a handler to the opening of the page."""
    unload: Callable[..., Any]
    """Attaches a handler to the closing of the page."""
