"""See which words, concepts and moments made a text-to-image picture.

Importing this package imports no torch: the names below load their module when they are first asked for, so that a
page can be served, and a command line parsed, before the several seconds that torch and diffusers take to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.concepts.layout import Layout, predict_layout
    from core.concepts.table import ConceptTable, load_concepts
    from core.diffusion.diffuser import Diffuser
    from core.diffusion.images import prepare_image
    from core.diffusion.loading import load_model
    from core.diffusion.sampling import Generation, Preview
    from core.edits import GlobalEdit, RemoveEdit, ReplaceEdit, SpatialEdit
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
    from core.information.attribution import attribute, attribute_iter
    from core.information.captions import rank_captions, rank_captions_iter
    from core.information.counterfactual import Inversion, WordChange, change_word, change_word_iter, invert
    from core.information.decomposition import Decomposition
    from core.information.likelihood import Likelihood, likelihood, likelihood_iter
    from core.information.partial import decompose, decompose_iter
    from core.information.quadrature import Sampler
    from core.information.ranking import Ranking
    from core.information.results import Attribution, AttributionProgress, Curves, Timeline
    from core.sae.autoencoder import SaeId, SparseAutoencoder
    from core.sae.collection import load_sae
    from core.spec import ModelSpec

_HOME = {
    "ArtifactError": "core.errors",
    "Attribution": "core.information.results",
    "AttributionProgress": "core.information.results",
    "Cancelled": "core.errors",
    "ConceptTable": "core.concepts.table",
    "Curves": "core.information.results",
    "Decomposition": "core.information.decomposition",
    "Diffuser": "core.diffusion.diffuser",
    "Generation": "core.diffusion.sampling",
    "GlobalEdit": "core.edits",
    "ImageError": "core.errors",
    "Inversion": "core.information.counterfactual",
    "Layout": "core.concepts.layout",
    "Likelihood": "core.information.likelihood",
    "ModelError": "core.errors",
    "ModelSpec": "core.spec",
    "Preview": "core.diffusion.sampling",
    "PromptError": "core.errors",
    "PromptTooLongError": "core.errors",
    "Ranking": "core.information.ranking",
    "RemoveEdit": "core.edits",
    "ReplaceEdit": "core.edits",
    "SaeId": "core.sae.autoencoder",
    "Sampler": "core.information.quadrature",
    "SparseAutoencoder": "core.sae.autoencoder",
    "SpatialEdit": "core.edits",
    "Timeline": "core.information.results",
    "UnknownWordError": "core.errors",
    "WordChange": "core.information.counterfactual",
    "WordNotInPromptError": "core.errors",
    "attribute": "core.information.attribution",
    "attribute_iter": "core.information.attribution",
    "change_word": "core.information.counterfactual",
    "change_word_iter": "core.information.counterfactual",
    "decompose": "core.information.partial",
    "decompose_iter": "core.information.partial",
    "invert": "core.information.counterfactual",
    "likelihood": "core.information.likelihood",
    "likelihood_iter": "core.information.likelihood",
    "load_concepts": "core.concepts.table",
    "load_model": "core.diffusion.loading",
    "load_sae": "core.sae.collection",
    "predict_layout": "core.concepts.layout",
    "prepare_image": "core.diffusion.images",
    "rank_captions": "core.information.captions",
    "rank_captions_iter": "core.information.captions",
}

__all__ = [  # the same names again: a type checker has to read them literally
    "ArtifactError",
    "Attribution",
    "AttributionProgress",
    "Cancelled",
    "ConceptTable",
    "Curves",
    "Decomposition",
    "Diffuser",
    "Generation",
    "GlobalEdit",
    "ImageError",
    "Inversion",
    "Layout",
    "Likelihood",
    "ModelError",
    "ModelSpec",
    "Preview",
    "PromptError",
    "PromptTooLongError",
    "Ranking",
    "RemoveEdit",
    "ReplaceEdit",
    "SaeId",
    "Sampler",
    "SparseAutoencoder",
    "SpatialEdit",
    "Timeline",
    "UnknownWordError",
    "WordChange",
    "WordNotInPromptError",
    "attribute",
    "attribute_iter",
    "change_word",
    "change_word_iter",
    "decompose",
    "decompose_iter",
    "invert",
    "likelihood",
    "likelihood_iter",
    "load_concepts",
    "load_model",
    "load_sae",
    "predict_layout",
    "prepare_image",
    "rank_captions",
    "rank_captions_iter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'core' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
