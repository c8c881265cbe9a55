"""Gradio components that leave checking to us, and the options that events share."""

import math
from abc import ABCMeta
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeVar

import gradio as gr
from gradio.events import Dependency

from core.ui.backend.errors import refuse
from core.ui.backend.inputs import shown, text_problem
from core.ui.backend.jobs import Waiting

T = TypeVar("T")

IMAGE_OPTIONS: dict[str, Any] = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
"""Options of every `ImageField`."""
MAX_TEXT = 20_000
"""Characters of a text that has no shorter limit of its own, such as the captions to compare, one a line."""
LOOK_UP: dict[str, Any] = {"concurrency_id": "look-up", "concurrency_limit": 2}
"""Event options of what is answered from tables: a few at a time, so that they cannot take all processors."""
PROGRESS = gr.Progress()
"""The default of an endpoint's parameter, in whose place Gradio puts the progress of that request."""
QUIET: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "hidden",
    # Otherwise every event keeps a status of each of its outputs, and when any event goes on, all of these are set
    # anew: that would wipe what a validator has written beside a field that some event fills in.
    "show_progress_on": [],
    "trigger_mode": "multiple",
}
"""Event options of the page: it shows progress in a place of its own, and its events are not part of the API."""
LATEST: dict[str, Any] = {**QUIET, **LOOK_UP, "trigger_mode": "always_last"}
"""Event options of look-ups while one types: only the last of those that wait is answered."""


def told(items: Generator[T, None, None], progress: gr.Progress) -> Iterator[T]:
    """The same items of a job; what it waits for is told as the request's progress. A closed request closes the job."""
    with closing(items):
        for item in items:
            if isinstance(item, Waiting):
                progress(0.0, desc=item.text)
            yield item


def asked(event: gr.EventData) -> dict[str, Any]:
    """What the page's script sends with an event; whatever a forged request sends instead is nothing."""
    return event._data if isinstance(event._data, dict) else {}


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
        except OverflowError:
            return str(payload)
        except (TypeError, ValueError):
            return payload
        return value if math.isfinite(value) else str(payload)


class TextField(gr.Textbox, metaclass=_PlainMeta):
    """A text field that passes on a text of at most `max_length` characters, or `MAX_TEXT`; nothing is an empty text.

    A validator's own, shorter limit is told beside the field.
    """

    def get_block_name(self) -> str:
        """The browser shows it as an ordinary text field."""
        return "textbox"

    def preprocess(self, payload: Any) -> str:
        """The text.

        Raises:
            gr.Error: It is too long, or no text.
        """
        refuse(text_problem(str(self.label or "text").lower(), payload, self.max_length or MAX_TEXT))
        return payload or ""


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


class ChoiceField(gr.Radio, metaclass=_PlainMeta):
    """A choice among a few names; nothing is the default."""

    def get_block_name(self) -> str:
        """The browser shows it as an ordinary choice."""
        return "radio"

    def preprocess(self, payload: Any) -> Any:
        """The name.

        Raises:
            gr.Error: There is no such choice.
        """
        names = [value for _, value in self.choices]
        if payload is None:
            return self.value
        if not isinstance(payload, str) or payload not in names:
            known = ", ".join(str(name) for name in names if name != "")
            refuse(f"The {str(self.label).lower()} must be one of {known}; not “{shown(payload)}”.")
        return payload
