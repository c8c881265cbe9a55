"""The script that trains one SAE baseline, in turns, for the benchmark `sae`.

`training.benchmark.saes` runs this file once per baseline, with the interpreter of that baseline's environment. It
imports torch, safetensors and the baseline's own package; this project's only for the baseline `ours`. For each line on
stdin it takes a turn of several training steps and answers with a line of JSON.
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

Reconstruct = Callable[[Tensor], Tensor]
"""Maps activations [N, d_in] to their reconstructions [N, d_in]."""


class Batches:
    """Iterates over training batches [batch_size, d_in] in turns, and times the step taken on each.

    On a CPU a step is timed from handing out its batch to the request for the next. On an accelerator the work is
    synchronised only at the ends of a turn, as in training, and every step counts as an equal share of the turn.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.on_device = args.device != "cpu"
        self.started = 0.0
        self.seconds: list[float] = []
        with safe_open(args.data, "pt", device=args.device) as file:
            self.x, self.held_out = file.get_tensor("train"), file.get_tensor("held_out")
        if self.on_device:
            self.x = self.x.float()

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.args.steps):
            if step % self.args.turn == 0:
                self.end_turn()
            batch = self.x[step % len(self.x)].float()
            started = time.perf_counter()
            yield batch
            self.seconds.append(time.perf_counter() - started)

    def end_turn(self) -> None:
        """Send the times of the last turn, if there was one, and wait for the signal to start the next."""
        if self.on_device:
            torch.accelerator.synchronize()
        if self.seconds:
            elapsed = time.perf_counter() - self.started
            n = len(self.seconds)
            send({"seconds": [elapsed / n] * n if self.on_device else self.seconds})
            self.seconds = []
        sys.stdin.readline()
        self.started = time.perf_counter()


def send(content: dict[str, Any]) -> None:
    """Send a line of JSON to the parent process, on the original stdout: what libraries print goes to stderr."""
    print(json.dumps(content), file=sys.__stdout__, flush=True)


def autocast(args: Namespace) -> Any:
    """A context of the requested precision, for baselines that have no such setting."""
    return torch.autocast(args.device, torch.bfloat16) if args.precision == "bf16" else nullcontext()


def ours(args: Namespace, batches: Batches) -> Reconstruct:
    """This project's trainer, with the setup of `python -m training sae`."""
    import tempfile

    from core.sae.autoencoder import SaeId
    from training.common.allocator import keep_freed_memory
    from training.sae.bank import TrainerConfig
    from training.sae.stream import StreamBatch
    from training.sae.trainer import SaeRun, make_accelerator, train_saes

    keep_freed_memory()
    sae_id = SaeId("mid_block.attentions.0", "cond", "all")
    config = TrainerConfig(
        n_steps=args.steps,
        k=args.k,
        expansion=args.d_sae // args.d_in,
        learning_rate=args.lr,
        n_warmup=0,
        lr_decay_fraction=0.0,
        n_calibration_batches=1,
        dead_after_fraction=1.0,
        precision="bf16" if args.precision == "bf16" else "no",
    )

    def stream(start: int = 0) -> Iterator[StreamBatch]:
        for number, batch in enumerate(batches, start):
            yield StreamBatch(number, {sae_id: batch}, ("",))

    with tempfile.TemporaryDirectory() as folder:
        run = SaeRun(Path(folder), checkpoint_interval_s=1e9)
        accelerator = make_accelerator(config, run)
        source = SimpleNamespace(batches=stream, d_in=lambda _: args.d_in)
        sae = train_saes(source, [sae_id], config, run, accelerator)[sae_id].to(args.device)
    return lambda x: sae.decode(sae.encode(x))


def sparsify(args: Namespace, batches: Batches) -> Reconstruct:
    """EleutherAI's sparsify: its coder with the steps of its trainer, which itself needs a language model."""
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]

    config = SparseCoderConfig(num_latents=args.d_sae, k=args.k)
    sae = SparseCoder(args.d_in, config, args.device, torch.float32)
    optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr)
    for step, x in enumerate(batches):
        if step == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        with autocast(args):
            sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    sae.set_decoder_norm_to_unit_norm()
    return lambda x: sae(x).sae_out


def dictionary_learning(args: Namespace, batches: Batches) -> Reconstruct:
    """The TopK trainer of dictionary_learning (Marks, Karvonen and Mueller)."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]

    trainer = TopKTrainer(
        steps=10**9, activation_dim=args.d_in, dict_size=args.d_sae, k=args.k, layer=0, lm_name="", lr=args.lr,
        warmup_steps=0, seed=0, device=args.device,
    )  # fmt: skip
    for step, x in enumerate(batches):
        with autocast(args):
            trainer.update(step, x)
    return lambda x: trainer.ae(x)


def sae_lens(args: Namespace, batches: Batches) -> Reconstruct:
    """SAELens' trainer with its TopK autoencoder."""
    from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

    low = args.precision == "bf16"
    shape = TopKTrainingSAEConfig(
        d_in=args.d_in,
        d_sae=args.d_sae,
        k=args.k,
        normalize_activations="none",
        use_sparse_activations=not low,
        device=args.device,
    )
    config = SAETrainerConfig(
        total_training_samples=args.steps * batches.x.shape[1],
        train_batch_size_samples=batches.x.shape[1],
        lr=args.lr,
        lr_end=args.lr,  # required, but unused without a schedule
        autocast=low,
        device=args.device,
    )
    sae = SAETrainer(config, TopKTrainingSAE(shape), iter(batches)).fit()
    return lambda x: sae(x)


def product(args: Namespace, batches: Batches) -> Reconstruct:
    """No training, only the encoder's matrix product: a lower bound on the time of a step.

    On an accelerator it includes the gradient of the weights, a product of the same cost. On a CPU it does not, because
    the sparse backward pass touches only few weights there.
    """
    weight = torch.randn(args.d_sae, args.d_in, device=args.device)
    low = weight.bfloat16() if args.precision == "bf16" else weight
    with torch.no_grad():
        for x in batches:
            rows = x.to(low.dtype)
            pre = F.linear(rows, low)
            if batches.on_device:
                pre.T @ rows
    return lambda x: torch.zeros_like(x)


BASELINES = {f.__name__: f for f in (ours, sparsify, dictionary_learning, sae_lens, product)}


def main() -> None:
    """Take the requested turns, then send the FVU on the held-out batch and the peak memory."""
    parser = ArgumentParser()
    parser.add_argument("name", choices=BASELINES)
    parser.add_argument("--data", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    for name in ("d-in", "d-sae", "k", "steps", "turn"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    batches = Batches(args)
    with redirect_stdout(sys.stderr):
        reconstruct = BASELINES[args.name](args, batches)
    x = batches.held_out.float()
    with torch.no_grad():
        error = (x - reconstruct(x)).double().square().sum()
    fvu = float(error / (x - x.mean(0)).double().square().sum())
    # On an accelerator it is unknown when the work of the last turn ended.
    seconds = [] if batches.on_device else batches.seconds
    send({"seconds": seconds, "fvu": fvu, "peak_mib": peak_mib(args.device)})


def peak_mib(device: str) -> float:
    """Peak memory of this process on the device, in MiB."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    main()
