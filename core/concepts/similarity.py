"""Which labels mean nearly the same as a word, by a model's own text encoder."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from core.diffusion.diffuser import Diffuser
from core.errors import PromptError

SIMILARITY_THRESHOLD = 0.6
"""Texts of at least this cosine mean nearly the same. On picturebook synonyms reach 0.99, other words 0.5."""


class LabelEmbeddings:
    """What a model's text encoder makes of labels.

    A text's meaning is its embedding less that of the empty text; cosines are taken round the mean of the labels, for
    all words of a kind have much in common.
    """

    def __init__(self, model: Diffuser, labels: Sequence[str]) -> None:
        self._labels = [label for label in labels if _knows(model, label)]
        meanings = _label_embeddings(model, self._labels)
        self._mean = meanings.mean(0)
        self._directions = F.normalize(meanings - self._mean, dim=1)

    def similarities(self, model: Diffuser, text: str) -> dict[str, float]:
        """Cosine of a text with each label, none if the model does not know the text."""
        if not self._labels or not _knows(model, text):
            return {}
        direction = F.normalize(_label_embeddings(model, [text])[0] - self._mean, dim=0)
        return dict(zip(self._labels, (self._directions @ direction).tolist(), strict=True))


def _knows(model: Diffuser, text: str) -> bool:
    try:
        model.check_prompt(text)
    except PromptError:
        return False
    return True


def _label_embeddings(model: Diffuser, texts: Sequence[str]) -> Tensor:
    """[N, L x D] embeddings less that of the empty text."""
    embeddings = model.text_embeddings([*texts, ""]).float().cpu()
    return (embeddings[:-1] - embeddings[-1]).flatten(1)
