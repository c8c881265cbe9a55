"""What somebody wishes to be otherwise in a picture, as plain text: for the form, the address, files and programs."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.arrays import Bools
from core.diffusion.schedule import named_steps
from core.spec import ModelSpec
from core.ui.inputs import concept_number

if TYPE_CHECKING:
    from core.edits import ConceptEdit, Editor

KINDS: dict[str, str] = {
    "move": "Move it there, or draw it there",
    "whole": "Change the whole picture",
    "remove": "Take it away",
}
"""Kinds of edit with what the page calls them."""
REGIONS: dict[str, str] = {
    "top-left": "↖ top left",
    "top": "↑ top half",
    "top-right": "↗ top right",
    "left": "← left half",
    "all": "all of it",
    "right": "→ right half",
    "bottom-left": "↙ bottom left",
    "bottom": "↓ bottom half",
    "bottom-right": "↘ bottom right",
}
"""Parts of a picture with what the page calls them, row by row."""
PAINTED = "painted"
"""The region that somebody painted."""
OWN_WINDOW = "own"
"""A window of steps in place of a stage."""
GRID = 32
"""A painted region is kept as so many cells on a side: finer than any block looks, and short enough for an address."""
STRENGTHS = {"move": (16.0, 0.5), "whole": (6.0, 0.25), "remove": (4.0, 0.25)}
"""Largest strength on the page's slider by kind, and its steps."""
STRENGTH_INFO = {
    "move": "Times the concept’s usual value.",
    "whole": "Times what a style’s word does, or a concept’s usual value.",
    "remove": "1 puts in its place what is beside it; more goes past that, for what other blocks still draw.",
}
MAX_REQUESTS = 8
"""Most edits at once."""


@dataclass(frozen=True)
class EditRequest:
    """One edit, as it was asked for."""

    kind: str = "move"
    """One of `KINDS`."""
    label: str = ""
    """What it is about; empty where concepts are named one by one."""
    concepts: tuple[int, ...] = ()
    """Numbers of concepts in place of a label."""
    hookpoint: str = ""
    """Where those numbers mean something."""
    branch: str = ""
    """Likewise."""
    region: str = "all"
    """One of `REGIONS`, or `PAINTED`."""
    cells: str = ""
    """The painted region: a bit a cell, row by row, as hexadecimal digits."""
    stage: str = ""
    """Early, middle, late, or from one to another as `early to late`; empty where steps are named."""
    steps: tuple[int, int] | None = None
    """First and last step, from 0."""
    strength: float = 1.0
    """As `core.edits` takes it."""

    def to_dict(self) -> dict[str, Any]:
        """What is not as usual, for JSON."""
        plain = {name: value for name, value in asdict(self).items() if value != getattr(EditRequest(), name)}
        return {"kind": self.kind, **plain, "strength": self.strength}

    @property
    def what(self) -> str:
        """The label, or the numbers."""
        return self.label or ", ".join(map(str, self.concepts))

    def told(self, n_steps: int, with_time: bool = True) -> str:
        """The wish in a few words."""
        name = self.label or f"concept{'s' * (len(self.concepts) > 1)} {self.what}"
        where = "painted region" if self.region == PAINTED else REGIONS[self.region].lstrip("↖↑↗←→↙↓↘ ")
        act = {
            "move": f"{name} → {where}",
            "whole": f"more {name} everywhere",
            "remove": f"no {name}" + ("" if self.region == "all" else f" in {where}"),
        }[self.kind]
        when = f"steps {self.steps[0] + 1} to {self.steps[1] + 1} of {n_steps}" if self.steps else self.stage
        return " · ".join([act, *([when] if with_time else []), f"strength {self.strength:g}"])


