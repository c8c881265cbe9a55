"""The text encoder of a Stable Diffusion pipeline: from prompts to the conditions of its U-Net."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core.arguments import as_items
from core.diffusion.predictor import Conditions
from core.diffusion.vocabulary import Vocabulary
from core.errors import ModelError
from core.hardware.finite import NAMES, check_finite

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

log = logging.getLogger(__name__)

TEXT, MASK = "text", "mask"
"""Names of the conditions' tensors: embeddings [N, L, D], and [N, L] which rows of them are of the text."""
_MAX_CACHED = 1024
"""Text embeddings kept: 236 kB each on SD v1.4 in float32, a quarter of a gigabyte in all."""


class TextEncoder:
    """Encodes texts, each distinct one once."""

    vocabulary: Vocabulary
    """The words and lengths of text that it can read."""

    def __init__(self, module: "CLIPTextModel", tokenizer: "CLIPTokenizer", device: torch.device | None = None) -> None:
        """`device` is where embeddings go; by default they stay where the module is.

        Raises:
            ModelError: The tokenizer is not this encoder's.
        """
        highest, n_known = max(tokenizer.get_vocab().values()), int(module.config.vocab_size)
        if highest >= n_known:
            raise ModelError(
                f"The tokenizer has tokens up to number {highest} and the text encoder embeddings for {n_known}: they "
                f"are of different models. Take the tokenizer that the text encoder was trained with, or save the "
                f"pipeline again after its embeddings were resized."
            )
        self._module, self.vocabulary = module, Vocabulary(tokenizer, module.config.max_position_embeddings)
        self._device = device or torch.device(module.device)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def window_length(self) -> int:
        """Rows of the embedding of a text that is read at once: its tokens with start and end mark, padded."""
        return self.vocabulary.window + 2

    def encode(self, texts: Sequence[str]) -> Conditions:
        """Conditions, one row a text."""
        each = self._embeddings(as_items(texts))
        lengths = torch.tensor([len(embedding) for embedding in each])
        tensors = {TEXT: pad_sequence(each, batch_first=True)}
        if lengths.min() < lengths.max():
            tensors[MASK] = torch.arange(int(lengths.max())) < lengths[:, None]
        return Conditions(tensors)

    def _embeddings(self, texts: Sequence[str]) -> list[Tensor]:
        for text in dict.fromkeys(texts):
            if text not in self._cache:
                # One by one: in a batch, the rounding of a text's embedding would depend on the other texts.
                self._cache[text] = self._encode_one(text)
            self._cache.move_to_end(text)
        embeddings = [self._cache[text] for text in texts]
        while len(self._cache) > _MAX_CACHED:
            self._cache.popitem(last=False)
        return embeddings

    @torch.no_grad()
    def _encode_one(self, text: str) -> Tensor:
        """[L, D]; a text that is too long for one pass is read in windows, whose rows are joined."""
        self.vocabulary.check_length(text)
        tokens = torch.tensor(self.vocabulary.windows(text), device=self._module.device)
        embedding: Tensor = self._module(tokens).last_hidden_state.flatten(0, 1)
        if self._module.dtype != torch.float32 and not embedding.isfinite().all():
            log.warning("the text encoder's values are not finite in %s: it computes in float32", self._module.dtype)
            torch.nn.Module.to(self._module, torch.float32)
            embedding = self._module(tokens).last_hidden_state.flatten(0, 1)
        check_finite(embedding, NAMES["text_encoder"], self._module.dtype)
        return embedding.to(self._device)
