"""Training SAEs at the size of Stable Diffusion v1.4: our trainer, those of three other libraries, and the encoder's
matrix product alone as a lower bound on the time of a step. All take turns on the same batches within one run.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from training.benchmark.benchmark import Benchmark
from training.common.report import ROOT, Cell, Table

log = logging.getLogger(__name__)

PEERS = {
    "sparsify": "eai-sparsify==1.3.3",
    "dictionary_learning": "dictionary-learning==0.1.0",
    "sae_lens": "sae-lens==6.54.12",
}
"""Peer libraries, and the package installed into each one's environment besides torch."""
TORCH = "torch==2.13.0"
PEER_TARGET, FLOOR_TARGET = 1.5, 2.0
"""Targets: at least this many times as fast as the fastest peer, and at most this many times the time of the encoder's
matrix product, which on an accelerator includes the gradient of the weights."""
_DIRECTIONS = 16384
"""Directions of the synthetic activations at d_in 1280: more than there are latents, as in real activations."""


@dataclass(frozen=True)
class SaeBenchmarkSettings:
    """Sizes of the SAE and of the measurement; the defaults fit the widest hookpoints of Stable Diffusion v1.4."""

    d_in: int = 1280
    d_sae: int = 5120
    k: int = 20
    batch_size: int = 4096
    n_batches: int = 12
    """Distinct training batches, used in a cycle."""
    n_steps: int = 60
    turn: int = 5
    """Training steps a baseline takes in a row before the next one does."""
    learning_rate: float = 1e-3
    peers: tuple[str, ...] = tuple(PEERS)
    """Keys of `PEERS` to compare with."""
    device: str = "cpu"
    """Device of all baselines: `cpu` or `cuda`."""


QUICK = SaeBenchmarkSettings(d_in=64, d_sae=256, k=4, batch_size=256, n_batches=4, n_steps=12, turn=4, peers=())


class Result(NamedTuple):
    """Times, error and memory of one baseline in one precision."""

    name: str
    precision: str
    turns: list[list[float]]
    """Seconds per step in each turn; without the first turn, which warms up, and on an accelerator without the last."""
    fvu: float
    """Fraction of variance unexplained on the held-out batch after all steps."""
    peak_mib: float
    """Peak memory of its process on the device, in MiB."""

    @property
    def by_turn(self) -> list[float]:
        """Median seconds per step in each turn."""
        return [statistics.median(turn) for turn in self.turns]


def measure(settings: SaeBenchmarkSettings, folder: Path) -> Table:
    """Measure the benchmark `sae`; the peers' environments are installed under `folder`."""
    pythons = {name: environment(name, folder / "peers") for name in settings.peers}
    competitors = [("product", "bf16"), ("ours", "bf16"), ("ours", "fp32")]
    competitors += [(name, precision) for name in settings.peers for precision in ("bf16", "fp32")]
    with TemporaryDirectory() as scratch:
        data = Path(scratch) / "batches.safetensors"
        save_file(planted_batches(settings), data)
        results = _take_turns(competitors, pythons, data, settings)
    return tabulate(results, settings)


def environment(name: str, folder: Path) -> Path:
    """The Python interpreter of a peer's virtual environment, which is installed under `folder` on first use.

    torchvision is uninstalled again: some peers depend on it, and a build for another torch breaks their import, but
    nothing here needs it.
    """
    home = folder / PEERS[name]
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        log.info("installing %s for the comparison", PEERS[name])
        venv.create(home, with_pip=True, clear=True)
        (home / "constraints.txt").write_text(TORCH + "\n", encoding="utf-8")
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-c", str(home / "constraints.txt"), TORCH, PEERS[name]], check=True)
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
        (home / "complete").touch()
    return python


def planted_batches(settings: SaeBenchmarkSettings, seed: int = 0) -> dict[str, Tensor]:
    """Synthetic activations in bfloat16: `train` [n_batches, batch_size, d_in] and `held_out` [batch_size, d_in].

    Each row is a sum of k directions from a fixed overcomplete set, drawn with power-law frequencies, plus a mean and a
    little noise.
    """
    generator = torch.Generator().manual_seed(seed)
    n_directions = _DIRECTIONS * settings.d_in // 1280
    directions = F.normalize(torch.randn(n_directions, settings.d_in, generator=generator), dim=1)
    frequencies = 1 / torch.arange(1, n_directions + 1).float() ** 0.7
    mean = torch.randn(settings.d_in, generator=generator) / settings.d_in**0.5
    batches = []
    for _ in range(settings.n_batches + 1):
        n = settings.batch_size
        chosen = torch.multinomial(frequencies, n * settings.k, replacement=True, generator=generator).view(
            n, settings.k
        )
        weights = 0.5 + torch.empty(n, settings.k).exponential_(generator=generator)
        x = F.embedding_bag(chosen, directions, per_sample_weights=weights, mode="sum") + mean
        batches.append((x + 0.02 * torch.randn(x.shape, generator=generator)).bfloat16())
    *train, held_out = batches
    return {"train": torch.stack(train), "held_out": held_out}


