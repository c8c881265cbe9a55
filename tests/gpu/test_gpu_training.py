"""Sparse autoencoders train in every precision, go on after a stop, and the whole path runs."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.sae.autoencoder import SaeId
from training.benchmark import conformance
from training.sae.bank import TrainerConfig
from training.sae.stream import StreamBatch
from training.sae.trainer import SaeRun, make_accelerator, train_saes

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("accelerate_forgets")]

ID = SaeId("mid_block.attentions.0", "cond", "all")
CONFIG = TrainerConfig(
    n_steps=40, k=4, expansion=4, learning_rate=3e-3, n_warmup=2, n_calibration_batches=2, sync_every=10, k_aux=16
)
D_IN = 64


class Planted:
    """Few of many directions at a time, made where the SAEs train, in the precision of a U-Net there."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._device, self._dtype = device, dtype
        self._features = torch.nn.functional.normalize(
            torch.randn(128, D_IN, generator=torch.Generator().manual_seed(0))
        )

    def d_in(self, hookpoint: str) -> int:
        del hookpoint
        return D_IN

    def batches(self, start: int = 0) -> Iterator[StreamBatch]:
        number = start
        while True:
            generator = torch.Generator().manual_seed(number)
            chosen = torch.rand(512, len(self._features), generator=generator).topk(4).indices
            code = torch.zeros(512, len(self._features)).scatter(1, chosen, 1 + torch.rand(512, 4, generator=generator))
            x = (code @ self._features).to(self._device, self._dtype).float()
            yield StreamBatch(number, {ID: x}, (f"prompt {number}",))
            number += 1


def train(folder: Path, device: torch.device, config: TrainerConfig) -> tuple[dict[str, Tensor], list[float]]:
    """Weights, and the unexplained variance at every sync."""
    run = SaeRun(folder, checkpoint_interval_s=0)
    saes = train_saes(Planted(device), [ID], config, run, make_accelerator(config, run))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return dict(saes[ID].state_dict()), [line["saes"][ID.path]["fvu"] for line in lines]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_learns_in_every_precision(
    precision: str, architecture: str, device: torch.device, tmp_path: Path
) -> None:
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("accelerate trains in float16 on accelerators alone")
    config = replace(CONFIG, precision=precision, architecture=architecture)
    weights, fvu = train(tmp_path / precision, device, config)
    assert all(value.isfinite().all() for value in weights.values())
    assert all(map(math.isfinite, fvu))
    assert fvu[-1] < 0.9 * fvu[0]


def test_training_that_is_resumed_ends_where_it_would_have(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, figures = train(tmp_path / "whole", device, CONFIG)
    given = Planted.batches

    def ends(self: Planted, start: int = 0) -> Iterator[StreamBatch]:
        for batch in given(self, start):
            if batch.number == 25:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Planted, "batches", ends)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", device, CONFIG)
    monkeypatch.undo()
    resumed, again = train(tmp_path / "parts", device, CONFIG)
    assert len(again) == len(figures)
    if device.type == "cpu":
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    # A GPU adds in another order every time.
    assert again == pytest.approx(figures, rel=0.02)


def test_the_whole_path_runs_on_a_small_model(device: torch.device) -> None:
    pytest.importorskip("pandas", reason="tables of concepts are pandas frames")
    pytest.importorskip("pyarrow", reason="tables of concepts are Parquet files")
    table = conformance.measure(str(device), small=True)
    assert "4 x 4 x 64, 2 x 2 x 64, 4 x 4 x 64" in table.markdown()
    assert any("SAE training step" in str(row["what"]) for row in table.rows)
