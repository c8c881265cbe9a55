"""SAE training at Stable Diffusion's size: ours, the trainers of other libraries, and the matrix product that bounds
them, on the same batches, taking turns in one run.
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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from training.common.report import ROOT, Cell, Table

log = logging.getLogger(__name__)

PEERS = {
    "sparsify": "eai-sparsify==1.3.3",
    "dictionary_learning": "dictionary-learning==0.1.0",
    "sae_lens": "sae-lens==6.54.12",
}
"""What a baseline's environment needs, besides torch."""
TORCH = "torch==2.13.0"
PEER_TARGET, FLOOR_TARGET = 1.5, 2.0
"""Least times as fast as the fastest peer, and most times as slow as the encoder's product: on a CPU alone, on an
accelerator forwards and backwards."""
_DIRECTIONS = 16384
"""Planted directions: more than there are latents, as in activations."""


@dataclass(frozen=True)
class Settings:
    """How much is measured; the sizes are those of Stable Diffusion v1.4's widest hookpoints."""

    d_in: int = 1280
    d_sae: int = 5120
    k: int = 20
    batch_size: int = 4096
    n_batches: int = 12
    """Different batches, gone through again and again."""
    n_steps: int = 60
    turn: int = 5
    """Steps that a baseline takes before it is the next one's turn."""
    learning_rate: float = 1e-3
    peers: tuple[str, ...] = tuple(PEERS)
    device: str = "cpu"
    """Where all of them compute: `cpu` or `cuda`."""


QUICK = Settings(d_in=64, d_sae=256, k=4, batch_size=256, n_batches=4, n_steps=12, turn=4, peers=())


class Result(NamedTuple):
    """What one baseline did."""

    name: str
    precision: str
    turns: list[list[float]]
    """Seconds a step, turn by turn, without the first turn, in which everything warms up, and on an accelerator without
    the last."""
    fvu: float
    """Squared error on the held-out batch after all steps, as a share of its variance."""
    peak_mib: float
    """Most memory its process ever held on the device."""

    @property
    def by_turn(self) -> list[float]:
        """Median seconds a step of each turn."""
        return [statistics.median(turn) for turn in self.turns]


def part(settings: Settings, folder: Path) -> Table:
    """The benchmark's part `sae`."""
    pythons = {name: environment(name, folder / "peers") for name in settings.peers}
    entrants = [("product", "bf16"), ("ours", "bf16"), ("ours", "fp32")]
    entrants += [(name, precision) for name in settings.peers for precision in ("bf16", "fp32")]
    with TemporaryDirectory() as scratch:
        data = Path(scratch) / "batches.safetensors"
        save_file(planted(settings), data)
        results = _race(entrants, pythons, data, settings)
    return tabulate(results, settings)


def environment(name: str, folder: Path) -> Path:
    """The interpreter of a peer's own environment, made where it is not there yet.

    torchvision comes along with some of them and, in a build for another torch, keeps them from being imported: none of
    them needs it here.
    """
    home = folder / PEERS[name]
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        log.info("installing %s for the comparison", PEERS[name])
        venv.create(home, with_pip=True, clear=True)
        (home / "constraints.txt").write_text(TORCH + "\n")
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-c", str(home / "constraints.txt"), TORCH, PEERS[name]], check=True)
        subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)
        (home / "complete").touch()
    return python


def planted(settings: Settings, seed: int = 0) -> dict[str, Tensor]:
    """Batches `train` [n, batch_size, d_in] and `held_out` [batch_size, d_in], bfloat16: k of many directions each,
    some directions far more frequent than others, a mean and a little noise.
    """
    generator = torch.Generator().manual_seed(seed)
    n_directions = _DIRECTIONS * settings.d_in // 1280
    directions = F.normalize(torch.randn(n_directions, settings.d_in, generator=generator), dim=1)
    odds = 1 / torch.arange(1, n_directions + 1).float() ** 0.7
    mean = torch.randn(settings.d_in, generator=generator) / settings.d_in**0.5
    parts = []
    for _ in range(settings.n_batches + 1):
        n = settings.batch_size
        chosen = torch.multinomial(odds, n * settings.k, replacement=True, generator=generator).view(n, settings.k)
        sizes = 0.5 + torch.empty(n, settings.k).exponential_(generator=generator)
        x = F.embedding_bag(chosen, directions, per_sample_weights=sizes, mode="sum") + mean
        parts.append((x + 0.02 * torch.randn(x.shape, generator=generator)).bfloat16())
    *train, held_out = parts
    return {"train": torch.stack(train), "held_out": held_out}


def _race(
    entrants: Sequence[tuple[str, str]], pythons: dict[str, Path], data: Path, settings: Settings
) -> list[Result]:
    """Let the baselines take turns."""
    with ExitStack() as stack:
        running = {
            entrant: stack.enter_context(_contestant(*entrant, pythons.get(entrant[0]), data, settings))
            for entrant in entrants
        }
        turns: dict[tuple[str, str], list[dict[str, Any]]] = {entrant: [] for entrant in entrants}
        for number in range(settings.n_steps // settings.turn):
            for entrant, process in list(running.items()):
                answer = _take_turn(process)
                if answer is None:
                    log.warning("%s in %s cannot take part", *entrant)
                    del running[entrant]
                else:
                    turns[entrant].append(answer)
            log.info("turn %d of %d", number + 1, settings.n_steps // settings.turn)
    return [
        Result(
            *entrant, [turn["seconds"] for turn in told[1:] if turn["seconds"]], told[-1]["fvu"], told[-1]["peak_mib"]
        )
        for entrant, told in turns.items()
        if entrant in running
    ]


@contextmanager
def _contestant(
    name: str, precision: str, python: Path | None, data: Path, settings: Settings
) -> Iterator["subprocess.Popen[str]"]:
    """A baseline's process, ended in any case."""
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
    words = [str(python or sys.executable), str(script), name]
    words += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    environ = {**os.environ, "WANDB_MODE": "disabled", "ACCELERATE_USE_CPU": str(settings.device == "cpu")}
    if python is None:
        environ["PYTHONPATH"] = str(ROOT)
    with TemporaryDirectory() as elsewhere:  # a folder in which nothing of ours can be imported by accident
        process = subprocess.Popen(
            words, text=True, env=environ, cwd=elsewhere, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def _take_turn(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """What the baseline says after its turn; None if it broke down."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = process.stdout.readline()
    return dict(json.loads(line)) if line else None


def tabulate(results: Sequence[Result], settings: Settings) -> Table:
    """Rows of baselines, each beside the floor and beside ours, turn by turn."""
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
        f"{s.learning_rate:g} in turns of {s.turn}, on {s.device}; ratios are medians over turns, the first left out. "
        "FVU: on a held-out batch, after the last step.",
        "Activations are planted: k of many directions each, a mean, and noise. `product`: the encoder's matrix "
        f"product in bf16{'' if s.device == 'cpu' else ', with its gradient for the weights,'} and nothing else. No "
        "latent counts as dead within the run, for any trainer. Aims: at least "
        f"{PEER_TARGET} times as fast as the fastest peer, at no higher FVU, and at most {FLOOR_TARGET:g} times the "
        "product.",
        "Peers, each in an environment of its own: " + ", ".join(PEERS[name] for name in s.peers) + ". sparsify's "
        "trainer wants a language model, so its coder is stepped as that trainer steps it, with Adam. "
        "Peers in bf16 run under torch.autocast.",
    ]
    return Table("sae", "Training sparse autoencoders", rows, notes)