def _take_turns(
    competitors: Sequence[tuple[str, str]], pythons: dict[str, Path], data: Path, settings: SaeBenchmarkSettings
) -> list[Result]:
    """Train the baselines, a (name, precision) each, in turns; one whose process fails is left out."""
    with ExitStack() as stack:
        running = {one: stack.enter_context(_process(*one, pythons.get(one[0]), data, settings)) for one in competitors}
        turns: dict[tuple[str, str], list[dict[str, Any]]] = {one: [] for one in competitors}
        for number in range(settings.n_steps // settings.turn):
            for one, process in list(running.items()):
                answer = _take_turn(process)
                if answer is None:
                    log.warning("%s in %s failed and is left out", *one)
                    del running[one]
                else:
                    turns[one].append(answer)
            log.info("turn %d of %d", number + 1, settings.n_steps // settings.turn)
    return [
        Result(
            *one,
            [answer["seconds"] for answer in answers[1:] if answer["seconds"]],
            answers[-1]["fvu"],
            answers[-1]["peak_mib"],
        )
        for one, answers in turns.items()
        if one in running
    ]


@contextmanager
def _process(
    name: str, precision: str, python: Path | None, data: Path, settings: SaeBenchmarkSettings
) -> Iterator["subprocess.Popen[str]"]:
    """The process of a baseline, killed on exit."""
    options: dict[str, Any] = {
        "data": data,
        "device": settings.device,
        "precision": precision,
        "d-in": settings.d_in,
        "d-sae": settings.d_sae,
        "k": settings.k,
        "steps": settings.n_steps,
        "turn": settings.turn,
        "lr": settings.learning_rate,
    }
    script = Path(__file__).with_name("baselines.py")
    command = [str(python or sys.executable), str(script), name]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    environ = {**os.environ, "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": str(settings.device == "cpu")}
    if python is None:
        environ["PYTHONPATH"] = str(ROOT)
    with TemporaryDirectory() as empty:  # so that a peer cannot import our packages by accident
        process = subprocess.Popen(
            command, encoding="utf-8", env=environ, cwd=empty, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def _take_turn(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """Let a baseline take its turn; its answer, or None if the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = process.stdout.readline()
    return dict(json.loads(line)) if line else None


def tabulate(results: Sequence[Result], settings: SaeBenchmarkSettings) -> Table:
    """A row per baseline, compared turn by turn with the encoder's matrix product and with our trainer in bf16."""
    floor = next(np.array(r.by_turn) for r in results if r.name == "product")
    ours = next(r for r in results if (r.name, r.precision) == ("ours", "bf16"))
    peers = [r for r in results if r.name in PEERS]
    fastest = min(peers, key=lambda r: statistics.median(r.by_turn), default=None)
    rows: list[dict[str, Cell]] = []
    for r in results:
        seconds = np.array(r.by_turn)
        times_floor = float(np.median(seconds / floor))
        times_ours = float(np.median(seconds / np.array(ours.by_turn)))
        met = None
        if r is ours:
            met = times_floor <= FLOOR_TARGET and (
                fastest is None
                or (np.median(np.array(fastest.by_turn) / seconds) >= PEER_TARGET and r.fvu <= fastest.fvu)
            )
        rows.append(
            {
                "trainer": r.name,
                "precision": r.precision,
                "steps a second": 1 / statistics.median(r.by_turn),
                "times the product": times_floor,
                "times ours": times_ours,
                "FVU": None if r.name == "product" else round(r.fvu, 4),
                "peak memory, MiB": r.peak_mib,
                "met": None if met is None else bool(met),
            }
        )
    s = settings
    notes = [
        f"d_in {s.d_in}, d_sae {s.d_sae}, k {s.k}, batches of {s.batch_size}, {s.n_steps} steps of Adam at "
        f"{s.learning_rate:g} in turns of {s.turn}, on {s.device}; ratios are medians over turns without the first. "
        "FVU: fraction of variance unexplained on a held-out batch after the last step.",
        "The activations are synthetic: sums of k of many directions, a mean, and noise. `product`: only the encoder's "
        f"matrix product in bf16{'' if s.device == 'cpu' else ', with its gradient for the weights'}. No trainer "
        f"counts any latent as dead during the run. Targets: at least {PEER_TARGET} times as fast as the fastest peer "
        f"at no higher FVU, and at most {FLOOR_TARGET:g} times the time of the product.",
        "Peers, each in its own environment: " + ", ".join(PEERS[name] for name in s.peers) + ". sparsify's trainer "
        "needs a language model, so its coder is trained with the same steps and Adam. "
        "Peers in bf16 run under torch.autocast.",
    ]
    return Table("sae", "Training sparse autoencoders", rows, notes)


BENCHMARK = Benchmark(
    title="SAE training",
    description=__doc__,
    settings=SaeBenchmarkSettings(),
    quick=QUICK,
    measure=lambda run, settings: [measure(replace(settings, device=run.resolved_device), run.folder)],
)
