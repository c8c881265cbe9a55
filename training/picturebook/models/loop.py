"""One training loop for all small models here: accelerate, bf16 autocast, EMA, checkpoints that survive any kill.

A `Task` defines batches, loss and evaluation. Batches are functions of the step alone, so that a resumed run sees the
batches that an unbroken one would have seen.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from core.files import write_atomically
from training.common.checkpoint import Checkpoint, load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from training.common.learning_rate import warmup_stable_decay
from training.picturebook.models.muon import Muon

Batch = dict[str, Tensor]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopConfig:
    """Length and optimiser settings of a training."""

    n_steps: int
    """Optimiser steps."""
    batch_size: int
    """Samples a step, over all processes."""
    learning_rate: float
    """Peak learning rate, after the warm-up and before the decay."""
    n_warmup: int = 200
    """Steps of linear warm-up."""
    lr_decay_fraction: float = 0.3
    """Fraction of the steps, at the end, over which the learning rate falls linearly to zero."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is what is exported; smaller in the first steps."""
    weight_decay: float = 0.01
    """Weight decay of hidden matrices and kernels."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    compile: bool = False
    """Whether what the task names is compiled where there is CUDA, for about a minute before the first step."""


class Task(Protocol):
    """What is trained. Its `model` computes the loss inside `forward`, as DistributedDataParallel requires."""

    name: str
    """Name of the run's folder."""
    model: nn.Module
    """Called with a batch's entries by name, returns a scalar loss."""
    draws_on_device: bool
    """Whether batches are drawn where the model is, quickly; others are made by processes ahead of their use."""
    compiled: Sequence[nn.Module]
    """The parts of the model that are worth compiling; always called with the same shapes."""

    def batch_maker(self, n: int) -> "Callable[[int], Batch]":
        """A picklable function from a number to a batch of `n` samples."""
        ...

    def show(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Evaluate the averaged model, write an image of what it does to `path`, return the metrics."""
        ...


@contextmanager
def _fast_kernels() -> Iterator[None]:
    """On CUDA, TensorFloat-32 and the fastest convolution for each shape; what follows keeps its precision."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@_fast_kernels()
def train(
    task: Task,
    config: LoopConfig,
    folder: Path,
    *,
    n_workers: int,
    checkpoint_interval_s: float,
    log_every: int = 20,
) -> None:
    """Train `task` and leave its averaged weights in `folder/<name>/ema.safetensors`.

    Args:
        task: Model, loss and data.
        config: Length and optimiser of the training.
        folder: Folder of all runs; a checkpoint in it is resumed.
        n_workers: Processes that make batches, if they are not drawn on the device; 0 makes them in a thread.
        checkpoint_interval_s: Least seconds between checkpoints; each comes with an image of what the model does.
        log_every: Steps between log lines; only there does the host wait for the device.
    """
    folder = folder / task.name
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16")
    model = task.model.to(accelerator.device)
    optimizers = _optimizers(model, config)
    prepared, *prepared_optimizers = accelerator.prepare(model, *optimizers.values())
    ema = averaged(model, config.ema_decay)  # a copy of the prepared model, so that it too runs under autocast
    step = _resume(folder, model, ema, optimizers)
    schedules = [
        warmup_stable_decay(optimizer, config.n_steps, config.n_warmup, config.lr_decay_fraction, step=step)
        for optimizer in optimizers.values()
    ]
    prepared.train()
    n_local = config.batch_size // accelerator.num_processes
    maker = task.batch_maker(n_local)
    rank, world = accelerator.process_index, accelerator.num_processes
    numbers = iter(range(step * world + rank, config.n_steps * world, world))
    batches = map(maker, numbers) if task.draws_on_device else _prefetch(maker, numbers, n_workers)

    def backward(batch: Batch) -> Tensor:
        loss: Tensor = prepared(**{key: v.to(accelerator.device, non_blocking=True) for key, v in batch.items()})
        accelerator.backward(loss)
        return loss

    if config.compile and _compiles_on(accelerator.device) and step < config.n_steps:
        for module in task.compiled:
            module.compile(dynamic=False)
        backward(maker(step * world + rank))  # compiles; nothing is stepped
        model.zero_grad()
    started, since, first = time.monotonic(), time.monotonic(), step
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        loss = backward(batch)
        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for optimizer, schedule in zip(prepared_optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        ema.update_parameters(model)
        total += loss.detach()
        step += 1
        if step % log_every == 0 and accelerator.is_main_process:
            pace = (step - first) / (time.monotonic() - started)
            # Only this waits for the device.
            _log(folder, step, total.item() / log_every, pace, config)
            total.zero_()
        if accelerator.is_main_process and (time.monotonic() - since > checkpoint_interval_s or step == config.n_steps):
            tensors = {"model": model.state_dict(), "ema": ema.module.state_dict()}
            tensors |= {name: optimizer_tensors(optimizer) for name, optimizer in optimizers.items()}
            save_checkpoint(folder, Checkpoint(step, _RECIPE, tensors))
            _show(task, ema.module, folder, step, config)
            since = time.monotonic()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        weights = {name: value.contiguous() for name, value in ema.module.state_dict().items()}
        with write_atomically(folder / "ema.safetensors") as part:
            save_file(weights, part)


def _compiles_on(device: torch.device) -> bool:
    return device.type == "cuda"


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model's parameters and buffers; integer buffers are copied.

    The decay of step s, from 0, is min(decay, (1 + s) / (10 + s)): early on, only the last tenth of the steps counts.
    """

    def average(mine: list[Tensor], new: list[Tensor], n_averaged: Tensor) -> None:
        step = int(ema.n_averaged) - 1  # on the host; the argument is a copy on the device, which would be waited for
        if mine[0].is_floating_point():
            average_of = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
            average_of(mine, new, n_averaged)
        else:
            for old, value in zip(mine, new, strict=True):
                old.copy_(value)

    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)  # type: ignore[arg-type]
    ema.n_averaged.fill_(1)  # the initial weights are the first; else the first update would replace them
    return ema.eval()


_RECIPE = {"optimizers": ["muon", "adamw"]}
"""What a checkpoint depends on; not the task's recipe: a run may be made longer, or its rate changed, as it goes on."""


def _optimizers(model: nn.Module, config: LoopConfig) -> dict[str, torch.optim.Optimizer]:
    """Muon for hidden matrices and kernels; AdamW for vectors, embeddings, and the first and last layers."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden = [p for p in model.parameters() if p.ndim > 1 and min(p.shape[:2]) > 8 and id(p) not in embeddings]
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return {
        "muon": Muon(hidden, lr=config.learning_rate, weight_decay=config.weight_decay),
        "adamw": torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    }


def _prefetch(maker: Callable[[int], Batch], numbers: Iterator[int], n_workers: int) -> Iterator[Batch]:
    """Batches in order, a few of them prepared ahead."""
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


def _resume(folder: Path, model: nn.Module, ema: AveragedModel, optimizers: Mapping[str, torch.optim.Optimizer]) -> int:
    """Load the newest whole checkpoint; the number of steps done, 0 without a checkpoint."""
    found = load_checkpoint(folder, _RECIPE)
    if found is None:
        return 0
    model.load_state_dict(found.tensors["model"])
    ema.module.load_state_dict(found.tensors["ema"])
    ema.n_averaged.fill_(found.step + 1)
    for name, optimizer in optimizers.items():
        load_optimizer(optimizer, found.tensors[name])
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


def _show(task: Task, model: nn.Module, folder: Path, step: int, config: LoopConfig) -> None:
    """Let the task measure the averaged model and draw with it."""
    with torch.no_grad():
        metrics = task.show(model, folder / f"step-{step:06d}.webp")
    logger.info("%s: %s", folder.name, ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "samples": step * config.batch_size, **metrics}) + "\n")