def request_of(document: Any, spec: ModelSpec, n_steps: int) -> EditRequest:
    """A wish from what `Wish.to_dict` gives, as it stands in an address or comes from a program.

    Raises:
        ValueError: It is none; the message says what is wrong.
    """
    if not isinstance(document, Mapping):
        raise ValueError('An edit is an object such as {"kind": "move", "label": "cat", "region": "top-left"}.')
    known = EditRequest.__dataclass_fields__
    if wrong := [name for name in document if name not in known]:
        raise ValueError(f"An edit has no {wrong[0]!r}: it may have {', '.join(known)}.")
    if problem := kind_problem(document.get("kind", EditRequest.kind)):
        raise ValueError(problem)
    one = replace(EditRequest(), **{"strength": default_strength(document.get("kind", EditRequest.kind)), **document})
    concepts = one.concepts if isinstance(one.concepts, list | tuple) else [one.concepts]
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


def requests_of(text: str, spec: ModelSpec, n_steps: int) -> tuple[EditRequest, ...]:
    """The wishes of an address, or of a program.

    Raises:
        ValueError: They cannot be read.
    """
    try:
        documents = json.loads(text or "[]")
    except json.JSONDecodeError:
        raise ValueError("The edits cannot be read: they are no JSON.") from None
    if not isinstance(documents, list) or len(documents) > MAX_REQUESTS:
        raise ValueError(f"The edits are a list of at most {MAX_REQUESTS}.")
    return tuple(request_of(document, spec, n_steps) for document in documents)


def to_text(requests: Sequence[EditRequest]) -> str:
    """The wishes for an address."""
    return json.dumps([one.to_dict() for one in requests], ensure_ascii=False, separators=(",", ":"))


def parse_what(text: str | None) -> tuple[str, tuple[int, ...]]:
    """A label, or the numbers of concepts, from one field."""
    parts = [part.strip(" #") for part in (text or "").replace(";", ",").split(",")]
    numbers = [part for part in parts if part]
    if numbers and all(part.isdecimal() for part in numbers):
        return "", tuple(int(part) for part in numbers)
    return " ".join((text or "").split()), ()


def kind_problem(kind: Any) -> str | None:
    """Why an edit cannot be of a kind."""
    return _one_of("kind of an edit", kind, KINDS)


def what_problem(label: Any, concepts: Sequence[int]) -> str | None:
    """Why nothing can be edited, before anybody has looked for it."""
    if not isinstance(label, str) or not (label.strip() or concepts):
        return "Say what to edit: a thing, a place or a style from the list, or numbers of concepts such as 12, 40."
    if label.strip() and concepts:
        return "Name either a label or numbers of concepts, not both."
    return None


def region_problem(region: Any, cells: Any) -> str | None:
    """Why a region cannot be used."""
    if region == PAINTED:
        try:
            return None if cells_mask(cells, GRID).any() else "The region is empty: paint over some of the picture."
        except ValueError as error:
            return str(error)
    return _one_of("region", region, REGIONS)


def stage_problem(stage: Any, spec: ModelSpec, n_steps: int) -> str | None:
    """Why a stage cannot be used in a run of so many steps."""
    try:
        steps = named_steps(stage, n_steps, spec.stages)
    except ValueError as error:
        return str(error)
    if not steps:
        return f"With {n_steps} steps the {stage} stage has none: take another, or name the steps."
    return None


def window_problem(first: Any, last: Any, n_steps: int, start: int = 0) -> str | None:
    """Why steps, counted from `start`, are no window of a run."""
    whole = all(isinstance(one, int | float) and math.isfinite(one) and one == int(one) for one in (first, last))
    if whole and start <= first <= last < start + n_steps:
        return None
    shown = f"{first:g} to {last:g}" if whole else f"“{str(first)[:20]}” to “{str(last)[:20]}”"
    return (
        f"The window has to lie within this picture's steps, {start} to {start + n_steps - 1}, and its end not before "
        f"its beginning; not {shown}."
    )


def strength_problem(strength: Any) -> str | None:
    """Why a strength means nothing."""
    if isinstance(strength, int | float) and not isinstance(strength, bool) and 0 <= strength < math.inf:
        return None
    return f"The strength is a finite number from 0 on, such as 4; not “{str(strength)[:40]}”."


