from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training.picturebook.models.loop import Batch, Ema, LoopConfig, _lr_factor, train


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


def run(folder: Path, kill_at: int = -1, every: float = 0) -> dict[str, Tensor]:
    train(RegressionTask(kill_at), CONFIG, folder, n_workers=0, every=every, log_every=4)
    return load_file(folder / "regression" / "ema.safetensors")


def test_a_killed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
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
    (folder / "checkpoint").rename(folder / "checkpoint.old")
    (folder / "checkpoint.part").mkdir()
    (folder / "checkpoint.part" / "model.safetensors").write_bytes(b"half")
    resumed = run(tmp_path / "killed")
    for name, value in unbroken.items():
        assert torch.equal(value, resumed[name])


def test_the_averaged_weights_are_shown_and_the_trained_ones_kept(tmp_path: Path) -> None:
    task = RegressionTask()
    train(task, CONFIG, tmp_path, n_workers=0, every=1e9, log_every=4)
    assert [path.name for path in task.shown] == ["step-000012.webp"]
    averaged = load_file(tmp_path / "regression" / "ema.safetensors")
    trained = load_file(tmp_path / "regression" / "checkpoint" / "model.safetensors")
    assert torch.equal(task.model.state_dict()["wide.weight"], trained["wide.weight"])
    assert not torch.equal(averaged["wide.weight"], trained["wide.weight"])


def test_ema_is_the_weighted_mean_computed_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = Ema(model, decay=0.5)
    model.weight.data.fill_(3.0)
    ema.update(model, 1000)
    assert ema.weights["weight"].item() == 2.0
    ema.update(model, 0)  # early: one tenth of the old
    assert ema.weights["weight"].item() == pytest.approx(0.1 * 2 + 0.9 * 3)


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    config = LoopConfig(n_steps=100, batch_size=1, learning_rate=1, n_warmup=10, lr_decay_fraction=0.5)
    factors = [_lr_factor(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == factors[50] == 1
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.02)
