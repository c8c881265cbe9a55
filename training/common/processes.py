"""Several processes on one task: whoever started them, they are joined, or none of them begins."""

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState

Joined = TypeVar("Joined", Accelerator, PartialState)


def joined_accelerator(**options: Any) -> Accelerator:
    """An `Accelerator(**options)` for training with the other processes that torchrun or accelerate started.

    Raises:
        ValueError: The processes cannot be joined, or the device does not have the requested precision.
    """
    accelerator = _joined(Accelerator, **options)
    if accelerator.device.type == "cpu" and options.get("mixed_precision") == "fp16":
        raise ValueError("On a CPU there is no training in fp16: set the precision to bf16 or no.")
    return accelerator


def joined_processes() -> PartialState:
    """Rank, device and barrier for work that needs no gradients.

    Processes wait at the barrier for as long as another works, not just for torch's ten minutes.

    Raises:
        ValueError: The processes cannot be joined.
    """
    return _joined(PartialState, timeout=timedelta(days=7))


def _joined(kind: type[Joined], **options: Any) -> Joined:
    """accelerate's object, on the CPU where need be.

    By itself accelerate joins processes only if each has a GPU: on CPUs each would do the whole work.
    """
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    n_gpus = torch.cuda.device_count()
    on_cpu = _flag("ACCELERATE_USE_CPU") or not _joins_on_device()
    if world > 1 and n_gpus and not on_cpu and local > n_gpus:
        raise ValueError(
            f"{local} processes were started for {n_gpus} GPU{'s' if n_gpus > 1 else ''}, each of which takes one. "
            f"Start {n_gpus}, or set ACCELERATE_USE_CPU=1 to use the CPU."
        )
    joined = kind(cpu=world > 1 and on_cpu, **options)
    if joined.num_processes != world:
        raise ValueError(
            f"{world} processes were started, but on {joined.device} each would do the whole work by itself. "
            f"Start one, or set ACCELERATE_USE_CPU=1 to share the work on the CPU."
        )
    return joined


def _joins_on_device() -> bool:
    """Whether there is an accelerator on which processes can exchange gradients; Apple's cannot."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and device.type != "mps"


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
