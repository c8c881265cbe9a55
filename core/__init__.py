"""See which words, concepts and moments made a text-to-image picture.

Importing this package imports no torch: the names below load their module when they are first asked for, so that a
page can be served, and a command line parsed, before the several seconds that torch and diffusers take to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.diffuser import Diffuser, Generation, Preview, load_model
    from core.errors import (
        Cancelled,
        ImageError,
        ModelError,
        PromptError,
        PromptTooLongError,
        UnknownWordError,
        WordNotInPromptError,
    )
    from core.images import prepare_image
    from core.information.attribution import attribute, attribute_iter
    from core.information.quadrature import Sampler
    from core.information.results import Attribution, AttributionProgress, Timeline
    from core.spec import ModelSpec

_HOME = {
    "Attribution": "core.information.results",
    "AttributionProgress": "core.information.results",
    "Cancelled": "core.errors",
    "Diffuser": "core.diffuser",
    "Generation": "core.diffuser",
    "ImageError": "core.errors",
    "ModelError": "core.errors",
    "ModelSpec": "core.spec",
    "Preview": "core.diffuser",
    "PromptError": "core.errors",
    "PromptTooLongError": "core.errors",
    "Sampler": "core.information.quadrature",
    "Timeline": "core.information.results",
    "UnknownWordError": "core.errors",
    "WordNotInPromptError": "core.errors",
    "attribute": "core.information.attribution",
    "attribute_iter": "core.information.attribution",
    "load_model": "core.diffuser",
    "prepare_image": "core.images",
}

__all__ = [  # the same names again: a type checker has to read them literally
    "Attribution",
    "AttributionProgress",
    "Cancelled",
    "Diffuser",
    "Generation",
    "ImageError",
    "ModelError",
    "ModelSpec",
    "Preview",
    "PromptError",
    "PromptTooLongError",
    "Sampler",
    "Timeline",
    "UnknownWordError",
    "WordNotInPromptError",
    "attribute",
    "attribute_iter",
    "load_model",
    "prepare_image",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
