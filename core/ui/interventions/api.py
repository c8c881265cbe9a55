"""Interventions for the API: from JSON objects to images and figures."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from PIL import Image

from core.diffusion.images import open_image
from core.ui.backend.dictionary import no_concepts
from core.ui.backend.errors import JobError
from core.ui.backend.inputs import decoding, text_problem
from core.ui.backend.jobs import EditedImages, intervene
from core.ui.backend.runtime import Runtime
from core.ui.interventions.export import to_document
from core.ui.interventions.request import MAX_REQUESTS, PAINTED, edit_of, mask_cells, request_of
from core.ui.look.scene import Scene


def intervention(
    runtime: Runtime,
    prompt: str,
    seed: int,
    steps: int,
    guidance: float,
    edits: Sequence[Any],
    mask: str | None = None,
) -> Generator[Any, None, None]:
    """Generate an image with and without edits; its progress, and last both images and what was measured.

    `mask` is a file uploaded with the request, the region of the first edit. The edits themselves are untrusted and
    cannot name a file.

    Raises:
        ValueError: An edit that is not valid.
        JobError: A model without concepts.
    """
    runtime.ready.wait()
    if runtime.error or runtime.dictionary is None:
        raise JobError(runtime.error or no_concepts(runtime.name))
    from core.ui.interventions.results import EditPlan, measure_edits  # which import torch

    assert runtime.model is not None  # it was loaded together with its concepts
    size = runtime.model.image_size
    if len(edits) > MAX_REQUESTS:
        raise ValueError(f"At most {MAX_REQUESTS} edits go together; {len(edits)} were requested.")
    first, *others = (_without_blanks(one) for one in edits)
    if mask:
        first |= _mask_region(mask, size)
    plan = EditPlan(tuple(request_of(one, runtime.spec, steps) for one in (first, *others)))
    scene = Scene(Image.fromarray(np.zeros((size, size, 3), np.uint8)), prompt, seed, steps, guidance)
    with closing(intervene(runtime, None, scene, [[edit_of(one, size) for one in plan.requests]])) as work:
        for item in work:
            if not isinstance(item, EditedImages):
                yield item
                continue
            comparison = measure_edits(scene, plan, item, runtime.dictionary, runtime.segmenter)
            document = to_document(comparison, runtime.name, runtime.dictionary.source)
            yield comparison.unedited, comparison.results[0].image, document


def _without_blanks(edit: Any) -> dict[str, Any]:
    """An edit without its empty fields."""
    if not isinstance(edit, Mapping):
        raise ValueError('An edit is an object such as {"kind": "move", "label": "cat", "region": "top-left"}.')
    given = {name: value for name, value in edit.items() if value not in (None, "")}
    if isinstance(numbers := given.get("concepts"), str):
        if problem := text_problem("list of concepts", numbers):
            raise ValueError(problem)
        given["concepts"] = [part.strip() for part in numbers.split(",") if part.strip()]
    return given


def _mask_region(path: str, size: int) -> dict[str, str]:
    """The region marked in an image file."""
    with decoding(), open_image(path) as image:
        return {"region": PAINTED, "cells": mask_cells(image, size)}
