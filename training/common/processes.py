"""Several processes that train together: whoever starts them, they are joined, or none of them begins."""

import os
from typing import Any

import torch
from accelerate import Accelerator


def joined_accelerator(**options: Any) -> Accelerator:
    """An `Accelerator(**options)` that shares the work with the other processes that torchrun or accelerate started.

    Left to itself it joins processes only where each has a GPU: several on CPUs would each train the whole.

    Raises:
        ValueError: The processes cannot be joined, or the device does not have the precision that is asked for.
    """
    world, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    n_gpus = torch.cuda.device_count()
    on_cpu = _flag("ACCELERATE_USE_CPU") or not _joins_on_device()
    if world > 1 and n_gpus and not on_cpu and local > n_gpus:
        raise ValueError(
            f"{local} processes were started for {n_gpus} GPU{'s' if n_gpus > 1 else ''}, each of which takes one. "
            f"Start {n_gpus}, or set ACCELERATE_USE_CPU=1 to train on the CPU."
        )
    accelerator = Accelerator(cpu=world > 1 and on_cpu, **options)
    if accelerator.num_processes != world:
        raise ValueError(
            f"{world} processes were started, but on {accelerator.device} each would train the whole by itself. "
            f"Start one, or set ACCELERATE_USE_CPU=1 to train on the CPU together."
        )
    if accelerator.device.type == "cpu" and options.get("mixed_precision") == "fp16":
        raise ValueError("On a CPU there is no training in fp16: set the precision to bf16 or no.")
    return accelerator


def _joins_on_device() -> bool:
    """Whether there is an accelerator on which processes can exchange gradients; Apple's cannot."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and device.type != "mps"


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
