"""The embedded model's training on a GPU: batches drawn there, compiled, and no other result than a CPU's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from training.picturebook.models.denoiser import DenoiserConfig, DenoiserTask
from training.picturebook.models.latents import Latents, draw_batch
from training.picturebook.models.loop import LoopConfig, train
from training.picturebook.models.muon import orthogonalise
from training.picturebook.models.painting import WORDINGS, tokenize
from training.picturebook.world.scenes import caption_of, make_scene

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("accelerate_forgets")]

CONFIG = LoopConfig(n_steps=24, batch_size=32, learning_rate=0.005, n_warmup=2)


class ATask(DenoiserTask):
    def show(self, model: nn.Module, path: Path) -> dict[str, float]:  # noqa: ARG002 (costs more than the steps)
        return {}


def a_task(device: torch.device | str) -> DenoiserTask:
    """A tiny denoiser, on latents that say whether the background comes first in the caption."""
    captions = [caption_of(make_scene(seed)) for seed in range(256)]
    tokens = tokenize([caption.text for caption in captions])[:, None].expand(-1, WORDINGS, -1).short()
    latents = 0.3 * torch.randn(256, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents += torch.tensor([float(caption.background_first) for caption in captions])[:, None, None, None]
    parts = (latents.half(), tokens, torch.zeros(256, 4, 4, dtype=torch.uint8))
    data = Latents(*(part.to(device) for part in parts))
    torch.manual_seed(0)
    shape = DenoiserConfig(block_out_channels=(16, 32), n_heads=(1, 1), text_width=32, text_layers=1)
    return ATask(shape, data, data, draw=lambda _: Image.new("RGB", (1, 1)))


def losses(folder: Path, config: LoopConfig, task: DenoiserTask) -> list[float]:
    train(task, config, folder, n_workers=0, checkpoint_interval_s=1e9, log_every=6)
    lines = map(json.loads, (folder / "denoiser" / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_batches_drawn_there_and_compiled_learn_as_those_of_the_host(device: torch.device, tmp_path: Path) -> None:
    host = losses(tmp_path / "host", CONFIG, a_task("cpu"))
    there = losses(tmp_path / "there", replace(CONFIG, compile=True), a_task(device))
    # Other draws on another device: equal but for chance.
    assert there == pytest.approx(host, rel=0.25)
    assert there[-1] < 0.7 * there[0]


def test_a_batch_is_the_same_whenever_it_is_drawn(device: torch.device) -> None:
    data = a_task(device).data
    first, _, again = (draw_batch(data, number, 64, 1000) for number in (7, 8, 7))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert all(value.device.type == device.type for value in first.values())


def test_a_stack_is_orthogonalised_as_its_matrices_are(device: torch.device) -> None:
    stack = torch.randn(6, 48, 96, generator=torch.Generator().manual_seed(0)).to(device)
    apart = torch.stack([orthogonalise(matrix, 5) for matrix in stack])
    torch.testing.assert_close(orthogonalise(stack, 5), apart, atol=0.03, rtol=0)
    torch.testing.assert_close(orthogonalise(stack.cpu(), 5), apart.cpu(), atol=0.05, rtol=0)
