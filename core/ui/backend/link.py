"""Links: the query parameters of the page's address that restore an image."""

from collections.abc import Mapping
from typing import NamedTuple

from core.spec import ModelSpec
from core.ui.backend.inputs import guidance_problem, seed_problem, steps_problem


class PageLink(NamedTuple):
    """An image's settings, and what its words are measured against."""

    prompt: str
    seed: int
    steps: int
    guidance: float
    given: str


def read_link(query: Mapping[str, str], spec: ModelSpec) -> PageLink | None:
    """What an address asks for, or None if it has no prompt.

    Raises:
        ValueError: A value that cannot be used; the message says which.
    """
    prompt = query.get("prompt", "").strip()
    if not prompt:
        return None
    seed = _number(query, "seed", 0)
    steps = _number(query, "steps", spec.num_inference_steps)
    guidance = _number(query, "guidance", spec.guidance_scale)
    for problem in (seed_problem(seed), steps_problem(steps), guidance_problem(guidance)):
        if problem:
            raise ValueError(f"This link cannot be restored. {problem}")
    given = "nothing" if query.get("given") == "nothing" else "rest"
    return PageLink(prompt, int(seed), int(steps), guidance, given)


def _number(query: Mapping[str, str], name: str, otherwise: float) -> float:
    text = query.get(name, "")
    try:
        return float(text) if text else float(otherwise)
    except (OverflowError, ValueError):
        raise ValueError(f"This link cannot be restored: its {name}, “{text[:40]}”, is not a number.") from None
