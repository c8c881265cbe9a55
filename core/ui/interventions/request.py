"""Edit requests as plain data: for the form, links, downloads and the API."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.arrays import Bools
from core.diffusion.images import decoded
from core.diffusion.schedule import named_steps
from core.spec import ModelSpec
from core.ui.backend.errors import sentence
from core.ui.backend.inputs import MAX_QUERY, concept_number, number_in, shown, text_problem, whole_in

if TYPE_CHECKING:
    from core.edits import ConceptEdit, Editor

KINDS: dict[str, str] = {
    "move": "Move or add",
    "global": "Change the whole picture",
    "remove": "Remove",
}
"""Kinds of edit, and what the page calls them."""
REGIONS: dict[str, str] = {
    "top-left": "↖ top left",
    "top": "↑ top half",
    "top-right": "↗ top right",
    "left": "← left half",
    "all": "everywhere",
    "right": "→ right half",
    "bottom-left": "↙ bottom left",
    "bottom": "↓ bottom half",
    "bottom-right": "↘ bottom right",
}
"""Regions of the image, row by row, and what the page calls them."""
PAINTED = "painted"
"""The region that was painted by hand."""
CUSTOM_STEPS = "custom"
"""A range of steps in place of a stage."""
GRID = 32
"""Cells on a side of a painted region: finer than any block's grid, and short enough for a link."""
STRENGTHS = {"move": (16.0, 0.5), "global": (6.0, 0.25), "remove": (4.0, 0.25)}
"""By kind, the largest strength on the page's slider and its step."""
MAX_STRENGTH = 1e6
"""Far beyond what a picture survives, and small enough to compute with."""
STRENGTH_INFO = {
    "move": "× the concept’s typical value.",
    "global": "× the effect of the style’s word, or × the concept’s typical value.",
    "remove": "1 replaces it by its surroundings; above 1 overcorrects.",
}
MAX_REQUESTS = 8
"""Most edits at once."""
MAX_CONCEPTS = 256
"""Most concepts that an edit lists by number."""
_MAX_LINK = 20_000
"""Characters of the edits in a link; the longest that the page writes has 8 painted regions."""


@dataclass(frozen=True)
class EditRequest:
    """One edit as it was requested."""

    kind: str = "move"
    """One of `KINDS`."""
    label: str = ""
    """Label of the concepts to edit; empty if concepts are listed by number."""
    concepts: tuple[int, ...] = ()
    """Concept numbers in place of a label."""
    hookpoint: str = ""
    """The block those numbers belong to."""
    branch: str = ""
    """The branch those numbers belong to."""
    region: str = "all"
    """One of `REGIONS`, or `PAINTED`."""
    cells: str = ""
    """The painted region: one bit per cell, row by row, as hexadecimal digits."""
    stage: str = ""
    """`early`, `middle`, `late`, or a span such as `early to late`; empty if steps are given."""
    steps: tuple[int, int] | None = None
    """First and last step, counted from 0."""
    strength: float = 1.0
    """In the unit of its class in `core.edits`."""

    def to_dict(self) -> dict[str, Any]:
        """The kind, the strength and every field that differs from its default, for JSON."""
        plain = {name: value for name, value in asdict(self).items() if value != getattr(EditRequest(), name)}
        return {"kind": self.kind, **plain, "strength": self.strength}

    @property
    def what(self) -> str:
        """The label, or the concept numbers as text."""
        return self.label or ", ".join(map(str, self.concepts))

    def describe(self, n_steps: int, with_time: bool = True) -> str:
        """The request in a few words."""
        name = self.label or f"concept{'s' * (len(self.concepts) > 1)} {self.what}"
        where = "painted region" if self.region == PAINTED else REGIONS[self.region].lstrip("↖↑↗←→↙↓↘ ")
        act = {
            "move": f"{name} → {where}",
            "global": f"more {name} everywhere",
            "remove": f"no {name}" + ("" if self.region == "all" else f" in {where}"),
        }[self.kind]
        when = f"steps {self.steps[0] + 1} to {self.steps[1] + 1} of {n_steps}" if self.steps else self.stage
        return " · ".join([act, *([when] if with_time else []), f"strength {self.strength:g}"])


