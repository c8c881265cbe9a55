"""Checks of what people type and upload, before it costs anything; each problem is a sentence that says what to do."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import gradio as gr

from core.diffusion.images import USE, is_transparent, open_image
from core.ui.backend.errors import sentence
from core.ui.backend.runtime import MAX_PROMPT, Runtime

MAX_CAPTIONS = 16
MAX_SEED = 2**32 - 1
MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_QUERY = 100
"""Characters of a search, a label or a name: what is compared costs as much as it is long."""
_DECODING = BoundedSemaphore(2)


def image_problem(path: str | None) -> str | None:
    """Why a file cannot be used as an image, judged by its header alone; None if it can."""
    if not path:
        return f"Choose an image first. {USE}"
    if not Path(path).is_file():
        return "The image is no longer here: uploads are kept for a few hours. Choose it again."
    try:
        with open_image(path):
            return None
    except ValueError as error:
        return str(error)


@contextmanager
def decoding() -> Iterator[None]:
    """Wait until few enough other uploads are being decoded: each may take a few hundred MB for a moment."""
    with _DECODING:
        yield


def image_note(path: Path) -> str:
    """What is done to an unusual image, in a sentence; empty for an ordinary one."""
    notes = []
    with open_image(path) as image:
        moving = False
        with suppress(Exception):  # the frames behind a readable first one may be damaged in any way
            # Not `n_frames`, which reads all of them. An MPO's other images are no animation.
            moving = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        if moving:
            notes.append("Only the first frame of the animation is used.")
        if is_transparent(image):
            notes.append("Transparent parts are shown on white.")
        if image.mode in ("1", "L", "LA", "I", "I;16", "F"):
            notes.append("The image has no colour, but the model expects colour.")
        if max(image.size) > 1.02 * min(image.size):
            notes.append("Only its central square is used.")
    return " ".join(notes)


def text_problem(name: str, text: Any, at_most: int = MAX_PROMPT) -> str | None:
    """Why a value is not a text that can be worked with, before any work is done with it."""
    if text is None:
        return None
    if not isinstance(text, str):
        return f"The {name} must be a text{_not(text)}."
    if len(text) > at_most:
        return f"The {name} has {len(text):,} characters; at most {at_most} are allowed. Shorten it."
    if any("\ud800" <= character <= "\udfff" for character in text):
        return f"The {name} holds half of a character (a lone surrogate), which is no text. Type it again."
    return None


def prompt_problem(runtime: Runtime, prompt: Any, name: str = "prompt") -> str | None:
    """Why a prompt cannot be used, as far as is known before the model is loaded."""
    if problem := text_problem(name, prompt):
        return problem
    text = (prompt or "").strip()
    if not text:
        return "Describe the picture in a few words, for example: a cat on the grass."
    if runtime.model is None:
        return None
    try:
        runtime.model.check_prompt(text)
    except ValueError as error:
        return sentence(error)
    return None


def number_in(value: Any) -> float | None:
    """The finite number that a value is; None for anything else, and for a number too large to compute with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def whole_in(value: Any) -> int | None:
    """The whole number that a value is; None for anything else."""
    number = number_in(value)
    return None if number is None or number != int(number) else int(number)


def _between(low: float, value: Any, high: float) -> bool:
    number = number_in(value)
    return number is not None and low <= number <= high


def _whole_between(low: int, value: Any, high: int) -> bool:
    number = whole_in(value)
    return number is not None and low <= number <= high


def seed_problem(seed: Any) -> str | None:
    """Why a seed cannot be used."""
    if _whole_between(0, seed, MAX_SEED):
        return None
    return f"The seed must be a whole number from 0 to {MAX_SEED}, such as 7{_not(seed)}."


def steps_problem(steps: Any) -> str | None:
    """Why a number of steps cannot be used."""
    if _whole_between(1, steps, MAX_STEPS):
        return None
    return f"The steps must be a whole number from 1 to {MAX_STEPS}, such as 25{_not(steps)}."


def step_problem(step: Any, steps: Any) -> str | None:
    """Why a step, counted from 0, is not in a run of `steps` steps."""
    if _whole_between(0, step, int(steps) - 1):
        return None
    return f"The step must be a whole number from 0 to {int(steps) - 1}, where 0 is the first{_not(step)}."


def concept_number(number: Any) -> int:
    """A concept's number, from what was typed or found in a link; whether such a concept exists, the table checks.

    Raises:
        ValueError: It is not a whole number.
    """
    value = number
    if isinstance(number, str):
        with suppress(ValueError):
            value = float(number)
    found = whole_in(value)
    if found is None:
        raise ValueError(f"A concept's number must be a whole number, such as 7{_not(number)}.")
    return found


def guidance_problem(guidance: Any) -> str | None:
    """Why a guidance scale cannot be used."""
    if _between(0, guidance, MAX_GUIDANCE):
        return None
    return f"The guidance must be a number from 0 to {MAX_GUIDANCE:g}, where 1 is none{_not(guidance)}."


def _not(value: Any) -> str:
    return "" if value is None or value == "" else f"; not “{shown(value)}”"


def shown(value: Any) -> str:
    """The beginning of what was entered, for a message about it."""
    if isinstance(value, str | int | float):
        return str(value)[:40].encode("utf-8", "replace").decode()
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else "something else"


def rel_error_problem(rel_error: Any) -> str | None:
    """Why a relative error cannot be requested."""
    if _between(0.01, rel_error, 1):
        return None
    return f"The relative error must be a number from 0.01 to 1, such as 0.1{_not(rel_error)}."


def bits_error_problem(error: Any) -> str | None:
    """Why bits per dimension cannot be measured to such an error."""
    if _between(0.001, error, 1):
        return None
    return f"The error must be a number of bits per dimension from 0.001 to 1, such as 0.01{_not(error)}."


def certainty_problem(certainty: Any) -> str | None:
    """Why a ranking cannot be requested with such a certainty."""
    if _between(0.5, certainty, 1) and certainty not in (0.5, 1):
        return None
    return f"The certainty must be a number above 0.5 and below 1, such as 0.95{_not(certainty)}."


def split_captions(text: str | None) -> list[str]:
    """The captions of a text with one caption per line."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def captions_problem(runtime: Runtime, text: Any) -> str | None:
    """Why captions, one per line, cannot be compared, as far as is known before the model is loaded."""
    if problem := text_problem("list of captions", text, MAX_CAPTIONS * (MAX_PROMPT + 2)):
        return problem
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
        return sentence(error)
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
