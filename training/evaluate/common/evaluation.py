"""What every evaluation is made of, so that one path runs, caches and documents them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from core.diffusion.diffuser import Diffuser
from core.sae.autoencoder import SaeId
from core.sae.collection import list_saes
from training.common.report import Table

SettingsT = TypeVar("SettingsT")
BenchT = TypeVar("BenchT")


class Subject(NamedTuple):
    """What is evaluated, and on what."""

    model: Diffuser
    package: Path
    """Folder of the judges: segmenters and style classifier."""
    saes: Path
    """A collection of SAEs; unused unless the evaluation is `per_collection`."""
    prompts: Sequence[str] = ()
    """Held-out prompts, as many as the evaluation's `n_prompts` asks for."""


@dataclass(frozen=True)
class Evaluation(Generic[SettingsT, BenchT]):
    """An evaluation: its sizes, how it is set up, and the tables it makes."""

    name: str
    """Name on the command line."""
    title: str
    """Heading in the README."""
    description: str
    """Markdown for the README: what is measured and how to read it."""
    settings: SettingsT
    """Its usual size."""
    quick: SettingsT
    """A size that takes about a minute; its figures mean little."""
    bench: Callable[[Subject, SettingsT], BenchT]
    """Sets it up. A bench measures when a part first asks for it, and shares the measurements among its parts."""
    parts: Sequence[Callable[[BenchT], Table]]
    """One function per table, in the order they are made; a table is called by its function's name."""
    per_collection: bool = False
    """Whether it evaluates a collection of SAEs, and is repeated for each that is given."""
    n_prompts: Callable[[SettingsT], int] | None = None
    """How many held-out prompts it needs; None if it makes captions of its own."""
    compare: Callable[[Sequence[Table]], Table | None] | None = None
    """A table that compares the collections, from the tables of all of them."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of its parts."""
        return tuple(part.__name__ for part in self.parts)


def shared_saes(root: Path) -> list[SaeId]:
    """The SAEs for all times in a collection."""
    found = [sae_id for sae_id in list_saes(root) if sae_id.t == "all"]
    if not found:
        raise SystemExit(f"There is no SAE for all times in {root}. Train some with `python -m training sae`.")
    return found
