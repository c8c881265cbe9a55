"""Checks of what people type and upload, before it costs anything; each problem is a sentence that says what to do."""

import math
import warnings
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from core.diffusion.images import check_size
from core.ui.backend.runtime import Runtime

MAX_PROMPT = 500
"""Characters; the model's own limit in tokens is checked by the model."""
MAX_CAPTIONS = 16
MAX_SEED = 2**32 - 1
MAX_STEPS = 200
MAX_GUIDANCE = 30.0


def image_problem(path: str | None) -> str | None:
    """Why a file cannot be used as an image, judged by its header alone; None if it can."""
    if not path:
        return "Choose an image first: a PNG, JPEG or WebP file."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                check_size(*image.size)
    except Image.DecompressionBombError:
        return "The image has far too many pixels. Make it smaller first; 1024 × 1024 is plenty."
    except ValueError as error:
        return str(error)
    except (OSError, SyntaxError):
        return "This file is not an image that can be read. Use a PNG, JPEG or WebP file."
    return None


def image_note(path: Path) -> str:
    """What is done to an unusual image, in a sentence; empty for an ordinary one."""
    with Image.open(path) as image:
        notes = []
        if getattr(image, "n_frames", 1) > 1:
            notes.append("Only the first frame of the animation is used.")
        if "A" in image.getbands() or "transparency" in image.info:
            notes.append("Transparent parts are shown on white.")
        if image.mode in ("1", "L", "LA", "I", "I;16", "F"):
            notes.append("The image has no colour, but the model expects colour.")
        if max(image.size) > 1.02 * min(image.size):
            notes.append("Only its central square is used.")
    return " ".join(notes)


def prompt_problem(runtime: Runtime, prompt: str | None) -> str | None:
    """Why a prompt cannot be used, as far as is known before the model is loaded."""
    text = (prompt or "").strip()
    if not text:
        return "Describe the picture in a few words, for example: a cat on the grass."
    if len(text) > MAX_PROMPT:
        return f"The prompt has {len(text)} characters; at most {MAX_PROMPT} are allowed. Shorten it."
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
    """Why a step, counted from 0, is not in a run of `steps` steps."""
    if _whole(step) and 0 <= step < steps:
        return None
    return f"The step must be a whole number from 0 to {int(steps) - 1}, where 0 is the first{_not(step)}."


def concept_number(number: Any) -> int:
    """A concept's number, from what was typed or found in a link; whether such a concept exists, the table checks.

    Raises:
        ValueError: It is not a whole number.
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
    """Why a relative error cannot be requested."""
    if isinstance(rel_error, int | float) and 0.01 <= rel_error <= 1:
        return None
    return f"The relative error must be a number from 0.01 to 1, such as 0.1{_not(rel_error)}."


def bits_error_problem(error: Any) -> str | None:
    """Why bits per dimension cannot be measured to such an error."""
    if isinstance(error, int | float) and 0.001 <= error <= 1:
        return None
    return f"The error must be a number of bits per dimension from 0.001 to 1, such as 0.01{_not(error)}."


def certainty_problem(certainty: Any) -> str | None:
    """Why a ranking cannot be requested with such a certainty."""
    if isinstance(certainty, int | float) and 0.5 < certainty < 1:
        return None
    return f"The certainty must be a number above 0.5 and below 1, such as 0.95{_not(certainty)}."


def split_captions(text: str | None) -> list[str]:
    """The captions of a text with one caption per line."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def captions_problem(runtime: Runtime, text: str | None) -> str | None:
    """Why captions, one per line, cannot be compared, as far as is known before the model is loaded."""
    captions = split_captions(text)
    if len(captions) < 2:
        return "Write two captions or more, one per line, for example: a cat on the grass; a dog on the grass."
    if len(captions) > MAX_CAPTIONS:
        return f"There are {len(captions)} captions; at most {MAX_CAPTIONS} can be compared at once. Remove some."
    too_long = next((n for n, caption in enumerate(captions, 1) if len(caption) > MAX_PROMPT), None)
    if too_long:
        return f"Caption {too_long} has more than {MAX_PROMPT} characters. Shorten it."
    if runtime.model is None:
        return None
    from core.information.captions import check_captions  # which imports torch, as the model did

    try:
        check_captions(runtime.model, captions)
    except ValueError as error:
        return str(error)
    return None


def upload_problems(runtime: Runtime, image: str | None, caption: Any, seed: Any) -> list[str | None]:
    """One entry per field of an uploaded image."""
    return [image_problem(image), prompt_problem(runtime, caption), seed_problem(seed)]


def generation_problems(runtime: Runtime, prompt: Any, seed: Any, steps: Any, guidance: Any) -> list[str | None]:
    """One entry per field, in the order of the prompt bar."""
    return [prompt_problem(runtime, prompt), seed_problem(seed), steps_problem(steps), guidance_problem(guidance)]


def verdicts(problems: list[str | None]) -> list[Any]:
    """Problems in the form that Gradio shows next to the fields."""
    return [gr.validate(problem is None, problem or "") for problem in problems]
