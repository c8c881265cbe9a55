import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import accelerate.tracking
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.sae.autoencoder import SaeId, SparseAutoencoder
from training.common import checkpoint
from training.common.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from training.sae.bank import Moments, SaeTrainState, TrainerConfig
from training.sae.finite import NotFiniteError
from training.sae.stream import StreamBatch
from training.sae.trainer import SaeRun, last_figures, make_accelerator, train_saes

FIRST, SECOND = SaeId("mid_block.attentions.0", "cond", "all"), SaeId("up_blocks.1.attentions.0", "uncond", 0.5)
CONFIG = TrainerConfig(
    n_steps=12,
    k=2,
    expansion=2,
    learning_rate=0.01,
    n_warmup=2,
    n_calibration_batches=2,
    sync_every=2,
    k_aux=4,
    dead_after_fraction=0.2,
)


class Killed(BaseException):
    pass


class Planted:
    """Few of some unit directions at a time, on top of a mean: what an SAE has to find."""

    def __init__(self, n: int = 48, d_in: int = 8, n_features: int = 12, ids: tuple[SaeId, ...] = (FIRST, SECOND)):
        self.n, self._d_in, self.ids = n, d_in, ids
        generator = torch.Generator().manual_seed(0)
        self.features = torch.nn.functional.normalize(torch.randn(n_features, d_in, generator=generator), dim=1)
        self.mean = 3 * torch.randn(d_in, generator=generator)
        self.rank, self.world = 0, 1
        self.spoil: Callable[[int, dict[SaeId, Tensor]], None] = lambda *_: None
        self.started_at: list[int] = []

    def d_in(self, hookpoint: str) -> int:  # noqa: ARG002
        return self._d_in

    def samples(self, number: int, which: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * which + number)
        n_features = len(self.features)
        chosen = torch.rand(self.n, n_features, generator=generator).topk(2).indices
        values = 1 + torch.rand(self.n, 2, generator=generator)
        code = torch.zeros(self.n, n_features).scatter(1, chosen, values)
        return (7.0 * (code @ self.features + self.mean))[self.rank :: self.world]

    def batches(self, start: int = 0) -> Iterator[StreamBatch]:
        self.started_at.append(start)
        number = start
        while True:
            samples = {sae_id: self.samples(number, which) for which, sae_id in enumerate(self.ids)}
            self.spoil(number, samples)
            yield StreamBatch(number, samples, tuple(f"prompt {number}-{i}" for i in range(4)))
            number += 1


