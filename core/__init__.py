"""See which words, concepts and moments made a text-to-image picture.

Importing this package imports no torch: the names below load their module when they are first asked for, so that a
page can be served, and a command line parsed, before the several seconds that torch and diffusers take to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.concepts import ConceptTable, load_concepts
    from core.diffuser import Diffuser, load_model
    from core.errors import (
        ArtifactError,
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
    from core.layout import Layout, predict_layout
    from core.sae import SaeId, SparseAutoencoder
    from core.sae_source import load_sae
    from core.sampling import Generation, Preview
    from core.spec import ModelSpec

_HOME = {
    "ArtifactError": "core.errors",
    "Attribution": "core.information.results",
    "AttributionProgress": "core.information.results",
    "Cancelled": "core.errors",
    "ConceptTable": "core.concepts",
    "Diffuser": "core.diffuser",
    "Generation": "core.sampling",
    "ImageError": "core.errors",
    "Layout": "core.layout",
    "ModelError": "core.errors",
    "ModelSpec": "core.spec",
    "Preview": "core.sampling",
    "PromptError": "core.errors",
    "PromptTooLongError": "core.errors",
    "SaeId": "core.sae",
    "Sampler": "core.information.quadrature",
    "SparseAutoencoder": "core.sae",
    "Timeline": "core.information.results",
    "UnknownWordError": "core.errors",
    "WordNotInPromptError": "core.errors",
    "attribute": "core.information.attribution",
    "attribute_iter": "core.information.attribution",
    "load_concepts": "core.concepts",
    "load_model": "core.diffuser",
    "load_sae": "core.sae_source",
    "predict_layout": "core.layout",
    "prepare_image": "core.images",
}

__all__ = [  # the same names again: a type checker has to read them literally
    "ArtifactError",
    "Attribution",
    "AttributionProgress",
    "Cancelled",
    "ConceptTable",
    "Diffuser",
    "Generation",
    "ImageError",
    "Layout",
    "ModelError",
    "ModelSpec",
    "Preview",
    "PromptError",
    "PromptTooLongError",
    "SaeId",
    "Sampler",
    "SparseAutoencoder",
    "Timeline",
    "UnknownWordError",
    "WordNotInPromptError",
    "attribute",
    "attribute_iter",
    "load_concepts",
    "load_model",
    "load_sae",
    "predict_layout",
    "prepare_image",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
