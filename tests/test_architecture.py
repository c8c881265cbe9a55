"""Which module may import which: read from the source, so that nothing has to be imported."""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILES = 15
"""Python files of a room, `__init__.py` included."""

ALLOWED = {
    "core.hardware": set(),
    "core.diffusion": {"core.hardware"},
    "core.activations": {"core.diffusion"},
    "core.sae": {"core.diffusion"},
    "core.segmentation": {"core.diffusion"},
    "core.information": {"core.diffusion"},
    "core.concepts": {"core.activations", "core.diffusion", "core.sae"},
    "core.edits": {"core.activations", "core.concepts", "core.diffusion", "core.sae"},
    "training.common": set(),
    "training.picturebook.world": {"training.common"},
    "training.picturebook.models": {"training.common", "training.picturebook.world"},
    "training.prompts": {"training.common", "training.picturebook.world"},
    "training.sae": {"training.common", "training.prompts"},
    "training.labels": {"training.common", "training.prompts", "training.sae"},
    "training.hub": {"training.common"},
}
"""Other rooms of the same package that a room may import. Every room of `core` may import its loose modules."""


def path_of(module: str) -> Path | None:
    """The file of a module or package of this repository; None for any other."""
    base = ROOT.joinpath(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The package that a module lies in; a package lies in itself."""
    path = path_of(module)
    assert path is not None
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


@cache
def modules() -> tuple[str, ...]:
    """All modules and packages of `core` and `training`."""
    return tuple(name_of(path) for root in ("core", "training") for path in sorted((ROOT / root).rglob("*.py")))


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Everything that is imported anywhere in a file, in functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if path_of(f"{base}.{alias.name}") else base


@cache
def imports_of(path: Path | None) -> frozenset[str]:
    assert path is not None
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return frozenset(imported(ast.parse(path.read_text(encoding="utf-8")), package))


@cache
def graph() -> dict[str, frozenset[str]]:
    """What each module imports of this repository."""
    return {m: frozenset(other for other in imports_of(path_of(m)) if path_of(other) and other != m) for m in modules()}


def circle(arrows: dict[str, frozenset[str]]) -> list[str]:
    """A circle of imports, if there is one."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def importers(name: str, *roots: str) -> list[str]:
    """The modules under some packages that import another, or something in it."""

    def under(module: str, package: str) -> bool:
        return module == package or module.startswith(f"{package}.")

    return [
        module
        for module in modules()
        if any(under(module, root) for root in roots)
        and any(under(other, name) for other in imports_of(path_of(module)))
    ]


def test_imports_are_read_wherever_they_stand() -> None:
    text = (
        "import core.spec\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from core.edits import kinds, Target\n"
        "def late():\n    from . import base\n    from ..concepts.table import Hit\n"
    )
    found = set(imported(ast.parse(text), "core.edits"))
    assert found == {
        "core.spec", "typing", "core.edits.kinds", "core.edits", "core.edits.base", "core.concepts.table",
    }  # fmt: skip
    assert circle({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a")})
    assert not circle({"a": frozenset("bc"), "b": frozenset("c")})


@pytest.mark.parametrize("roots", [("core.ui",), ("core",), ("training",)])
def test_no_circle_of_modules(roots: tuple[str, ...]) -> None:
    def within(module: str) -> bool:
        of_page = module.startswith("core.ui")
        return of_page if roots == ("core.ui",) else module.split(".")[0] in roots and not of_page

    arrows = {m: frozenset(filter(within, others)) for m, others in graph().items() if within(m)}
    assert not (found := circle(arrows)), " -> ".join(found)


def test_core_knows_nothing_of_training() -> None:
    assert importers("training", "core") == []


def test_the_engine_knows_nothing_of_the_page() -> None:
    rooms = {module for module in importers("core.ui", "core") if not module.startswith("core.ui")}
    assert rooms == set()
    of_page = [module for module in importers("gradio", "core", "training") if not module.startswith("core.ui")]
    assert of_page == []


@pytest.mark.parametrize("room", ["evaluate", "labels", "sae"])
def test_the_model_is_trained_without_what_is_made_of_it(room: str) -> None:
    assert importers(f"training.{room}", "training.picturebook") == []


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_between_rooms_go_one_way(room: str) -> None:
    package = room.split(".")[0]
    reached = {
        room_of(other)
        for module, others in graph().items()
        if room_of(module) == room
        for other in others
        if other.split(".")[0] == package
    }
    assert reached - {room, package} <= ALLOWED[room]


def test_no_room_is_crowded() -> None:
    n_files = Counter(room_of(module) for module in modules())
    assert {room: n for room, n in n_files.items() if n > MAX_FILES} == {}
