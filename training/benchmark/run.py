"""`python -m training benchmark`: how fast it is on this machine, and how few evaluations it needs."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from core.folders import cache_folder
from training.common import report
from training.common.report import Table

if TYPE_CHECKING:
    from core.diffusion.diffuser import Diffuser


@dataclass(frozen=True)
class Run:
    """A benchmark in progress."""

    name: str
    """The model, as `core.load_model` takes it."""
    device: str | None
    """Where it computes; None: the best there is. The part `app` starts the app with its own default."""
    quick: bool
    """A minute instead of half an hour; its figures mean little."""
    folder: Path
    """Where results, and what is kept from one run to the next, go."""

    # Everything heavy is imported by the part that needs it: `app` is measured before this process holds torch.

    @cached_property
    def model(self) -> "Diffuser":
        """Loaded when a part first asks for it."""
        import core

        return core.load_model(self.name, device=self.device)

    def app(self) -> Table:
        """Start of the app."""
        from training.benchmark import app

        return app.part(self.name, 1 if self.quick else 3)

    def generation(self) -> Table:
        """A picture."""
        from training.benchmark import speed

        return speed.generation(self.model, 2 if self.quick else 7)

    def attribution(self) -> Table:
        """The words of a picture."""
        from training.benchmark import speed

        return speed.attribution(self.model, 1 if self.quick else 7)

    def estimator(self) -> Table:
        """Evaluations for the same error."""
        from training.benchmark import estimator

        settings = estimator.QUICK if self.quick else estimator.Settings()
        return estimator.part(self.model, settings, self.folder / "estimator")

    def density(self) -> list[Table]:
        """Where on the log-SNR line words are hard to measure."""
        from training.benchmark import density

        return density.tables(self.model, density.QUICK if self.quick else density.Settings())

    def sae(self) -> Table:
        """Steps of SAE training."""
        from training.benchmark import saes

        settings = saes.QUICK if self.quick else saes.Settings()
        return saes.part(replace(settings, device=self.site), self.folder)

    def streaming(self) -> Table:
        """SAE training while a full-size U-Net feeds it."""
        from training.benchmark import streaming

        return streaming.part(streaming.QUICK if self.quick else streaming.Settings(), self.site)

    def latency(self) -> Table:
        """Small calls of a full-size U-Net."""
        from training.benchmark import latency

        return latency.part(self.site, quick=self.quick)

    @cached_property
    def site(self) -> str:
        """The device that was asked for, or the best there is."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def conformance(self) -> Table:
        """The whole path at full size."""
        from training.benchmark import conformance

        return conformance.part(self.device, small=self.quick)


PARTS: dict[str, Callable[[Run], Table | list[Table]]] = {
    "app": Run.app,
    "generation": Run.generation,
    "attribution": Run.attribution,
    "estimator": Run.estimator,
    "density": Run.density,
    "sae": Run.sae,
    "streaming": Run.streaming,
    "conformance": Run.conformance,
    "latency": Run.latency,
}
"""In this order, whatever the order asked for."""
NEED_ACCELERATOR = ("streaming",)
"""Parts that are hours long on a CPU: left out there unless they are named."""
OF_ANOTHER_MODEL = ("conformance", "latency")
"""Parts that measure another model than the one that is asked for: left out unless they are named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    names = f"parts to measure: {', '.join(PARTS)}; conformance needs 5 GB of memory and 3 of disk, and is not usual"
    parser.add_argument("names", nargs="*", type=_part, metavar="NAME", help=names)
    parser.add_argument("--quick", action="store_true", help="a minute's version; its figures mean little")
    parser.add_argument("--model", default="picturebook", help="built-in name, folder, or owner/name@revision")
    parser.add_argument("--device", default=None, help="torch device; by default the best there is")
    parser.add_argument(
        "--out", type=Path, default=cache_folder("benchmark"), help="folder of the results, as Markdown and JSON"
    )


def main(arguments: argparse.Namespace) -> None:
    """Measure what was asked for, write it and print it."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    run = Run(arguments.model, arguments.device, arguments.quick, arguments.out)
    made = [part(run) for name, part in PARTS.items() if _wanted(name, arguments.names, run)]
    tables = [table for one in made for table in (one if isinstance(one, list) else [one])]
    device = str(run.model.device) if "model" in vars(run) else arguments.device or "the app's default"
    provenance = report.origin(" ".join(["python -m training", *sys.argv[1:]]), load, device)
    report.write(arguments.out, "Benchmark", provenance, tables)
    print(report.markdown("Benchmark", provenance, tables))


def _wanted(name: str, names: Sequence[str], run: Run) -> bool:
    """Whether a part is measured; asked part by part, for to know the device takes torch."""
    if names:
        return name in names
    return name not in OF_ANOTHER_MODEL and (name not in NEED_ACCELERATOR or run.site != "cpu")


def _part(name: str) -> str:
    if name not in PARTS:
        near = difflib.get_close_matches(name, PARTS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentTypeError(f"there is no part {name!r}; there are {', '.join(PARTS)}.{hint}")
    return name