@pytest.fixture(autouse=True)
def accelerate_forgets() -> Iterator[None]:
    """Its state is one for the process; these tests want theirs in another precision than others do."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(stream: Any, ids: tuple[SaeId, ...], config: TrainerConfig, run: SaeRun) -> dict[SaeId, SparseAutoencoder]:
    return train_saes(stream, ids, config, run, make_accelerator(config, run))


def run(folder: Path, config: TrainerConfig = CONFIG, stream: Any = None, interval_s: float = 0) -> dict[str, Tensor]:
    """All weights of a finished run, and its figures."""
    saes = train(stream or Planted(), (FIRST, SECOND), config, SaeRun(folder, checkpoint_interval_s=interval_s))
    weights = {f"{i.path}.{name}": value for i, sae in saes.items() for name, value in sae.state_dict().items()}
    assert all(value.isfinite().all() for value in weights.values())
    return weights


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["topk", pytest.param("batchtopk", marks=pytest.mark.slow)])
def test_planted_features_are_found(tmp_path: Path, architecture: Any) -> None:
    stream = Planted(n=256, d_in=16, n_features=24, ids=(FIRST,))
    config = replace(CONFIG, n_steps=400, expansion=3, architecture=architecture, sync_every=50, n_warmup=10)
    saes = train(stream, (FIRST,), config, SaeRun(tmp_path))
    sae = saes[FIRST]
    found = (stream.features @ sae.W_dec.T).max(1).values
    assert (found > 0.9).float().mean() > 0.8
    x = stream.samples(10**6, 0)  # unscaled, and held out
    rebuilt = sae.decode(sae.encode(x))
    fvu = (x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.1
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["saes"][FIRST.path]
    assert last["fvu"] == pytest.approx(fvu.item(), abs=0.03)
    assert last["l0"] == pytest.approx(2, abs=0.05)


def test_auxk_revives_latents_that_would_stay_dead() -> None:
    stream = Planted(n=128)
    silent_in_the_end = dict.fromkeys((0.0, 1 / 4), 0)
    for aux_weight, seed in itertools.product(silent_in_the_end, range(2)):
        config = replace(CONFIG, n_steps=150, aux_weight=aux_weight, dead_after_fraction=0.02, seed=seed)
        state = SaeTrainState(FIRST, 8, config)
        x = stream.samples(0, 0).double()
        state.start_from(Moments(torch.tensor(128), x.sum(0), x.square().sum()), "it")
        with torch.no_grad():  # 6 latents are left for 12 features; the others are never among the largest
            state.sae.encoder.weight[:10] *= 0.1
        optimizer = torch.optim.Adam(state.parameters(), lr=0.01)
        for number in range(config.n_steps):
            state(stream.samples(number, 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
            state.sae.normalize_decoder()
            state.update_dead_latents()
        silent_in_the_end[aux_weight] += state.n_dead
    assert silent_in_the_end[0.0] >= 2 * 4
    assert silent_in_the_end[1 / 4] <= 0.75 * silent_in_the_end[0.0]


def test_each_sae_learns_as_it_would_alone(tmp_path: Path) -> None:
    both = run(tmp_path / "both")
    alone = train(Planted(ids=(FIRST,)), (FIRST,), CONFIG, SaeRun(tmp_path / "alone"))[FIRST]
    for name, value in alone.state_dict().items():
        assert torch.equal(value, both[f"{FIRST.path}.{name}"])


def test_accumulating_two_batches_is_a_step_on_both(tmp_path: Path) -> None:
    class Doubled(Planted):
        def samples(self, number: int, which: int) -> Tensor:
            return torch.cat([super(Doubled, self).samples(2 * number + i, which) for i in range(2)])

    config = replace(CONFIG, precision="no", n_steps=3, n_calibration_batches=1, aux_weight=0)
    one = run(tmp_path / "one", config, Doubled())
    two = run(tmp_path / "two", replace(config, gradient_accumulation_steps=2, n_calibration_batches=2))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)


def test_the_inputs_are_scaled_and_centred_by_what_was_measured() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    state = SaeTrainState(FIRST, 2, replace(CONFIG, k=1))
    state.start_from(Moments(torch.tensor(2.0), x.sum(0), x.square().sum()), "it")
    # Mean square over samples and channels 30 / 4; mean (2, 3); each sample (1, 1) from it, squared 2.
    assert state.scale.item() == pytest.approx((4 / 30) ** 0.5)
    assert state.total_variance.item() == pytest.approx(2 * 4 / 30)
    assert state.sae.b_dec.tolist() == pytest.approx([2 * (4 / 30) ** 0.5, 3 * (4 / 30) ** 0.5])
    with pytest.raises(ValueError, match="it do not vary"):
        state.start_from(Moments(torch.tensor(2.0), torch.ones(2) * 2, torch.tensor(4.0)), "it")


def test_the_longest_silent_latents_are_chosen_and_no_more_than_half_of_d_in() -> None:
    state = SaeTrainState(FIRST, 8, replace(CONFIG, n_steps=100, dead_after_fraction=0.05, k_aux=100))
    state.update_dead_latents()
    assert state.dead is None
    state.steps_since_fired.copy_(torch.arange(16))
    state.update_dead_latents()
    assert state.n_dead == 10  # more than 5 batches
    assert state.dead is not None
    assert state.dead.tolist() == [15, 14, 13, 12]
    state(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)))
    fired = state.steps_since_fired == 0
    assert fired.any()
    assert torch.equal(state.steps_since_fired[~fired], torch.arange(16)[~fired] + 1)


# --- stopping and going on --------------------------------------------------------------------------------------------


def log_of(folder: Path) -> str:
    return (folder / "log.jsonl").read_text()


def test_a_run_killed_at_any_moment_of_saving_ends_where_an_unbroken_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = run(tmp_path / "unbroken")
    kills = 0
    for moment in range(100):  # kill at the n-th thing that saving does, and again at the next start's
        folder = tmp_path / f"killed-{moment}"
        for _ in range(2):
            with monkeypatch.context() as patch:
                _kill_at(patch, moment)
                try:
                    run(folder)
                except Killed:
                    kills += 1
                    _forget()
        resumed = run(folder)
        _forget()
        assert same(unbroken, resumed), moment
        assert log_of(folder) == log_of(tmp_path / "unbroken")
        shutil.rmtree(folder)
        if moment > 3 * _STEPS_OF_SAVING:
            break
    assert kills > 2 * _STEPS_OF_SAVING


_STEPS_OF_SAVING = 7
"""Two files, one text, one or two renames, and the removals."""


def _kill_at(patch: pytest.MonkeyPatch, moment: int) -> None:
    """Kill in the middle of the `moment`-th file operation of saving: half a file, half a folder."""
    count = [0]

    def due() -> bool:
        count[0] += 1
        return count[0] - 1 == moment

    def save_file(tensors: dict[str, Tensor], path: Path) -> None:
        originals["save_file"](tensors, path)
        if due():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise Killed

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.exists() and due():
            next(path.iterdir()).unlink()
            raise Killed
        originals["rmtree"](path, ignore_errors=ignore_errors)

    def rename(self: Path, target: Path) -> Path:
        if due():
            raise Killed
        return originals["rename"](self, target)

    originals: dict[str, Any] = {
        "save_file": checkpoint.save_file,
        "rmtree": shutil.rmtree,
        "rename": Path.rename,
    }
    patch.setattr(checkpoint, "save_file", save_file)
    patch.setattr(checkpoint.shutil, "rmtree", rmtree)
    patch.setattr(Path, "rename", rename)


def test_a_kill_between_checkpoints_loses_only_what_came_after_the_last(tmp_path: Path) -> None:
    unbroken = run(tmp_path / "unbroken")

    def kill(number: int, _: dict[SaeId, Tensor]) -> None:
        if number == 7:
            raise Killed

    stream = Planted()
    stream.spoil = kill
    with pytest.raises(Killed):
        run(tmp_path / "killed", stream=stream)
    _forget()
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "saes": {}}\n{"step": 1')  # logged after the checkpoint, the last line cut short
    again = Planted()
    assert same(unbroken, run(tmp_path / "killed", stream=again))
    assert again.started_at == [6]
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "unbroken")


@pytest.mark.parametrize(
    "damage", [b"", b"\xff\n", b"[]\n", b'{"step": "x", "saes": {}}\n', b"[" * 50_000 + b"\n", None]
)
def test_a_log_that_is_lost_or_damaged_ends_no_run(tmp_path: Path, damage: bytes | None) -> None:
    first = run(tmp_path)
    lines = log_of(tmp_path)
    if damage is None:
        (tmp_path / "log.jsonl").unlink()
    else:
        whole = (tmp_path / "log.jsonl").read_bytes()
        (tmp_path / "log.jsonl").write_bytes(damage + whole)
    _forget()
    assert same(first, run(tmp_path))
    assert log_of(tmp_path) == ("" if damage is None else lines)
    assert last_figures(tmp_path) == ({} if damage is None else json.loads(lines.splitlines()[-1])["saes"])


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    before = log_of(tmp_path)
    assert same(first, run(tmp_path))
    assert log_of(tmp_path) == before


@pytest.mark.slow  # beside that of a run killed at any moment of saving, where an exception stands for the signal
def test_a_real_kill_is_survived(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from training.common import checkpoint\n"
        "from tests.training.sae.test_trainer import run\n"
        "save, calls = checkpoint.save_file, []\n"
        "def killed(tensors, path):\n"
        "    calls.append(path)\n"
        "    if len(calls) == 6: path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(tensors, path)\n"
        "checkpoint.save_file = killed\n"
        "run(Path(sys.argv[1]))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")], cwd=root, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint.part").exists()
    assert same(run(tmp_path / "unbroken"), run(tmp_path / "killed"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = run(tmp_path / "unbroken")
    original, calls = checkpoint.save_file, []

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 6:
            path.write_bytes(b"as much as there was room for")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match=r"step 6 could not be written.*No space left.*make room"):
            run(tmp_path / "full")
    _forget()
    assert not (tmp_path / "full" / "checkpoint.part").exists()  # which would fill the disk on
    assert json.loads((tmp_path / "full" / "checkpoint" / "state.json").read_text())["step"] == 4
    assert same(unbroken, run(tmp_path / "full"))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, n_steps=2))
    _forget()
    with pytest.raises(ValueError, match=r"another recipe: training\.n_steps was 2, now 12; training\.k was 2, now 3"):
        run(tmp_path, replace(CONFIG, k=3))
    _forget()
    with pytest.raises(ValueError, match="stream was None, now 3"):
        train(Planted(), (FIRST, SECOND), replace(CONFIG, n_steps=2), SaeRun(tmp_path, recipe={"stream": 3}))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(3, {"a": (1, 2)}, {"model": {"w": torch.arange(3.0)}}))
    found = load_checkpoint(tmp_path, {"a": (1, 2)})  # a tuple is JSON's list
    assert found is not None
    assert (found.step, found.tensors["model"]["w"].tolist()) == (3, [0, 1, 2])
    path = tmp_path / "checkpoint" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(tmp_path, {"a": (1, 2)})
    assert load_checkpoint(tmp_path / "elsewhere", {}) is None


# --- what a user can get wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 3, 9])
def test_nan_stops_training_and_names_the_prompt(tmp_path: Path, number: int) -> None:
    def spoil(at: int, samples: dict[SaeId, Tensor]) -> None:
        if at == number:
            samples[SECOND][6, 3] = float("inf" if number % 3 else "nan")

    stream = Planted()
    stream.spoil = spoil
    with pytest.raises(NotFiniteError, match=rf"{SECOND.path} in batch {number} .*'prompt {number}-2'"):
        run(tmp_path, stream=stream)
    if (tmp_path / "checkpoint").exists():
        state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
        assert state["step"] <= number  # nothing that NaN has touched was kept


def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    stream = Planted()
    with pytest.raises(ValueError, match=r"k is 17.*d_sae = 16"):
        run(tmp_path, replace(CONFIG, k=17), stream)
    _forget()
    with pytest.raises(ValueError, match=r"k_by_hookpoint names mid; .* are mid_block\.attentions\.0, up"):
        run(tmp_path, replace(CONFIG, k_by_hookpoint={"mid": 1}), stream)
    _forget()
    with pytest.raises(ValueError, match="nothing"):
        make_accelerator(CONFIG, SaeRun(tmp_path, trackers=("nothing",)))
    with pytest.raises(ValueError, match="n_steps must be at least 1"):
        replace(CONFIG, n_steps=0)
    assert stream.started_at == []


class Noting(GeneralTracker):
    """A tracker that keeps what it is told."""

    name, requires_logging_directory = "noting", False
    told: ClassVar[list[tuple[Any, Any]]] = []

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @property
    def tracker(self) -> "Noting":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append((None, values))

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.told.append((step, values))


def test_a_tracker_is_told_the_configuration_and_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Noting)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    caplog.set_level("INFO")
    train(Planted(), (FIRST, SECOND), CONFIG, SaeRun(tmp_path, trackers=("tensorboard",)))
    (none, configuration), *figures = Noting.told
    assert none is None
    assert json.loads(configuration["training"])["n_steps"] == 12
    assert [step for step, _ in figures] == [2, 4, 6, 8, 10, 12]
    lines = [json.loads(line)["saes"] for line in log_of(tmp_path).splitlines()]
    assert [values[f"{FIRST.path}/fvu"] for _, values in figures] == [line[FIRST.path]["fvu"] for line in lines]
    assert "samples a second" in caplog.text
    assert "minutes left" in caplog.text


def test_a_stream_that_ends_or_lacks_an_sae_is_told(tmp_path: Path) -> None:
    class Short(Planted):
        def batches(self, start: int = 0) -> Iterator[StreamBatch]:
            for batch, _ in zip(super().batches(start), range(5), strict=False):
                yield batch

    with pytest.raises(ValueError, match="ended after batch 4"):
        run(tmp_path / "short", stream=Short())
    _forget()
    with pytest.raises(ValueError, match=f"Batch 0 .* no samples for {SECOND.path}"):
        run(tmp_path / "lacking", stream=Planted(ids=(FIRST,)))


# --- float16 ----------------------------------------------------------------------------------------------------------

_HALF = replace(CONFIG, precision="fp16")
_TOO_LARGE = 2.0**26
"""A loss scale with which the first steps overflow."""


def train_in_half(folder: Path, stream: Any = None, scale: float = 2.0**16) -> tuple[dict[str, Tensor], float]:
    """All weights of a run in float16, trained as on a GPU, and the loss scale at its end.

    Accelerate has no float16 on a CPU, which has all that it takes: autocast, and torch's own loss scaler.
    """
    _forget()
    accelerator = make_accelerator(replace(_HALF, precision="bf16"), SaeRun(folder))
    accelerator.state._mixed_precision = "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5)
    saes = train_saes(stream or Planted(), (FIRST, SECOND), _HALF, SaeRun(folder, checkpoint_interval_s=0), accelerator)
    weights = {f"{i.path}.{name}": value for i, sae in saes.items() for name, value in sae.state_dict().items()}
    return weights, accelerator.scaler.get_scale()


def test_training_in_float16_ends_where_training_in_float32_does(tmp_path: Path) -> None:
    half, scale = train_in_half(tmp_path / "half")
    assert scale == 2.0**18  # 12 steps, none skipped, and it grew twice
    _forget()
    single = run(tmp_path / "single", replace(CONFIG, precision="no"))
    _forget()
    start = run(
        tmp_path / "start", replace(CONFIG, precision="no", n_steps=1, n_calibration_batches=1, learning_rate=0.0)
    )
    for name, value in single.items():
        way = (value - start[name]).norm()
        assert way > 0
        assert (half[name] - value).norm() < 0.1 * way, name


def test_steps_that_overflow_are_skipped_and_change_nothing(tmp_path: Path) -> None:
    weights, scale = train_in_half(tmp_path, scale=_TOO_LARGE)
    assert all(value.isfinite().all() for value in weights.values())
    assert scale < _TOO_LARGE
    state = load_file(tmp_path / "checkpoint" / "optimizer.safetensors")
    (n_taken,) = {int(value) for name, value in state.items() if name.endswith(".step")}
    assert 4 <= n_taken <= 9  # Adam counts the steps that were taken, the schedule all of them
    lines = [json.loads(line) for line in log_of(tmp_path).splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    figures = [line["saes"][FIRST.path] for line in lines]
    assert figures[0]["fvu"] == pytest.approx(figures[1]["fvu"], rel=0.3)
    assert figures[-1]["fvu"] < figures[0]["fvu"]
    assert all(figure["l0"] == pytest.approx(2, abs=0.5) for figure in figures)


def test_a_run_in_float16_goes_on_with_its_loss_scale(tmp_path: Path) -> None:
    unbroken, scale = train_in_half(tmp_path / "unbroken", scale=_TOO_LARGE)

    def kill(number: int, _: dict[SaeId, Tensor]) -> None:
        if number == 9:
            raise Killed

    stream = Planted()
    stream.spoil = kill
    with pytest.raises(Killed):
        train_in_half(tmp_path / "killed", stream, scale=_TOO_LARGE)
    resumed, scale_resumed = train_in_half(tmp_path / "killed", scale=_TOO_LARGE)
    assert scale_resumed == scale < _TOO_LARGE
    assert same(unbroken, resumed)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "unbroken")


def test_float16_on_a_cpu_and_an_unknown_precision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training in fp16: set the precision to bf16 or no"):
        make_accelerator(_HALF, SaeRun(tmp_path))
    with pytest.raises(ValueError, match="no precision 'fp32'; there are bf16, fp16 and no"):
        replace(CONFIG, precision="fp32")


# --- several processes ------------------------------------------------------------------------------------------------

_PARALLEL = replace(CONFIG, precision="no", n_steps=4, dead_after_fraction=0.3, expansion=8)


def train_a_share(folder: Path) -> None:
    """What each of several processes runs."""
    accelerator = make_accelerator(_PARALLEL, SaeRun(folder))
    stream = Planted()
    stream.rank, stream.world = accelerator.process_index, accelerator.num_processes
    saes = train_saes(stream, (FIRST, SECOND), _PARALLEL, SaeRun(folder), accelerator)
    weights = {f"{i.path}.{name}": value for i, sae in saes.items() for name, value in sae.state_dict().items()}
    weights["n_processes"] = torch.tensor(torch.distributed.get_world_size())
    save_file(weights, folder / f"rank-{accelerator.process_index}.safetensors")
    # A process that ends with its group alive is now and then aborted on the way out.
    accelerator.wait_for_everyone()
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_the_doubled_batch(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "tests.training.sae.test_trainer", str(tmp_path / "two")]
    (tmp_path / "two").mkdir()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, timeout=280, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / "two" / f"rank-{rank}.safetensors") for rank in range(2))
    assert same(first, second)
    assert first.pop("n_processes") == 2
    one = run(tmp_path / "one", _PARALLEL)
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    logs = [json.loads(log_of(tmp_path / name).splitlines()[-1])["saes"][FIRST.path] for name in ("one", "two")]
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    assert logs[0]["dead"] > 0  # so the counters were put together


def test_the_saes_returned_are_ready_for_use(tmp_path: Path) -> None:
    saes = train(Planted(), (FIRST, SECOND), replace(CONFIG, k_by_hookpoint={SECOND.hookpoint: 3}), SaeRun(tmp_path))
    assert list(saes) == [FIRST, SECOND]
    assert [sae.cfg.k for sae in saes.values()] == [2, 3]
    assert all(isinstance(sae, SparseAutoencoder) and not sae.training for sae in saes.values())


if __name__ == "__main__":
    train_a_share(Path(sys.argv[1]))
