"""What people type and bring, checked before it costs anything, with a sentence that says what to do."""

import math
import warnings
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from core.diffusion.images import check_size
from core.ui.runtime import Runtime

MAX_PROMPT = 500
"""Characters; the model's own limit in tokens is checked by the model."""
MAX_CAPTIONS = 16
MAX_SEED = 2**32 - 1
MAX_STEPS = 200
MAX_GUIDANCE = 30.0
PICTURE: dict[str, Any] = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}


def html(value: str, **options: Any) -> Any:
    """A piece of the page in its own style: Gradio's, made for prose, would colour what is inside buttons."""
    return gr.HTML(value, apply_default_css=False, **options)


class _Plain(type(gr.Number)):  # type: ignore[misc]
    """Makes component classes without writing a stub file beside this one, as Gradio's own metaclass would."""

    def __new__(cls, name: str, bases: tuple[type, ...], attrs: dict[str, Any]) -> Any:
        return ABCMeta.__new__(cls, name, bases, attrs)


class Number(gr.Number, metaclass=_Plain):  # type: ignore[misc]
    """A number field that hands on whatever was typed, for a validator to answer.

    Gradio's own fails on a word before anything of ours runs, with a message for nobody.
    """

    def preprocess(self, payload: Any) -> Any:
        """The number; what is no number as it came."""
        try:
            value = float(payload)
        except (TypeError, ValueError):
            return payload
        return value if math.isfinite(value) else str(payload)


class Picture(gr.Image, metaclass=_Plain):  # type: ignore[misc]
    """A picture field that hands on the path of the uploaded file, whatever is in it; `PICTURE` are its options.

    Gradio's own decodes the file first, and fails on one that is no picture.
    """

    def get_block_name(self) -> str:
        """The browser shows it as an ordinary picture field."""
        return "image"

    def preprocess(self, payload: Any) -> str | None:
        """The path of the uploaded file. Gradio has made sure by now that it is one of those."""
        return str(payload.path) if payload is not None and payload.path else None


def image_problem(path: str | None) -> str | None:
    """Why a file cannot be taken as a picture, from its header alone."""
    if not path:
        return "Bring a picture first: a PNG, JPEG or WebP file."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                check_size(*image.size)
    except Image.DecompressionBombError:
        return "The picture has far too many pixels. Make it smaller first; 1024 × 1024 is plenty."
    except ValueError as error:
        return str(error)
    except (OSError, SyntaxError):
        return "This file is not a picture that can be read. Bring a PNG, JPEG or WebP."
    return None


def image_note(path: Path) -> str:
    """What is done to an unusual picture, in a sentence; empty for an ordinary one."""
    with Image.open(path) as image:
        notes = []
        if getattr(image, "n_frames", 1) > 1:
            notes.append("Of the animation, the first frame is used.")
        if "A" in image.getbands() or "transparency" in image.info:
            notes.append("What is transparent is laid on white.")
        if image.mode in ("1", "L", "LA", "I", "I;16", "F"):
            notes.append("The picture has no colour; the model expects some.")
        if max(image.size) > 1.02 * min(image.size):
            notes.append("Its middle square is used.")
    return " ".join(notes)


def prompt_problem(runtime: Runtime, prompt: str | None) -> str | None:
    """Why a prompt cannot be drawn, as far as can be told now."""
    text = (prompt or "").strip()
    if not text:
        return "Describe the picture in a few words, for example: a cat on the grass."
    if len(text) > MAX_PROMPT:
        return f"The prompt has {len(text)} characters; at most {MAX_PROMPT} are read. Say it in fewer words."
    if runtime.model is None:
        return None
    try:
        runtime.model.check_prompt(text)
    except ValueError as error:
        return str(error)
    return None


def seed_problem(seed: Any) -> str | None:
    """Why a seed cannot be used."""
    if _whole(seed) and 0 <= seed <= MAX_SEED:
        return None
    return f"The seed must be a whole number from 0 to {MAX_SEED}, such as 7{_not(seed)}."


def steps_problem(steps: Any) -> str | None:
    """Why a number of steps cannot be used."""
    if _whole(steps) and 1 <= steps <= MAX_STEPS:
        return None
    return f"The steps must be a whole number from 1 to {MAX_STEPS}, such as 25{_not(steps)}."


