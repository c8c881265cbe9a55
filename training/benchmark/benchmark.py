"""What every benchmark is made of. Nothing heavy is imported here: the start of the app is measured without torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from training.common.report import Table

if TYPE_CHECKING:
    from core.diffusion.diffuser import Diffuser

SettingsT = TypeVar("SettingsT")


@dataclass(frozen=True)
class BenchmarkRun:
    """What the command line asks for, and what benchmarks share."""

    model_name: str
    """The model, as `core.load_model` takes it."""
    device: str | None
    """Device of the models; None for the best available. The benchmark `app` starts the app with its own default."""
    quick: bool
    """Measure for about a minute instead of half an hour; the figures mean little."""
    folder: Path
    """Folder of the report and of what is cached between runs."""

    @cached_property
    def model(self) -> "Diffuser":
        """The model, loaded on first use."""
        import core

        return core.load_model(self.model_name, device=self.device)

    @cached_property
    def resolved_device(self) -> str:
        """The device asked for, or the best available."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Benchmark(Generic[SettingsT]):
    """A benchmark: its sizes and how its tables are measured."""

    title: str
    """Heading in the README."""
    description: str
    """Markdown for the README: what is measured and how to read it."""
    settings: SettingsT
    """Its usual size."""
    quick: SettingsT
    """A size that takes about a minute; its figures mean little."""
    measure: Callable[[BenchmarkRun, SettingsT], Sequence[Table]]
    """Measures and returns its tables."""

    def tables(self, run: BenchmarkRun) -> Sequence[Table]:
        """Its tables, measured at the size of the run."""
        return self.measure(run, self.quick if run.quick else self.settings)
