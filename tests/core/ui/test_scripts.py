"""The page's scripts: their types, checked by TypeScript's compiler."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ASSETS = Path(__file__).parents[3] / "core" / "ui" / "assets"


@pytest.fixture
def tsc() -> list[str]:
    """The compiler: one that is installed, or else the one that `npx` fetches from the npm registry."""
    if installed := shutil.which("tsc"):
        return [installed]
    if (npx := shutil.which("npx")) is None:
        pytest.skip("needs Node.js")
    return [npx, "-y", "-p", "typescript@5", "tsc"]


def test_every_script_is_checked() -> None:
    for script in ASSETS.glob("*.js"):
        assert script.read_text(encoding="utf-8").startswith("// @ts-check\n"), script.name


def test_the_types_of_the_scripts(tsc: list[str]) -> None:
    """The same as `npx -y -p typescript@5 tsc -p core/ui/assets/jsconfig.json`."""
    done = subprocess.run([*tsc, "-p", str(ASSETS / "jsconfig.json")], capture_output=True, text=True, timeout=240)
    if done.returncode != 0 and "error TS" not in done.stdout and "CI" not in os.environ:
        pytest.skip(f"npx cannot fetch TypeScript: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stdout + done.stderr
