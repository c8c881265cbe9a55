"""Stored examples: images with their attributions, which are shown without the model.

A folder holds `index.json` (a list of settings), and for each example its image and its previews side by side as WebP,
and one safetensors file per condition of its attributions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from core.files import write_text
from core.information.results import Attribution, Curves, Given, Timeline

GIVEN: tuple[Given, ...] = ("rest", "nothing")
QUALITY = 82
"""WebP quality of the previews."""

_ARRAYS = ("bits", "stderr", "direct_bits", "direct_stderr", "maps", "map_stderr")


@dataclass(frozen=True)
class StoredExample:
    """A stored image with its attributions."""

    name: str
    """Stem of its files."""
    folder: Path
    """Where its files are."""
    prompt: str
    """The prompt that it was generated from."""
    seed: int
    """Seed of the initial noise."""
    steps: int
    """Sampler steps."""
    guidance: float
    """Scale of classifier-free guidance."""

    @property
    def image(self) -> Image.Image:
        """The image, RGB."""
        with Image.open(self.folder / f"{self.name}.webp") as stored:
            return stored.convert("RGB")

    @property
    def previews(self) -> list[Image.Image]:
        """The previews, one per sampler step."""
        with Image.open(self.folder / f"{self.name}-strip.webp") as stored:
            strip = stored.convert("RGB")
        side = strip.width // self.steps
        return [strip.crop((i * side, 0, (i + 1) * side, side)) for i in range(self.steps)]

    def attribution(self, given: str) -> Attribution:
        """The attribution of its words given the `rest` of the prompt or `nothing`."""
        return load_attribution(self.folder / f"{self.name}-{given}.safetensors")


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
    strip.save(folder / f"{name}-strip.webp", quality=QUALITY, method=6)
    for given, attribution in attributions.items():
        save_attribution(attribution, folder / f"{name}-{given}.safetensors")
    index = folder / "index.json"
    entries = [
        e for e in (json.loads(index.read_text(encoding="utf-8")) if index.is_file() else []) if e["name"] != name
    ]
    write_text(index, json.dumps([*entries, {"name": name, **settings}], indent=1, ensure_ascii=False) + "\n")


def save_attribution(a: Attribution, path: Path) -> None:
    """An attribution as safetensors: arrays in float32, everything else as JSON in the file's metadata."""
    arrays = {name: getattr(a, name) for name in _ARRAYS}
    arrays.update({f"timeline.{name}": values for name, values in a.timeline._asdict().items()})
    if a.curves is not None:
        arrays.update({f"curves.{name}": part for name, part in a.curves._asdict().items() if part is not None})
    stored = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in arrays.items()}
    rest = {f.name: getattr(a, f.name) for f in fields(a) if f.name not in (*_ARRAYS, "timeline", "curves")}
    save_file(stored, path, metadata={"attribution": json.dumps({**rest, "settings": dict(a.settings)})})


def load_attribution(path: Path) -> Attribution:
    """The attribution that `save_attribution` wrote."""
    with safe_open(path, framework="np") as file:
        rest = json.loads(file.metadata()["attribution"])
        arrays = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118 - no mapping
    timeline = Timeline(*(arrays.pop(f"timeline.{name}") for name in Timeline._fields))
    parts = {name: arrays.pop(f"curves.{name}") for name in Curves._fields if f"curves.{name}" in arrays}
    curves = Curves(**parts) if parts else None
    return Attribution(**{**rest, **arrays, "words": tuple(rest["words"]), "timeline": timeline, "curves": curves})
