import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.training.picturebook.test_muon import OneByOne
from training.common.checkpoint import Checkpoint, save_checkpoint
from training.picturebook.models import loop
from training.picturebook.models.denoiser import DenoiserConfig, DenoiserTask
from training.picturebook.models.latents import Latents
from training.picturebook.models.loop import Batch, LoopConfig, averaged, train
from training.picturebook.models.painting import WORDINGS, tokenize
from training.picturebook.world.scenes import caption_of, make_scene


class Killed(Exception):
    pass


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(16, 16)
        self.narrow = nn.Linear(16, 1)
        self.kill_at = -1
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed
        loss: Tensor = (self.narrow(torch.tanh(self.wide(x))) - y).square().mean()
        return loss


def a_batch(number: int, n: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(n, 16, generator=generator)
    return {"x": x, "y": x[:, :1] * x[:, 1:2]}


class RegressionTask:
    name = "regression"
    draws_on_device = False
    compiled: Sequence[nn.Module] = ()

    def __init__(self, kill_at: int = -1) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Regression()
        self.model.kill_at = kill_at
        self.shown: list[Path] = []

    def batch_maker(self, n: int) -> Callable[[int], Batch]:
        return partial(a_batch, n=n)

    def show(self, model: nn.Module, path: Path) -> dict[str, float]:  # noqa: ARG002
        self.shown.append(path)
        return {"shown": 1.0}


CONFIG = LoopConfig(n_steps=12, batch_size=8, learning_rate=0.01, n_warmup=2)


def run(folder: Path, kill_at: int = -1, interval_s: float = 0) -> dict[str, Tensor]:
    train(RegressionTask(kill_at), CONFIG, folder, n_workers=0, checkpoint_interval_s=interval_s, log_every=4)
    return load_file(folder / "regression" / "ema.safetensors")


@pytest.mark.parametrize("on_device", [False, True])
def test_a_killed_run_ends_where_an_unbroken_one_does(
    on_device: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RegressionTask, "draws_on_device", on_device)
    unbroken = run(tmp_path / "unbroken")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=7)
    resumed = run(tmp_path / "killed")
    for name, value in unbroken.items():
        assert torch.equal(value, resumed[name])


def test_a_kill_while_a_checkpoint_is_written_loses_only_that_one(tmp_path: Path) -> None:
    unbroken = run(tmp_path / "unbroken")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=7)
    folder = tmp_path / "killed" / "regression"
    # As left by a kill between the two renames, with half a newer one beside it.
    shutil.rmtree(folder / "checkpoint.old")
    (folder / "checkpoint").rename(folder / "checkpoint.old")
    (folder / "checkpoint.part").mkdir()
    (folder / "checkpoint.part" / "model.safetensors").write_bytes(b"half")
    resumed = run(tmp_path / "killed")
    for name, value in unbroken.items():
        assert torch.equal(value, resumed[name])


def test_the_averaged_weights_are_shown_and_the_trained_ones_kept(tmp_path: Path) -> None:
    task = RegressionTask()
    train(task, CONFIG, tmp_path, n_workers=0, checkpoint_interval_s=1e9, log_every=4)
    assert [path.name for path in task.shown] == ["step-000012.webp"]
    averaged = load_file(tmp_path / "regression" / "ema.safetensors")
    trained = load_file(tmp_path / "regression" / "checkpoint" / "model.safetensors")
    assert torch.equal(task.model.state_dict()["wide.weight"], trained["wide.weight"])
    assert not torch.equal(averaged["wide.weight"], trained["wide.weight"])


def test_the_average_is_the_weighted_mean_computed_by_hand() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    weight, norm = model[0].weight.data, model[1]
    weight.fill_(1.0)
    ema = averaged(model, decay=0.5)
    weight.fill_(3.0)
    norm.running_mean.fill_(4.0)
    norm.num_batches_tracked.fill_(7)
    ema.update_parameters(model)  # early: one tenth of the old
    assert ema.module[0].weight.item() == pytest.approx(0.1 * 1 + 0.9 * 3)
    assert ema.module[1].running_mean.item() == pytest.approx(0.9 * 4)
    assert ema.module[1].num_batches_tracked.item() == 7
    ema.n_averaged.fill_(1001)
    weight.fill_(2.0)
    ema.update_parameters(model)
    assert ema.module[0].weight.item() == pytest.approx(0.5 * 2.8 + 0.5 * 2)


