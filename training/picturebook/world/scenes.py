"""Scenes: a story laid out, painted, and known to the pixel.

Objects stand on the grid of the autoencoder's cells and come in few sizes, so that a drawing gives the same latents
wherever it stands: a small denoiser then learns what goes where, not every sub-pixel shift of every drawing.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from training.picturebook.world.backgrounds import N_VARIANTS, SIZE, background
from training.picturebook.world.captions import (
    Caption,
    Relation,
    Split,
    Story,
    sample_caption,
    sample_story,
    sense_probabilities,
)
from training.picturebook.world.drawings import drawing
from training.picturebook.world.styles import apply_style
from training.picturebook.world.world import ARTISTS, BACKGROUND_INDEX, OBJECT_INDEX, OBJECTS

CELL = 8
"""Side of an autoencoder cell in pixels; every object's corner lies on a multiple of it."""
SIZES: dict[int, tuple[int, ...]] = {1: (56, 64), 2: (48, 56), 3: (40, 48)}
"""Sides of the drawings by number of objects in a scene."""
ANYWHERE_P = 0.4
"""Probability that objects ignore their habitat."""


class Box(NamedTuple):
    """The square of an object in a scene."""

    object_name: str
    x: int
    """Left edge in pixels."""
    y: int
    """Top edge in pixels."""
    size: int
    """Side of its square in pixels."""


@dataclass(frozen=True)
class Scene:
    """A story laid out; `paint` makes the image."""

    seed: tuple[int, ...]
    story: Story
    boxes: tuple[Box, ...]
    """In the order of the story's nouns."""
    artist: str
    variant: int
    """Number of the background's painting."""


class Painting(NamedTuple):
    """A painted scene."""

    image: npt.NDArray[np.uint8]
    """[SIZE, SIZE, 3]"""
    labels: npt.NDArray[np.uint8]
    """[SIZE, SIZE]: index into `world.LABELS` of what each pixel shows."""


def make_scene(seed: int, split: Split = "train") -> Scene:
    """The scene of a seed. The three splits have different seeds, stories of `train` and `test` never share a
    combination of nouns, background and style.
    """
    key = (("train", "test", "any").index(split), seed)
    rng = np.random.default_rng(key)
    return lay_out(rng, sample_story(rng, split), key)


def lay_out(rng: np.random.Generator, story: Story, seed: tuple[int, ...] = ()) -> Scene:
    """Choose what the nouns mean and where the objects stand."""
    objects = []
    for noun in story.nouns:
        senses = sense_probabilities(noun, story.background)
        first, *others = senses
        objects.append(first if rng.random() < senses[first] else others[0])
    variant = int(rng.integers(N_VARIANTS))
    horizon = background(story.background, variant).horizon
    anywhere = rng.random() < ANYWHERE_P
    boxes = None
    while boxes is None:
        boxes = _place(rng, objects, story.relation, horizon, anywhere)
        # If no layout fits the habitats, ignore them.
        anywhere = anywhere or boxes is None
    return Scene(seed, story, boxes, ARTISTS[int(rng.integers(len(ARTISTS)))], variant)


def _place(
    rng: np.random.Generator,
    objects: list[str],
    relation: Relation | None,
    horizon: int,
    anywhere: bool,
    tries: int = 60,
) -> tuple[Box, ...] | None:
    """Boxes that do not overlap and keep the relation; None after `tries` failures."""
    # `above` and `below` occur equally often for objects of every habitat.
    anywhere = anywhere or relation in ("above", "below")
    for _ in range(tries):
        boxes: list[Box] = []
        for object_name in objects:
            sizes = SIZES[len(objects)]
            size = sizes[int(rng.integers(len(sizes)))]
            low, high = (0, SIZE - size) if anywhere else _rows(object_name, size, horizon)
            x = int(rng.integers((SIZE - size) // CELL + 1)) * CELL
            y = int(rng.integers(-(-low // CELL), high // CELL + 1)) * CELL
            boxes.append(Box(object_name, x, y, size))
        if _apart(boxes) and (relation is None or relation_holds(relation, boxes[0], boxes[1])):
            return tuple(boxes)
    return None


def _rows(object_name: str, size: int, horizon: int) -> tuple[int, int]:
    """First and last row for the top edge of an object in its habitat."""
    if OBJECTS[OBJECT_INDEX[object_name]].habitat == "high":
        return 0, max(CELL, horizon - size + CELL)
    return min(max(horizon + 12 - size + CELL, 0), SIZE - size - CELL), SIZE - size


def _apart(boxes: list[Box]) -> bool:
    return all(
        a.x + a.size <= b.x or b.x + b.size <= a.x or a.y + a.size <= b.y or b.y + b.size <= a.y
        for i, a in enumerate(boxes)
        for b in boxes[i + 1 :]
    )


def crowd(scene: Scene, n: int, tries: int = 12) -> Scene:
    """The scene with up to `n` more objects of any class, where there is room: more training data for the judges."""
    rng = np.random.default_rng([*scene.seed, 4])
    boxes = list(scene.boxes)
    for _ in range(tries):
        if len(boxes) == len(scene.boxes) + n:
            break
        size = SIZES[3][int(rng.integers(len(SIZES[3])))]
        x, y = (int(rng.integers((SIZE - size) // CELL + 1)) * CELL for _ in "xy")
        box = Box(OBJECTS[int(rng.integers(len(OBJECTS)))].name, x, y, size)
        if _apart([*boxes, box]):
            boxes.append(box)
    return replace(scene, boxes=tuple(boxes))


def relation_holds(relation: Relation, first: Box, second: Box) -> bool:
    """Whether the first box stands so to the second: wholly to that side, and more to that side than to another."""
    dx = (second.x + second.size / 2) - (first.x + first.size / 2)
    dy = (second.y + second.size / 2) - (first.y + first.size / 2)
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    along = along if relation in ("left", "above") else -along
    return along >= (first.size + second.size) / 2 and along > abs(across)


def paint(scene: Scene) -> Painting:
    """The image of a scene and its label map."""
    rng = np.random.default_rng([*scene.seed, 1])
    canvas = background(scene.story.background, scene.variant).image.copy()
    labels = np.full((SIZE, SIZE), len(OBJECTS) + BACKGROUND_INDEX[scene.story.background], dtype=np.uint8)
    for box in scene.boxes:
        rgba = drawing(box.object_name, scene.artist, box.size)
        window = np.s_[box.y : box.y + box.size, box.x : box.x + box.size]
        canvas[window] = canvas[window] * (1 - rgba[..., 3:]) + rgba[..., :3]
        labels[window][rgba[..., 3] > 0.5] = OBJECT_INDEX[box.object_name]
    image = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Painting(apply_style(scene.story.style, image, rng), labels)


def layout_of(scene: Scene) -> npt.NDArray[np.uint8]:
    """[SIZE / CELL, SIZE / CELL]: class of the object that covers a cell; `len(OBJECTS)` where there is none."""
    layout = np.full((SIZE // CELL, SIZE // CELL), len(OBJECTS), dtype=np.uint8)
    for box in scene.boxes:
        rows, columns = (slice(start // CELL, (start + box.size) // CELL) for start in (box.y, box.x))
        layout[rows, columns] = OBJECT_INDEX[box.object_name]
    return layout


def caption_of(scene: Scene, wording: int = 0) -> Caption:
    """The caption of a scene in one of its wordings."""
    return sample_caption(np.random.default_rng([*scene.seed, 2, wording]), scene.story)
