"""Gradio components that leave checking to us, and the options that events share."""

import math
from abc import ABCMeta
from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.events import Dependency

IMAGE_OPTIONS: dict[str, Any] = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
"""Options of every `ImageField`."""
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""Event options for work on the model: one job at a time."""
QUIET: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "hidden",
    # Otherwise every event keeps a status of each of its outputs, and when any event goes on, all of these are set
    # anew: that would wipe what a validator has written beside a field that some event fills in.
    "show_progress_on": [],
    "trigger_mode": "multiple",
}
"""Event options of the page: it shows progress in a place of its own, and its events are not part of the API."""
LATEST: dict[str, Any] = {**QUIET, "queue": False, "trigger_mode": "always_last"}
"""Event options of look-ups while one types: only the last of those that wait is answered."""


def html(value: str, **options: Any) -> gr.HTML:
    """A piece of the page in our own style; Gradio's is made for prose and would colour what is inside buttons."""
    return gr.HTML(value, apply_default_css=False, **options)


def copied(triggers: Sequence[Any], fields: Sequence[gr.components.Component]) -> tuple[Dependency, gr.JSON]:
    """Keeps the values of fields in a hidden list, for look-ups that may still run when a validator has its say.

    An event wipes what a validator wrote beside the event's inputs, and a look-up that waited for an earlier one
    begins at any time. Copying happens in the browser and wipes nothing.

    Args:
        triggers: Listeners that say when to copy, such as `[field.change]`.
        fields: The fields.

    Returns:
        The event, to be followed by the look-up, and the component that holds the list of values; None before
        the first trigger.
    """
    copy = gr.JSON(visible=False)
    return gr.on(triggers, None, fields, copy, js="(...values) => [values]", **QUIET), copy


class _PlainMeta(type(gr.Number)):  # type: ignore[misc]  # Gradio's metaclass has no public name
    """Makes component classes without writing a stub file next to this one, as Gradio's metaclass would."""

    def __new__(cls, name: str, bases: tuple[type, ...], attrs: dict[str, Any]) -> Any:
        return ABCMeta.__new__(cls, name, bases, attrs)


class NumberField(gr.Number, metaclass=_PlainMeta):
    """A number field that passes on whatever was typed, for a validator to answer.

    Gradio's own fails on a word before any of our code runs, with a message that helps nobody.
    """

    def get_block_name(self) -> str:
        """The browser shows it as an ordinary number field; by default it would look for one of the class's name."""
        return "number"

    def preprocess(self, payload: Any) -> Any:
        """The number, or the payload unchanged if it is not a number."""
        try:
            value = float(payload)
        except (TypeError, ValueError):
            return payload
        return value if math.isfinite(value) else str(payload)


class ImageField(gr.Image, metaclass=_PlainMeta):
    """An image field that passes on the path of the uploaded file, whatever is in it; see `IMAGE_OPTIONS`.

    Gradio's own decodes the file first, and fails on one that is not an image.
    """

    def get_block_name(self) -> str:
        """The browser shows it as an ordinary image field."""
        return "image"

    def preprocess(self, payload: Any) -> str | None:
        """The path of the file; Gradio has already checked that it is an upload of this session."""
        return str(payload.path) if payload is not None and payload.path else None