def offered_stages(spec: ModelSpec) -> tuple[str, ...]:
    """The stages that the page offers: each, and all of them."""
    names = [stage.name for stage in spec.stages]
    return (*names, f"{names[0]} to {names[-1]}")


def default_stage(kind: str) -> str:
    """When an edit of a kind serves best."""
    return edit_class(kind).default_stage


def default_strength(kind: str) -> float:
    """How strong it is where nothing is said."""
    return edit_class(kind).strength


def edit_class(kind: str) -> "type[ConceptEdit]":
    """What makes an edit of a kind."""
    from core.edits import GlobalEdit, RemoveEdit, SpatialEdit  # which import torch

    return {"move": SpatialEdit, "whole": GlobalEdit, "remove": RemoveEdit}[kind]


def edit_of(request: EditRequest, size: int) -> "ConceptEdit":
    """The edit of a picture of so many pixels on a side."""
    from core.concepts.trace import SaeSite
    from core.edits import Target

    options: dict[str, Any] = {"strength": request.strength}
    options |= {"steps": request.steps} if request.steps else {"stage": request.stage}
    if request.kind != "whole":
        options["region"] = cells_mask(request.cells, size) if request.region == PAINTED else request.region
    if request.label:
        options["label"] = request.label
    else:
        site = SaeSite(request.hookpoint, request.branch)  # type: ignore[arg-type]
        options["concepts"] = [Target(site, number) for number in request.concepts]
    return edit_class(request.kind)(**options)


def check_request(editor: "Editor", request: EditRequest) -> str | None:
    """Why there is nothing to edit for a wish; else None."""
    try:
        editor.concepts(edit_of(request, editor.model.image_size))
    except ValueError as error:
        return str(error)
    return None


def paint_cells(mask: NDArray[Any]) -> str:
    """A painted mask [H, W] as the cells of a wish: a cell with any paint belongs to it. Empty without any."""
    rows, columns = (np.arange(n) * GRID // n for n in mask.shape)
    cells = np.zeros((GRID, GRID), dtype=bool)
    np.logical_or.at(cells, (rows[:, None], columns[None, :]), np.asarray(mask) > 0)
    return np.packbits(cells).tobytes().hex() if cells.any() else ""


def cells_mask(cells: Any, size: int) -> Bools:
    """[size, size] the painted region on a picture.

    Raises:
        ValueError: Cells that cannot be read.
    """
    if not cells:
        return np.zeros((size, size), dtype=bool)
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(cells), dtype=np.uint8))
    except (TypeError, ValueError):
        bits = np.empty(0, dtype=np.uint8)
    if bits.size != GRID * GRID:
        raise ValueError(f"A painted region is {GRID * GRID // 4} hexadecimal digits, a bit for each of its cells.")
    index = np.arange(size) * GRID // size
    return np.asarray(bits.reshape(GRID, GRID)[index][:, index] > 0)


def mask_cells(mask: Image.Image, size: int) -> str:
    """The cells of a mask that a program brings: above 0 is inside; of a picture with transparency, what is not clear.

    Raises:
        ValueError: It is not of the picture's size, or empty.
    """
    if mask.size != (size, size):
        raise ValueError(f"A region has the picture's size, {size} x {size}, not {mask.width} x {mask.height}.")
    cells = paint_cells(np.asarray(mask.getchannel("A") if "A" in mask.getbands() else mask.convert("L")))
    if not cells:
        raise ValueError("The region is empty: mark some of the picture.")
    return cells


def _one_of(name: str, value: Any, names: Collection[str]) -> str | None:
    known = isinstance(value, str) and value in names
    return None if known else f"The {name} is one of {', '.join(names)}; not “{str(value)[:40]}”."


def _window(steps: Any) -> tuple[Any, Any]:
    if isinstance(steps, list | tuple) and len(steps) == 2:
        return steps[0], steps[1]
    raise ValueError("An edit's steps are two numbers, the first and the last, from 0.")
