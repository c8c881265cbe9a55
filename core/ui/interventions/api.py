"""Interventions for programs: from named edits to pictures and figures."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from PIL import Image

from core.ui.concepts.dictionary import no_concepts
from core.ui.inputs import image_problem
from core.ui.interventions.export import to_document
from core.ui.interventions.request import MAX_REQUESTS, PAINTED, edit_of, mask_cells, request_of
from core.ui.jobs import JobError, Redrawn, intervene
from core.ui.look.scene import Scene
from core.ui.runtime import Runtime


def intervention(
    runtime: Runtime,
    prompt: str,
    seed: int,
    steps: int,
    guidance: float,
    named: Sequence[Any],
    mask: str | None = None,
) -> Iterator[tuple[Image.Image, Image.Image, dict[str, Any]] | None]:
    """Draw a picture with and without edits; None as it goes, and last both pictures and what was measured.

    `mask` is a file that came with the request, the region of the first edit. What the edits themselves say may come
    from anybody, and names no file.

    Raises:
        ValueError: An edit that cannot be.
        JobError: A model without concepts.
    """
    runtime.ready.wait()
    if runtime.error or runtime.dictionary is None:
        raise JobError(runtime.error or no_concepts(runtime.name))
    from core.ui.interventions.results import Plan, measure_redrawn  # which import torch

    size = runtime.model.image_size
    if len(named) > MAX_REQUESTS:
        raise ValueError(f"At most {MAX_REQUESTS} edits go together; {len(named)} were asked for.")
    first, *runner_ups = (_named(one) for one in named)
    if mask:
        first |= _masked(mask, size)
    plan = Plan(tuple(request_of(one, runtime.spec, steps) for one in (first, *runner_ups)))
    scene = Scene(Image.fromarray(np.zeros((size, size, 3), np.uint8)), prompt, seed, steps, guidance)
    with closing(intervene(runtime, None, scene, [[edit_of(one, size) for one in plan.asked]])) as work:
        for item in work:
            if not isinstance(item, Redrawn):
                yield None
                continue
            outcome = measure_redrawn(scene, plan, item, runtime.dictionary, runtime.segmenter)
            document = to_document(outcome, runtime.name, runtime.dictionary.source)
            yield outcome.unedited, outcome.results[0].image, document


def _named(edit: Any) -> dict[str, Any]:
    """An edit without what was left empty."""
    if not isinstance(edit, Mapping):
        raise ValueError('An edit is an object such as {"kind": "move", "label": "cat", "region": "top-left"}.')
    given = {name: value for name, value in edit.items() if value not in (None, "")}
    if isinstance(numbers := given.get("concepts"), str):
        given["concepts"] = [part.strip() for part in numbers.split(",") if part.strip()]
    return given


def _masked(path: str, size: int) -> dict[str, str]:
    """The region that a file shows."""
    if problem := image_problem(path):
        raise ValueError(problem)
    with Image.open(path) as image:
        return {"region": PAINTED, "cells": mask_cells(image, size)}
