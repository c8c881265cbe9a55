"""Similarity of labels and words in the embedding of a model's own text encoder."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from core.diffusion.diffuser import Diffuser
from core.errors import PromptError

SIMILARITY_THRESHOLD = 0.6
"""Cosine from which two texts count as synonyms. On picturebook synonyms reach 0.99, other words 0.5."""


class LabelEmbeddings:
    """Embeddings of labels by a model's text encoder.

    The embedding of the empty text is subtracted from a text's own, and cosines are taken after centring on the mean of
    the labels, because words of one kind share most of their embedding.
    """

    def __init__(self, model: Diffuser, labels: Sequence[str]) -> None:
        self._labels = [label for label in labels if _knows(model, label)]
        embeddings = _label_embeddings(model, self._labels)
        self._mean = embeddings.mean(0)
        self._directions = F.normalize(embeddings - self._mean, dim=1)

    def similarities(self, model: Diffuser, text: str) -> dict[str, float]:
        """Cosine of a text with each label; empty if the model does not know the text."""
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
