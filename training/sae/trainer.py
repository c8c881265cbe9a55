"""The training loop for many SAEs on one stream of activations: steps, logging, checkpoints.

Batches are functions of their number and the loop has no randomness of its own, so a killed and resumed run takes the
same steps as an unbroken one, to the bit on a CPU.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, LoggerType

from core.files import write_text
from core.sae.autoencoder import SaeId, SparseAutoencoder
from training.common.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_optimizer,
    load_scaler,
    optimizer_tensors,
    save_checkpoint,
    scaler_tensors,
)
from training.common.learning_rate import warmup_stable_decay
from training.common.processes import joined_accelerator
from training.sae.bank import Figures, Moments, SaeBank, TrainerConfig
from training.sae.finite import FinitenessCheck
from training.sae.stream import StreamBatch

LOG = "log.jsonl"
"""File of a run's metrics, one line per synchronisation."""

logger = logging.getLogger(__name__)


class Stream(Protocol):
    """A source of batches: functions of their number, equally many for every process."""

    def batches(self, start: int = 0) -> Iterator[StreamBatch]:
        """Batches from number `start` on."""
        ...

    def d_in(self, hookpoint: str) -> int:
        """Channels of a hookpoint's update."""
        ...


@dataclass(frozen=True)
class SaeRun:
    """Folder, checkpoints and logging of a run. None of this changes its results."""

    folder: Path
    """Folder of its checkpoint and log; a checkpoint in it is resumed."""
    checkpoint_interval_s: float = 300
    """Least seconds between checkpoints."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate that metrics are also logged to: tensorboard, trackio, wandb..."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """JSON: everything that the stream depends on. A checkpoint of another recipe is an error."""


def train_saes(
    stream: Stream, ids: Sequence[SaeId], config: TrainerConfig, run: SaeRun, accelerator: Accelerator
) -> dict[SaeId, SparseAutoencoder]:
    """Train an SAE for each of `ids`; those returned take unscaled activations.

    `accelerator` comes from `make_accelerator` with the same configuration; the caller ends it.

    Raises:
        ValueError: The configuration is impossible, or the checkpoint in the run's folder has another recipe.
        NotFiniteError: Activations are NaN or infinite; the message names the prompt.
        OSError: A checkpoint could not be written; the last one is whole.
    """
    recipe = {
        **run.recipe,
        "training": asdict(config),
        "saes": [i.path for i in ids],
        "n_processes": accelerator.num_processes,
    }
    bank = SaeBank({i: stream.d_in(i.hookpoint) for i in ids}, config).to(accelerator.device)
    optimizer = torch.optim.Adam(bank.parameters(), lr=config.learning_rate, fused=True)
    batches, step = _start(stream, bank, optimizer, config, run, recipe, accelerator)
    schedule = warmup_stable_decay(optimizer, config.n_steps, config.n_warmup, config.lr_decay_fraction, step=step)
    prepared, prepared_optimizer = accelerator.prepare(bank, optimizer)
    watch, pace, since = FinitenessCheck(), _Pace(step), time.monotonic()
    while step < config.n_steps:
        for batch in islice(batches, config.gradient_accumulation_steps):
            samples = [batch.samples[i].to(accelerator.device, non_blocking=True) for i in ids]
            watch.add(batch, ids, samples)
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(samples))
                if accelerator.sync_gradients:
                    bank.before_step()
                prepared_optimizer.step()
                prepared_optimizer.zero_grad()
            pace.n_samples += accelerator.num_processes * sum(len(x) for x in samples)
        bank.after_step()
        schedule.step()
        step += 1
        if step % config.sync_every == 0 or step == config.n_steps:
            # The only place that synchronises with the device and, gradients aside, with the other processes.
            watch.check()
            figures = _sync(bank, accelerator)
            _log(accelerator, run.folder, step, figures, config, pace)
            if accelerator.is_main_process and (
                time.monotonic() - since >= run.checkpoint_interval_s or step == config.n_steps
            ):
                tensors = {"model": bank.state_dict(), "optimizer": optimizer_tensors(optimizer)}
                if accelerator.scaler is not None:
                    tensors["scaler"] = scaler_tensors(accelerator.scaler)
                save_checkpoint(run.folder, Checkpoint(step, recipe, tensors))
                since = time.monotonic()
    accelerator.wait_for_everyone()
    return {
        i: state.sae.for_unscaled_input(state.scale.item()).cpu().eval().requires_grad_(False)
        for i, state in bank.items()
    }


def make_accelerator(config: TrainerConfig, run: SaeRun) -> Accelerator:
    """The `Accelerator` for a configuration, with the run's trackers.

    Raises:
        ValueError: A tracker is unknown or not installed, processes cannot be joined, or the device lacks the
            precision.
    """
    known = [name.value for name in LoggerType if name != LoggerType.ALL]
    if unknown := [name for name in run.trackers if name not in known]:
        raise ValueError(f"There is no tracker {', '.join(unknown)}; there are {', '.join(known)}.")
    accelerator = joined_accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=list(run.trackers) or None,
        project_dir=run.folder,
        # Counters differ between processes until they are reduced.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if missing := set(run.trackers) - {str(getattr(name, "value", name)) for name in accelerator.log_with}:
        raise ValueError(
            f"The tracker {', '.join(sorted(missing))} is not installed; `pip install` it, or leave it out."
        )
    if run.trackers:
        accelerator.init_trackers("sae", config={"training": json.dumps(asdict(config))})
    return accelerator


# --- starting, and starting again -------------------------------------------------------------------------------------


def _start(
    stream: Stream,
    bank: SaeBank,
    optimizer: torch.optim.Optimizer,
    config: TrainerConfig,
    run: SaeRun,
    recipe: Mapping[str, Any],
    accelerator: Accelerator,
) -> tuple[Iterator[StreamBatch], int]:
    """Load the checkpoint or measure the inputs; returns the remaining batches and the number of steps done."""
    found = load_checkpoint(run.folder, recipe)
    if accelerator.is_main_process:
        _cut_log(run.folder, found.step if found else 0)
    accelerator.wait_for_everyone()
    if found is None:
        batches = _checked(stream.batches(0), bank.ids)
        first = list(islice(batches, config.n_calibration_batches))
        for sae_id, state in bank.items():
            state.start_from(_measure(first, sae_id, accelerator), sae_id.path)
        return chain(first, batches), 0
    bank.load_state_dict(found.tensors["model"])
    load_optimizer(optimizer, found.tensors["optimizer"])
    if accelerator.scaler is not None:
        load_scaler(accelerator.scaler, found.tensors["scaler"])
    for _, state in bank.items():
        state.update_dead_latents()
    logger.info("resumed at step %d of %d", found.step, config.n_steps)
    return _checked(stream.batches(found.step * config.gradient_accumulation_steps), bank.ids), found.step


def _checked(batches: Iterator[StreamBatch], ids: Sequence[SaeId]) -> Iterator[StreamBatch]:
    """The batches, checked to have samples for every SAE."""
    number = -1
    for batch in batches:
        if missing := [i.path for i in ids if i not in batch.samples]:
            raise ValueError(f"Batch {batch.number} of the stream has no samples for {', '.join(missing)}.")
        number = batch.number
        yield batch
    raise ValueError(f"The stream ended after batch {number}; training needs more.")


def _measure(batches: Sequence[StreamBatch], sae_id: SaeId, accelerator: Accelerator) -> Moments:
    """Moments of an SAE's inputs over these batches of all processes."""
    watch, sums = FinitenessCheck(), Moments(*torch.zeros(3, dtype=torch.float64))
    for batch in batches:
        watch.add(batch, [sae_id], [batch.samples[sae_id]])
        x = batch.samples[sae_id].cpu().double()  # not every device has float64
        sums = Moments(sums.n + len(x), sums.total + x.sum(0), sums.squares + x.square().sum())
    watch.check()
    if accelerator.num_processes == 1:
        return sums
    return Moments(*(accelerator.reduce(value.to(accelerator.device), reduction="sum").cpu() for value in sums))


