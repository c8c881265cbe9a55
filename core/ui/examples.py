"""Stored examples: pictures that answer at once, without the model. One file format for those who make and read them.

A folder holds `index.json` (a list of settings), and for each example its picture and film strip as WebP and one
safetensors file for each way of counting.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from core.information.results import Attribution, Given, Timeline
from core.ui.images import data_url
from core.ui.runtime import Runtime
from core.ui.scene import Scene

log = logging.getLogger(__name__)

GIVEN: tuple[Given, ...] = ("rest", "nothing")
_ARRAYS = ("bits", "stderr", "direct_bits", "direct_stderr", "maps", "map_stderr")
_QUALITY = 82


@dataclass(frozen=True)
class Example:
    """One stored picture with its attributions."""

    name: str
    """Stem of its files."""
    folder: Path
    """Where they are."""
    prompt: str
    """What the picture was drawn from."""
    seed: int
    """Seed of its noise."""
    steps: int
    """Sampler steps."""
    guidance: float
    """Scale of classifier-free guidance."""

    @cached_property
    def scene(self) -> Scene:
        """The picture with its film strip."""
        with Image.open(self.folder / f"{self.name}.webp") as stored:
            image = stored.convert("RGB")
        with Image.open(self.folder / f"{self.name}-strip.webp") as stored:
            strip = stored.convert("RGB")
        side = strip.width // self.steps
        frames = [strip.crop((i * side, 0, (i + 1) * side, side)) for i in range(self.steps)]
        urls = tuple(data_url(frame, _QUALITY) for frame in frames)
        return Scene(image, self.prompt, self.seed, self.steps, self.guidance, urls)

    @cached_property
    def thumbnail(self) -> str:
        """The picture as a small data URL."""
        with Image.open(self.folder / f"{self.name}.webp") as stored:
            small = stored.convert("RGB")
        small.thumbnail((96, 96))
        return data_url(small, _QUALITY)

    def attribution(self, given: str) -> Attribution:
        """What each word told it, counted `given` the rest or nothing."""
        return load_attribution(self.folder / f"{self.name}-{given}.safetensors")


def load_examples(folder: Path | None) -> list[Example]:
    """The examples of a folder; none where there is none. A broken one must not keep the page from opening."""
    index = folder / "index.json" if folder else None
    if folder is None or index is None or not index.is_file():
        return []
    try:
        return [Example(folder=folder, **entry) for entry in json.loads(index.read_text())]
    except (ValueError, TypeError) as error:
        log.warning("The stored examples in %s cannot be read: %s", folder, error)
        return []


def keep_example(runtime: Runtime, example: Example, given: str) -> Attribution:
    """Let the page find the example's attributions like those it made itself; returns the one wanted."""
    for each in GIVEN:
        runtime.keep(example.scene.key, example.attribution(each))
    return example.attribution(given)


def save_example(
    folder: Path,
    name: str,
    image: Image.Image,
    previews: Sequence[Image.Image],
    settings: dict[str, Any],
    attributions: Mapping[Given, Attribution],
) -> None:
    """Write one example and add it to the index. `settings` has prompt, seed, steps and guidance."""
    folder.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").save(folder / f"{name}.webp", lossless=True, method=6)
    side = min(image.width, 128)
    strip = Image.new("RGB", (side * len(previews), side))
    for i, preview in enumerate(previews):
        strip.paste(preview.convert("RGB").resize((side, side)), (i * side, 0))
    strip.save(folder / f"{name}-strip.webp", quality=_QUALITY, method=6)
    for given, attribution in attributions.items():
        save_attribution(attribution, folder / f"{name}-{given}.safetensors")
    index = folder / "index.json"
    entries = [e for e in (json.loads(index.read_text()) if index.is_file() else []) if e["name"] != name]
    index.write_text(json.dumps([*entries, {"name": name, **settings}], indent=1, ensure_ascii=False) + "\n")


def save_attribution(a: Attribution, path: Path) -> None:
    """An attribution as safetensors: arrays in float32, everything else as JSON in the file's metadata."""
    arrays = {name: getattr(a, name) for name in _ARRAYS}
    arrays.update({f"timeline.{name}": values for name, values in a.timeline._asdict().items()})
    stored = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in arrays.items()}
    rest = {f.name: getattr(a, f.name) for f in fields(a) if f.name not in (*_ARRAYS, "timeline")}
    save_file(stored, path, metadata={"attribution": json.dumps({**rest, "settings": dict(a.settings)})})


def load_attribution(path: Path) -> Attribution:
    """The attribution that `save_attribution` wrote."""
    with safe_open(path, framework="np") as file:
        rest = json.loads(file.metadata()["attribution"])
        arrays = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118 - no mapping
    timeline = Timeline(*(arrays.pop(f"timeline.{name}") for name in Timeline._fields))
    return Attribution(**{**rest, **arrays, "words": tuple(rest["words"]), "timeline": timeline})
