"""Detection of NaN or infinite activations without synchronising at every step; the error names the prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.sae.autoencoder import SaeId
from training.sae.stream import StreamBatch


class NotFiniteError(ValueError):
    """Activations that are NaN or infinite."""


class FinitenessCheck:
    """Notes rows that are not finite, on the device, until `check` reads them."""

    def __init__(self) -> None:
        self._seen: list[tuple[StreamBatch, SaeId]] = []
        self._rows: list[Tensor] = []

    def add(self, batch: StreamBatch, ids: Sequence[SaeId], samples: Sequence[Tensor]) -> None:
        """Note the first row of each SAE's samples [n, d_in] that is not finite."""
        light = batch._replace(samples={})  # its prompts are kept until the next check, its samples are not
        for sae_id, x in zip(ids, samples, strict=True):
            bad = ~x.float().sum(1).isfinite()
            self._seen.append((light, sae_id))
            self._rows.append(torch.where(bad.any(), bad.long().argmax(), -1))

    def check(self) -> None:
        """Synchronise with the device and read what was noted.

        Raises:
            NotFiniteError: A row since the last check was not finite.
        """
        rows = torch.stack(self._rows).tolist() if self._rows else []
        for (batch, sae_id), row in zip(self._seen, rows, strict=True):
            if row >= 0:
                raise NotFiniteError(
                    f"The activations of {sae_id.path} in batch {batch.number} are NaN or infinite for the prompt "
                    f"{batch.prompt_of(row)!r}. Training has stopped; the last checkpoint is from before it. Leave "
                    f"the prompt out, or run the model in float32."
                )
        self._seen.clear()
        self._rows.clear()
