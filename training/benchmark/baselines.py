"""SAE trainers that take turns on the same batches, each in a process and, peers, in an environment of its own.

Run by `training.benchmark.saes` as a file, with the interpreter of the baseline: it imports torch, safetensors and
that baseline's package, and of ours nothing unless we are the baseline. It waits for a line on stdin, takes a turn,
and answers with a line of JSON.
"""

import json
import resource
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

Rebuild = Callable[[Tensor], Tensor]
"""Reconstructions [N, d_in] of positions [N, d_in]."""


class Batches:
    """Batches [batch_size, d_in] in turns, and the seconds between handing one out and being asked for the next.

    An accelerator is waited for at the ends of a turn alone, as training waits for it now and then: each of the turn's
    steps is said to take its share of the turn.
    """

    def __init__(self, asked: Namespace) -> None:
        self.asked = asked
        self.on_device = asked.device != "cpu"
        self.started = 0.0
        self.seconds: list[float] = []
        with safe_open(asked.data, "pt", device=asked.device) as file:
            self.x, self.held_out = file.get_tensor("train"), file.get_tensor("held_out")
        if self.on_device:
            self.x = self.x.float()

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.asked.steps):
            if step % self.asked.turn == 0:
                self.rest()
            batch = self.x[step % len(self.x)].float()
            started = time.perf_counter()
            yield batch
            self.seconds.append(time.perf_counter() - started)

    def rest(self) -> None:
        """Tell the times of the last turn, and wait for the next."""
        if self.on_device:
            torch.accelerator.synchronize()
        if self.seconds:
            whole = time.perf_counter() - self.started
            n = len(self.seconds)
            say({"seconds": [whole / n] * n if self.on_device else self.seconds})
            self.seconds = []
        sys.stdin.readline()
        self.started = time.perf_counter()


def say(content: dict[str, Any]) -> None:
    """A line for whoever started this process, whatever else a library prints."""
    print(json.dumps(content), file=sys.__stdout__, flush=True)


def autocast(asked: Namespace) -> Any:
    """The precision that was asked for, for baselines that have no setting of their own."""
    return torch.autocast(asked.device, torch.bfloat16) if asked.precision == "bf16" else nullcontext()


def ours(asked: Namespace, batches: Batches) -> Rebuild:
    """This project's trainer, as `python -m training sae` runs it."""
    import tempfile

    from core.sae.autoencoder import SaeId
    from training.common.allocator import keep_freed_memory
    from training.sae.bank import TrainerConfig
    from training.sae.stream import StreamBatch
    from training.sae.trainer import SaeRun, make_accelerator, train_saes

    keep_freed_memory()
    sae_id = SaeId("mid_block.attentions.0", "cond", "all")
    config = TrainerConfig(
        n_steps=asked.steps,
        k=asked.k,
        expansion=asked.d_sae // asked.d_in,
        learning_rate=asked.lr,
        n_warmup=0,
        lr_decay_fraction=0.0,
        n_calibration_batches=1,
        dead_after_fraction=1.0,
        precision="bf16" if asked.precision == "bf16" else "no",
    )

    def stream(start: int = 0) -> Iterator[StreamBatch]:
        for number, batch in enumerate(batches, start):
            yield StreamBatch(number, {sae_id: batch}, ("",))

    with tempfile.TemporaryDirectory() as folder:
        run = SaeRun(Path(folder), checkpoint_interval_s=1e9)
        accelerator = make_accelerator(config, run)
        source = SimpleNamespace(batches=stream, d_in=lambda _: asked.d_in)
        sae = train_saes(source, [sae_id], config, run, accelerator)[sae_id].to(asked.device)
    return lambda x: sae.decode(sae.encode(x))


def sparsify(asked: Namespace, batches: Batches) -> Rebuild:
    """EleutherAI's sparsify: its coder, and the steps of its trainer, which itself wants a language model."""
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]

    config = SparseCoderConfig(num_latents=asked.d_sae, k=asked.k)
    sae = SparseCoder(asked.d_in, config, asked.device, torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=asked.lr)
    for step, x in enumerate(batches):
        if step == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        with autocast(asked):
            sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    sae.set_decoder_norm_to_unit_norm()
    return lambda x: sae(x).sae_out


def dictionary_learning(asked: Namespace, batches: Batches) -> Rebuild:
    """Marks and Karvonen's dictionary_learning: its TopK trainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]

    trainer = TopKTrainer(
        steps=10**9, activation_dim=asked.d_in, dict_size=asked.d_sae, k=asked.k, layer=0, lm_name="", lr=asked.lr,
        warmup_steps=0, seed=0, device=asked.device,
    )  # fmt: skip
    for step, x in enumerate(batches):
        with autocast(asked):
            trainer.update(step, x)
    return lambda x: trainer.ae(x)


def sae_lens(asked: Namespace, batches: Batches) -> Rebuild:
    """SAELens: its trainer with its TopK autoencoder."""
    from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

    low = asked.precision == "bf16"
    shape = TopKTrainingSAEConfig(
        d_in=asked.d_in,
        d_sae=asked.d_sae,
        k=asked.k,
        normalize_activations="none",
        use_sparse_activations=not low,
        device=asked.device,
    )
    config = SAETrainerConfig(
        total_training_samples=asked.steps * batches.x.shape[1],
        train_batch_size_samples=batches.x.shape[1],
        lr=asked.lr,
        lr_end=asked.lr,  # without a schedule it is not used, but has to be there
        autocast=low,
        device=asked.device,
    )
    sae = SAETrainer(config, TopKTrainingSAE(shape), iter(batches)).fit()
    return lambda x: sae(x)


def product(asked: Namespace, batches: Batches) -> Rebuild:
    """No trainer: the encoder's matrix product, which none can do without.

    On a CPU alone, where what follows it touches little; on an accelerator with its gradient for the weights, which
    takes as long again.
    """
    weight = torch.randn(asked.d_sae, asked.d_in, device=asked.device)
    low = weight.bfloat16() if asked.precision == "bf16" else weight
    with torch.no_grad():
        for x in batches:
            rows = x.to(low.dtype)
            pre = F.linear(rows, low)
            if batches.on_device:
                pre.T @ rows
    return lambda x: torch.zeros_like(x)


BASELINES = {f.__name__: f for f in (ours, sparsify, dictionary_learning, sae_lens, product)}


def main() -> None:
    """Take the turns that are asked for, then tell how well the held-out batch is rebuilt, and the peak of memory."""
    parser = ArgumentParser()
    parser.add_argument("name", choices=BASELINES)
    parser.add_argument("--data", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    for name in ("d-in", "d-sae", "k", "steps", "turn"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    asked = parser.parse_args()
    torch.manual_seed(0)
    batches = Batches(asked)
    with redirect_stdout(sys.stderr):
        rebuild = BASELINES[asked.name](asked, batches)
    x = batches.held_out.float()
    with torch.no_grad():
        error = (x - rebuild(x)).double().square().sum()
    fvu = float(error / (x - x.mean(0)).double().square().sum())
    # On an accelerator the last turn's work ended at no known time.
    seconds = [] if batches.on_device else batches.seconds
    say({"seconds": seconds, "fvu": fvu, "peak_mib": peak_mib(asked.device)})


def peak_mib(device: str) -> float:
    """Most memory that this process ever held on the device."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    main()
