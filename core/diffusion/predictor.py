"""What sampling and estimation ask of a model: noise predictions at a log-SNR, under conditions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class Conditions:
    """What noise predictions are conditioned on: N rows, one per latent.

    Only the predictor, and the encoder that made them, know what is inside; everybody else selects and joins rows.
    """

    tensors: Mapping[str, Tensor]
    """By name, [N, ...] each."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> "Conditions":
        """Some of the rows; an index may occur more than once."""

        def select(tensor: Tensor) -> Tensor:
            if isinstance(rows, slice):
                return tensor[rows]
            return tensor[torch.as_tensor(rows, device=tensor.device)]

        return self._map(select)

    def __sub__(self, other: Tensor) -> Tensor:
        """How far the embeddings are from others, [N, L, D], such as diffusers' own of the same texts.

        Raises:
            ValueError: There is more than embeddings in it, as with texts of different lengths.
        """
        (embeddings,) = self.tensors.values()
        return embeddings - other

    def repeat(self, n: int) -> "Conditions":
        """All rows n times: row i comes again at i + N, i + 2 N, ..."""
        return self._map(lambda tensor: tensor.repeat(n, *[1] * (tensor.ndim - 1)))

    @staticmethod
    def cat(parts: Iterable["Conditions"]) -> "Conditions":
        """The rows of several conditions of one encoder call's shape, one after another."""
        parts = list(parts)
        return Conditions({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Conditions":
        return Conditions({name: function(tensor) for name, tensor in self.tensors.items()})


class NoisePredictor(Protocol):
    """Predicts the noise in latents x_a = sqrt(sigmoid(a)) x + sqrt(sigmoid(-a)) eps, a the log-SNR.

    A flow-matching model or a transformer fits behind it as well as a U-Net: what it was trained to predict, and how it
    counts time, stays inside.
    """

    @property
    def schedule(self) -> NoiseSchedule:
        """The log-SNR range that it was trained on, and the sampler's steps through it."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of its latents."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def predict_noise(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        """Predictions of eps [B, C, h, w], for latents x [B, C, h, w] at log_snr [B] under B rows of conditions."""


class PromptedModel(NoisePredictor, Protocol):
    """A noise predictor with a text encoder: a `Diffuser`, or a model with a closed form."""

    def encode_text(self, texts: Sequence[str]) -> Conditions:
        """Conditions, one row a text; the empty text is allowed."""

    def busy(self) -> AbstractContextManager[object]:
        """A context that holds the model for one job."""
