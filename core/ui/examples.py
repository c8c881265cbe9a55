"""The stored examples as the page shows them: their results are there at once, without the model."""

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from core.information.results import Attribution
from core.information.stored import GIVEN, QUALITY, StoredExample
from core.ui.backend.runtime import Runtime
from core.ui.look.images import data_url
from core.ui.look.scene import Scene

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PageExample(StoredExample):
    """A stored example on the page."""

    @cached_property
    def scene(self) -> Scene:
        """The image with its film strip."""
        urls = tuple(data_url(frame, QUALITY) for frame in self.previews)
        return Scene(self.image, self.prompt, self.seed, self.steps, self.guidance, urls)

    @cached_property
    def thumbnail(self) -> str:
        """The image as a small data URL."""
        small = self.image
        small.thumbnail((96, 96))
        return data_url(small, QUALITY)


def load_examples(folder: Path | None) -> list[PageExample]:
    """The examples in a folder, or none; a broken index must not keep the page from opening."""
    index = folder / "index.json" if folder else None
    if folder is None or index is None or not index.is_file():
        return []
    try:
        return [PageExample(folder=folder, **entry) for entry in json.loads(index.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        log.warning("The stored examples in %s cannot be read: %s", folder, error)
        return []


def cache_example(runtime: Runtime, example: PageExample, given: str) -> Attribution:
    """Put the example's attributions into the runtime's cache; returns the one for `given`."""
    for each in GIVEN:
        runtime.cache_attribution(example.scene.key, example.attribution(each))
    return example.attribution(given)