def step_problem(step: Any, steps: Any) -> str | None:
    """Why a step cannot be read in a run of so many; it counts from 0."""
    if _whole(step) and 0 <= step < steps:
        return None
    return f"The step must be a whole number from 0 to {int(steps) - 1}, where 0 is the first{_not(step)}."


def concept_number(number: Any) -> int:
    """A concept's number, from what was typed or stood in an address; whether there is such a concept, the table says.

    Raises:
        ValueError: It is no whole number.
    """
    try:
        value = float(number)
    except (TypeError, ValueError):
        value = math.nan
    if not _whole(value):
        raise ValueError(f"A concept's number must be a whole number, such as 7{_not(number)}.")
    return int(value)


def guidance_problem(guidance: Any) -> str | None:
    """Why a guidance scale cannot be used."""
    if isinstance(guidance, int | float) and 0 <= guidance <= MAX_GUIDANCE:
        return None
    return f"The guidance must be a number from 0 to {MAX_GUIDANCE:g}, where 1 is none{_not(guidance)}."


def _whole(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value == int(value)


def _not(value: Any) -> str:
    return "" if value is None or value == "" else f"; not “{str(value)[:40]}”"


def rel_error_problem(rel_error: Any) -> str | None:
    """Why a relative error cannot be aimed for."""
    if isinstance(rel_error, int | float) and 0.01 <= rel_error <= 1:
        return None
    return f"The relative error must be a number from 0.01 to 1, such as 0.1{_not(rel_error)}."


def bits_error_problem(error: Any) -> str | None:
    """Why bits a dimension cannot be told with such an error."""
    if isinstance(error, int | float) and 0.001 <= error <= 1:
        return None
    return f"The error must be a number of bits a dimension from 0.001 to 1, such as 0.01{_not(error)}."


def certainty_problem(certainty: Any) -> str | None:
    """Why an order cannot be wanted as certain as that."""
    if isinstance(certainty, int | float) and 0.5 < certainty < 1:
        return None
    return f"The certainty must be a number above 0.5 and below 1, such as 0.95{_not(certainty)}."


def other_word_problem(runtime: Runtime, other: str | None) -> str | None:
    """Why something cannot stand in a word's place; nothing at all can."""
    return prompt_problem(runtime, other) if (other or "").strip() else None


def split_captions(text: str | None) -> list[str]:
    """The captions of a text that has one a line."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def captions_problem(runtime: Runtime, text: str | None) -> str | None:
    """Why captions, one a line, cannot be compared, as far as can be told now."""
    captions = split_captions(text)
    if len(captions) < 2:
        return "Write two captions or more, one a line, for example: a cat on the grass; a dog on the grass."
    if len(captions) > MAX_CAPTIONS:
        return f"There are {len(captions)} captions; at most {MAX_CAPTIONS} are compared at once. Leave some out."
    too_long = next((n for n, caption in enumerate(captions, 1) if len(caption) > MAX_PROMPT), None)
    if too_long:
        return f"Caption {too_long} has more than {MAX_PROMPT} characters. Say it in fewer words."
    if runtime.model is None:
        return None
    from core.information.captions import check_captions  # which imports torch, as the model did

    try:
        check_captions(runtime.model, captions)
    except ValueError as error:
        return str(error)
    return None


def own_problems(runtime: Runtime, picture: str | None, caption: Any, seed: Any) -> list[str | None]:
    """One entry a field of a picture that somebody brings."""
    return [image_problem(picture), prompt_problem(runtime, caption), seed_problem(seed)]


def draw_problems(runtime: Runtime, prompt: Any, seed: Any, steps: Any, guidance: Any) -> list[str | None]:
    """One entry a field, in the order of the prompt bar."""
    return [prompt_problem(runtime, prompt), seed_problem(seed), steps_problem(steps), guidance_problem(guidance)]


def verdicts(problems: list[str | None]) -> list[Any]:
    """Problems in the form that Gradio shows beside the fields."""
    return [gr.validate(problem is None, problem or "") for problem in problems]