def test_a_checkpoint_of_other_optimisers_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "regression", Checkpoint(1, {}, {"model": {"w": torch.zeros(1)}}))
    with pytest.raises(ValueError, match=r"optimizers was None, now .*muon"):
        run(tmp_path)


TINY = DenoiserConfig(block_out_channels=(16, 32), n_heads=(1, 1), text_width=16, text_layers=1)


class ADenoiser(DenoiserTask):
    def show(self, model: nn.Module, path: Path) -> dict[str, float]:  # noqa: ARG002 (costs more than the steps)
        return {}


def a_denoiser() -> DenoiserTask:
    """A tiny one, on latents that its captions say something of."""
    captions = [caption_of(make_scene(seed)) for seed in range(64)]
    tokens = tokenize([caption.text for caption in captions])[:, None].expand(-1, WORDINGS, -1).short()
    generator = torch.Generator().manual_seed(0)
    latents = 0.3 * torch.randn(64, 2, 4, 4, generator=generator)
    latents += torch.tensor([float(caption.background_first) for caption in captions])[:, None, None, None]
    data = Latents(latents.half(), tokens, torch.zeros(64, 4, 4, dtype=torch.uint8))
    torch.manual_seed(0)
    return ADenoiser(TINY, data, data, draw=lambda _: Image.new("RGB", (1, 1)))


def losses(folder: Path, config: LoopConfig, task: DenoiserTask) -> list[float]:
    train(task, config, folder, n_workers=0, checkpoint_interval_s=1e9, log_every=1)
    lines = map(json.loads, (folder / "denoiser" / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_the_loss_is_that_of_batches_made_ahead_and_matrices_stepped_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoopConfig(n_steps=10, batch_size=8, learning_rate=0.01, n_warmup=1)
    drawn = losses(tmp_path / "drawn", config, a_denoiser())
    monkeypatch.setattr(DenoiserTask, "draws_on_device", False)
    monkeypatch.setattr(loop, "Muon", OneByOne)
    ahead = losses(tmp_path / "ahead", config, a_denoiser())
    assert drawn == pytest.approx(ahead, rel=0.01)
    assert sum(drawn[-3:]) < 0.9 * sum(drawn[:3])  # there was something to learn


@pytest.fixture
def compiled_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as on a GPU, and run by torch itself: generating code takes minutes."""
    monkeypatch.setattr(loop, "_compiles_on", lambda _: True)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))


@pytest.mark.usefixtures("compiled_by_torch")
def test_compiling_takes_no_step(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    task = RegressionTask()
    task.compiled = (task.model.get_submodule("wide"),)
    train(task, replace(CONFIG, compile=True), tmp_path, n_workers=0, checkpoint_interval_s=0, log_every=4)
    assert task.compiled[0]._compiled_call_impl is not None
    assert task.model.calls == CONFIG.n_steps + 1  # type: ignore[union-attr]
    for name, value in load_file(tmp_path / "regression" / "ema.safetensors").items():
        torch.testing.assert_close(value, plain[name])


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_by_torch")
def test_a_compiled_unet_learns_the_same_and_is_stored_the_same(tmp_path: Path) -> None:
    config = LoopConfig(n_steps=3, batch_size=8, learning_rate=0.005, n_warmup=2)
    plain = losses(tmp_path / "plain", config, a_denoiser())
    compiled = losses(tmp_path / "compiled", replace(config, compile=True), a_denoiser())
    assert compiled == pytest.approx(plain, rel=0.01)
    names = [set(load_file(tmp_path / kind / "denoiser" / "ema.safetensors")) for kind in ("plain", "compiled")]
    assert names[0] == names[1]
