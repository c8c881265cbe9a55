"""One training loop for all small models here: accelerate, bf16 autocast, EMA, checkpoints that survive any kill.

A `Task` says what a batch is, what the loss is, and what to show; the loop does the rest. Batches are functions of the
step alone, so that a run that was killed and resumed sees the batches that it would have seen.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from core.files import write_atomically
from training.common.checkpoint import Checkpoint, load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from training.picturebook.models.muon import Muon

Batch = dict[str, Tensor]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast a model is trained."""

    n_steps: int
    """Optimiser steps."""
    batch_size: int
    """Samples a step, over all processes."""
    learning_rate: float
    """Peak learning rate: reached after the warm-up, kept, and brought to zero at the end."""
    n_warmup: int = 200
    """Steps of linear warm-up."""
    lr_decay_fraction: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the ones that are kept; smaller in the first steps."""
    weight_decay: float = 0.01
    """Weight decay of the matrices and kernels."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""


class Task(Protocol):
    """What is trained. Its `model` computes the loss inside `forward`, so that several processes stay correct."""

    name: str
    """Name of the run's folder."""
    model: nn.Module
    """Called with a batch's entries by name, returns a scalar loss."""

    def batch_maker(self, n: int) -> "Callable[[int], Batch]":
        """A picklable function from a number to a batch of `n` samples."""
        ...

    def show(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Measure the averaged model, write a picture of what it does to `path`, return the figures."""
        ...


def train(task: Task, config: LoopConfig, folder: Path, *, n_workers: int, every: float, log_every: int = 20) -> None:
    """Train `task` and leave its averaged weights in `folder/<name>/ema.safetensors`.

    Args:
        task: What to train.
        config: How.
        folder: The run's folder; a checkpoint in it is resumed.
        n_workers: Processes that make batches; 0 makes them in a thread.
        every: Seconds between checkpoints; with each comes a picture of what the model does.
        log_every: Steps between log lines, the only ones at which the device is waited for.
    """
    folder = folder / task.name
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16")
    model = task.model.to(accelerator.device)
    ema = Ema(model, config.ema_decay)
    optimizer = _optimizer(model, config)
    step = _resume(folder, model, ema, optimizer)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    n_local = config.batch_size // accelerator.num_processes
    maker = task.batch_maker(n_local)
    rank, world = accelerator.process_index, accelerator.num_processes
    numbers = iter(range(step * world + rank, config.n_steps * world, world))
    started, since, first = time.monotonic(), time.monotonic(), step
    total = torch.zeros((), device=accelerator.device)
    for batch in _prefetch(maker, numbers, n_workers):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _lr_factor(step, config)
        loss = prepared(**{key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()})
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        prepared_optimizer.step()
        prepared_optimizer.zero_grad(set_to_none=True)
        ema.update(model, step)
        total += loss.detach()
        step += 1
        if step % log_every == 0 and accelerator.is_main_process:
            pace = (step - first) / (time.monotonic() - started)
            # The one place that waits for the device.
            _log(folder, step, total.item() / log_every, pace, config)
            total.zero_()
        if accelerator.is_main_process and (time.monotonic() - since > every or step == config.n_steps):
            tensors = {"model": model.state_dict(), "ema": ema.weights, "optimizer": optimizer_tensors(optimizer)}
            save_checkpoint(folder, Checkpoint(step, {}, tensors))
            _show(task, ema, model, folder, step, config)
            since = time.monotonic()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with write_atomically(folder / "ema.safetensors") as part:
            save_file(ema.weights, part)


class Ema:
    """Exponential moving average of a model's parameters and buffers."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` (counted from 0)."""
        # Early on, average over the last tenth of the steps: the first weights are not worth remembering.
        decay = min(self.decay, (1 + step) / (10 + step))
        floats = [(mine, new) for mine, new in zip(self.weights.values(), model.state_dict().values(), strict=True)]
        for mine, new in floats:
            if mine.is_floating_point():
                mine.lerp_(new, 1 - decay)
            else:
                mine.copy_(new)


def _optimizer(model: nn.Module, config: LoopConfig) -> Muon:
    """Muon for what maps many channels to many; AdamW for vectors, embeddings, and the first and last layers."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    wide = [p for p in model.parameters() if p.ndim > 1 and min(p.shape[:2]) > 8 and id(p) not in embeddings]
    ids = {id(p) for p in wide}
    rest = [p for p in model.parameters() if id(p) not in ids]
    groups: list[dict[str, Any]] = [
        {"params": wide, "muon": True, "weight_decay": config.weight_decay},
        {"params": rest},
    ]
    return Muon(groups, lr=config.learning_rate)


def _lr_factor(step: int, config: LoopConfig) -> float:
    warm = min(1.0, (step + 1) / max(config.n_warmup, 1))
    left = (config.n_steps - step) / max(config.lr_decay_fraction * config.n_steps, 1)
    return min(warm, left, 1.0)


def _prefetch(maker: Callable[[int], Batch], numbers: Iterator[int], n_workers: int) -> Iterator[Batch]:
    """Batches in order, a few of them made ahead while the last one is used."""
    pool: Executor
    if n_workers:
        pool = ProcessPoolExecutor(
            n_workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
    else:
        pool = ThreadPoolExecutor(1)
    with pool:
        ahead: list[Future[Batch]] = [pool.submit(maker, n) for n in islice(numbers, 2 * n_workers + 2)]
        while ahead:
            batch = ahead.pop(0).result()
            ahead += [pool.submit(maker, n) for n in islice(numbers, 1)]
            yield batch


def _resume(folder: Path, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest whole checkpoint into the three; the step to go on from, 0 without one."""
    # Of any recipe: a run may be made longer, or its rate changed, while it goes on.
    found = load_checkpoint(folder, {})
    if found is None:
        return 0
    model.load_state_dict(found.tensors["model"])
    for name, value in found.tensors["ema"].items():
        ema.weights[name].copy_(value)
    load_optimizer(optimizer, found.tensors["optimizer"])
    logger.info("%s: resumed at step %d", folder.name, found.step)
    return found.step


def _log(folder: Path, step: int, loss: float, pace: float, config: LoopConfig) -> None:
    left = (config.n_steps - step) / pace / 60
    logger.info(
        "%s: step %d of %d, loss %.4f, %.0f samples a second, %.0f minutes left",
        *(folder.name, step, config.n_steps, loss, pace * config.batch_size, left),
    )
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": loss, "samples": step * config.batch_size}) + "\n")


def _show(task: Task, ema: Ema, model: nn.Module, folder: Path, step: int, config: LoopConfig) -> None:
    """Let the task measure and draw with the averaged weights, and put the trained ones back."""
    trained = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(ema.weights)
    model.eval()
    try:
        with torch.no_grad():
            figures = task.show(model, folder / f"step-{step:06d}.webp")
    finally:
        model.load_state_dict(trained)
        model.train()
    logger.info("%s: %s", folder.name, ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "samples": step * config.batch_size, **figures}) + "\n")