def request_of(document: Any, spec: ModelSpec, n_steps: int) -> EditRequest:
    """The request in a JSON object like that of `EditRequest.to_dict`, from a link or an API client.

    Raises:
        ValueError: It is not a valid edit; the message says what is wrong.
    """
    if not isinstance(document, Mapping):
        raise ValueError('An edit is an object such as {"kind": "move", "label": "cat", "region": "top-left"}.')
    known = EditRequest.__dataclass_fields__
    if wrong := [name for name in document if name not in known]:
        raise ValueError(f"An edit has no field “{shown(wrong[0])}”; its fields are {', '.join(known)}.")
    for name in _TEXTS & set(document):
        if problem := text_problem(f"{name} of an edit", document[name], _MAX_TEXT):
            raise ValueError(problem)
    if problem := kind_problem(document.get("kind", EditRequest.kind)):
        raise ValueError(problem)
    one = replace(EditRequest(), **{"strength": default_strength(document.get("kind", EditRequest.kind)), **document})
    concepts = one.concepts if isinstance(one.concepts, list | tuple) else [one.concepts]
    if len(concepts) > MAX_CONCEPTS:
        raise ValueError(f"An edit changes at most {MAX_CONCEPTS} concepts at once; {len(concepts)} were named.")
    steps = None if one.steps is None else _window(one.steps)
    one = replace(
        one,
        concepts=tuple(concept_number(number) for number in concepts),
        hookpoint=one.hookpoint or (str((spec.hookpoints[:2] or ("",))[-1]) if concepts else ""),
        branch=one.branch or ("cond" if concepts else ""),
        steps=steps,
        stage="" if steps else one.stage or default_stage(one.kind),
    )
    problems = [
        what_problem(one.label, one.concepts),
        region_problem(one.region, one.cells),
        stage_problem(one.stage, spec, n_steps) if steps is None else window_problem(*steps, n_steps),
        strength_problem(one.strength),
    ]
    for problem in problems:
        if problem:
            raise ValueError(problem)
    return replace(one, strength=float(one.strength))


_TEXTS = {"hookpoint", "branch", "cells"}
_MAX_TEXT = GRID * GRID // 4
"""Of the longest of them, the cells."""


def requests_of(text: str, spec: ModelSpec, n_steps: int) -> tuple[EditRequest, ...]:
    """The requests of a link, from the JSON that `to_text` writes.

    Raises:
        ValueError: They cannot be read, or one is not valid.
    """
    if len(text) > _MAX_LINK:
        raise ValueError(f"The edits cannot be read: they are longer than {_MAX_LINK:,} characters.")
    try:
        documents = json.loads(text or "[]")
    except (ValueError, RecursionError):
        raise ValueError("The edits cannot be read: they are not valid JSON.") from None
    if not isinstance(documents, list) or len(documents) > MAX_REQUESTS:
        raise ValueError(f"The edits must be a list of at most {MAX_REQUESTS}.")
    return tuple(request_of(document, spec, n_steps) for document in documents)


def to_text(requests: Sequence[EditRequest]) -> str:
    """The requests as JSON for a link."""
    return json.dumps([one.to_dict() for one in requests], ensure_ascii=False, separators=(",", ":"))


def parse_what(text: str | None) -> tuple[str, tuple[int, ...]]:
    """A label, or concept numbers, from the text of one field."""
    parts = [part.strip(" #") for part in (text or "").replace(";", ",").split(",")]
    numbers = [part for part in parts if part]
    if numbers and all(part.isdecimal() for part in numbers):
        return "", tuple(concept_number(part) for part in numbers[: MAX_CONCEPTS + 1])
    return " ".join((text or "").split()), ()


def kind_problem(kind: Any) -> str | None:
    """Why a value is not a kind of edit."""
    return _one_of("kind of an edit", kind, KINDS)


def what_problem(label: Any, concepts: Sequence[int]) -> str | None:
    """Why a label and concept numbers cannot be used, before they are looked up."""
    if problem := text_problem("name of what to edit", label, MAX_QUERY):
        return problem
    if len(concepts) > MAX_CONCEPTS:
        return f"An edit changes at most {MAX_CONCEPTS} concepts at once."
    if not ((label or "").strip() or concepts):
        return "Say what to edit: an object, a background or a style from the list, or concept numbers such as 12, 40."
    if label.strip() and concepts:
        return "Give either a label or concept numbers, not both."
    return None


def region_problem(region: Any, cells: Any) -> str | None:
    """Why a region cannot be used."""
    if region == PAINTED:
        try:
            return None if cells_mask(cells, GRID).any() else "The region is empty: paint over part of the picture."
        except ValueError as error:
            return sentence(error)
    return _one_of("region", region, REGIONS)


def stage_problem(stage: Any, spec: ModelSpec, n_steps: int) -> str | None:
    """Why a stage cannot be used in a run of `n_steps` steps."""
    try:
        steps = named_steps(stage, n_steps, spec.stages)
    except ValueError as error:
        return sentence(error)
    if not steps:
        return f"With {n_steps} steps the {stage} stage has none: choose another stage, or custom steps."
    return None