# --- on the way -------------------------------------------------------------------------------------------------------


@dataclass
class _Pace:
    """Speed since this start of the run."""

    first_step: int
    started: float = field(default_factory=time.monotonic)
    n_samples: int = 0
    """Samples of all SAEs and processes."""


def _sync(bank: SaeBank, accelerator: Accelerator) -> dict[SaeId, Figures]:
    """Reduce the counters over the processes, update the dead latents, return the metrics."""
    figures = {}
    for sae_id, state in bank.items():
        if accelerator.num_processes > 1:
            # A latent's last firing is the latest one in any process.
            steps_since_fired = accelerator.gather(state.steps_since_fired).reshape(accelerator.num_processes, -1)
            state.steps_since_fired.copy_(steps_since_fired.min(0).values)
            state.sums.copy_(accelerator.reduce(state.sums, reduction="sum"))
            if state.sae.threshold is not None:
                state.sae.threshold.copy_(accelerator.reduce(state.sae.threshold, reduction="mean"))
        state.update_dead_latents()
        figures[sae_id] = state.take_figures()
    return figures


def _log(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    figures: Mapping[SaeId, Figures],
    config: TrainerConfig,
    pace: _Pace,
) -> None:
    if not accelerator.is_main_process:
        return
    mean = Figures(*(sum(column) / len(figures) for column in zip(*figures.values(), strict=True)))
    seconds = time.monotonic() - pace.started
    left = (config.n_steps - step) / (step - pace.first_step) * seconds / 60
    logger.info(
        "step %d of %d: fvu %.4f, L0 %.1f, dead %.1f %% (means of %d); %.0f samples a second, %.0f minutes left",
        *(step, config.n_steps, mean.fvu, mean.l0, 100 * mean.dead, len(figures), pace.n_samples / seconds, left),
    )
    line = {"step": step, "saes": {sae_id.path: value._asdict() for sae_id, value in figures.items()}}
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    named = {f"{i.path}/{name}": value for i, values in figures.items() for name, value in values._asdict().items()}
    accelerator.log(named, step=step)


def last_figures(folder: Path) -> dict[str, Any]:
    """The last figures in a run's log, by path of the SAE; empty if its log is lost or damaged."""
    lines = _lines_of(folder / LOG)
    saes: dict[str, Any] = lines[-1][1]["saes"] if lines else {}
    return saes


def _cut_log(folder: Path, step: int) -> None:
    """Drop lines logged after the checkpoint, which will be logged again, and lines that a kill or a disk damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / LOG, "".join(line for line, logged in _lines_of(folder / LOG) if logged["step"] <= step))


def _lines_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines of a log, each as it is and as JSON."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            text = line.decode("utf-8")
            logged = json.loads(text)
            if text.endswith("\n") and type(logged["step"]) is int and isinstance(logged["saes"], dict):
                found.append((text, logged))
                continue
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        logger.warning("a line of %s is damaged or cut short, and is left out", path)
    return found