def window_problem(first: Any, last: Any, n_steps: int, start: int = 0) -> str | None:
    """Why steps, counted from `start`, are not a range of a run."""
    numbers = whole_in(first), whole_in(last)
    if numbers[0] is not None and numbers[1] is not None and start <= numbers[0] <= numbers[1] < start + n_steps:
        return None
    whole = None not in numbers
    found = f"{numbers[0]} to {numbers[1]}" if whole else f"“{shown(first)}” to “{shown(last)}”"
    return (
        f"The steps must lie within this picture's steps, {start} to {start + n_steps - 1}, and must not end before "
        f"they begin; not {found[:60]}."
    )


def strength_problem(strength: Any) -> str | None:
    """Why a strength cannot be used."""
    number = number_in(strength)
    if number is not None and 0 <= number <= MAX_STRENGTH:
        return None
    return (
        f"The strength must be a finite number of at least 0, such as 4, and at most {MAX_STRENGTH:,.0f}; not "
        f"“{shown(strength)}”."
    )


def offered_stages(spec: ModelSpec) -> tuple[str, ...]:
    """The stages that the page offers: each one, and the span of all."""
    names = [stage.name for stage in spec.stages]
    return (*names, f"{names[0]} to {names[-1]}")


def default_stage(kind: str) -> str:
    """The stage at which edits of a kind work best."""
    return edit_class(kind).default_stage


def default_strength(kind: str) -> float:
    """The default strength of a kind of edit."""
    return edit_class(kind).strength


def edit_class(kind: str) -> "type[ConceptEdit]":
    """The class in `core.edits` of a kind of edit."""
    from core.edits import GlobalEdit, RemoveEdit, SpatialEdit  # which import torch

    return {"move": SpatialEdit, "global": GlobalEdit, "remove": RemoveEdit}[kind]


def edit_of(request: EditRequest, size: int) -> "ConceptEdit":
    """The edit for an image of `size` pixels on a side."""
    from core.concepts.trace import SaeSite
    from core.edits import Target

    options: dict[str, Any] = {"strength": request.strength}
    options |= {"steps": request.steps} if request.steps else {"stage": request.stage}
    if request.kind != "global":
        options["region"] = cells_mask(request.cells, size) if request.region == PAINTED else request.region
    if request.label:
        options["label"] = request.label
    else:
        site = SaeSite(request.hookpoint, request.branch)  # type: ignore[arg-type]
        options["concepts"] = [Target(site, number) for number in request.concepts]
    return edit_class(request.kind)(**options)


def check_request(editor: "Editor", request: EditRequest) -> str | None:
    """Why a request finds no concepts to edit; None if it finds some."""
    try:
        editor.concepts(edit_of(request, editor.model.image_size))
    except (ValueError, LookupError) as error:
        return sentence(error)
    return None


def paint_cells(mask: NDArray[Any]) -> str:
    """A painted mask [H, W] as cells: a cell with any paint belongs to the region. Empty if nothing is painted."""
    rows, columns = (np.arange(n) * GRID // n for n in mask.shape)
    cells = np.zeros((GRID, GRID), dtype=bool)
    np.logical_or.at(cells, (rows[:, None], columns[None, :]), np.asarray(mask) > 0)
    return np.packbits(cells).tobytes().hex() if cells.any() else ""


def cells_mask(cells: Any, size: int) -> Bools:
    """[size, size] mask of the painted region.

    Raises:
        ValueError: The cells cannot be read.
    """
    if not cells:
        return np.zeros((size, size), dtype=bool)
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(cells), dtype=np.uint8))
    except (TypeError, ValueError):
        bits = np.empty(0, dtype=np.uint8)
    if bits.size != GRID * GRID:
        raise ValueError(f"A painted region has {GRID * GRID // 4} hexadecimal digits, one bit per cell.")
    index = np.arange(size) * GRID // size
    return np.asarray(bits.reshape(GRID, GRID)[index][:, index] > 0)


def mask_cells(mask: Image.Image, size: int) -> str:
    """The cells of an uploaded mask: above 0 is inside; in an image with transparency, whatever is not transparent.

    Raises:
        ValueError: It does not have the image's size, or is empty.
    """
    if mask.size != (size, size):
        raise ValueError(f"A mask must have the image's size, {size} x {size}, not {mask.width} x {mask.height}.")
    pixels = decoded(mask)
    cells = paint_cells(np.asarray(pixels.getchannel("A") if "A" in pixels.getbands() else pixels.convert("L")))
    if not cells:
        raise ValueError("The region is empty: mark part of the image.")
    return cells


def _one_of(name: str, value: Any, names: Collection[str]) -> str | None:
    known = isinstance(value, str) and value in names
    return None if known else f"The {name} must be one of {', '.join(names)}; not “{shown(value)}”."


def _window(steps: Any) -> tuple[Any, Any]:
    if isinstance(steps, list | tuple) and len(steps) == 2:
        return steps[0], steps[1]
    raise ValueError("An edit's steps are two numbers, the first and the last, counted from 0.")
