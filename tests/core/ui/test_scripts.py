"""The page's scripts: their types, checked by TypeScript's compiler."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ASSETS = Path(__file__).parents[3] / "core" / "ui" / "assets"


def test_every_script_is_checked() -> None:
    for script in ASSETS.glob("*.js"):
        assert script.read_text(encoding="utf-8").startswith("// @ts-check\n"), script.name


def test_the_types_of_the_scripts() -> None:
    """`npx -y -p typescript@5 tsc -p core/ui/assets/jsconfig.json`, or a `tsc` that is installed."""
    tsc, npx = shutil.which("tsc"), shutil.which("npx")
    if tsc:
        command = [tsc]
    elif npx and "CI" in os.environ:
        command = [npx, "-y", "-p", "typescript@5", "tsc"]
    else:
        pytest.skip("needs `tsc` (npm install -g typescript@5), or CI set and npx to fetch it")
    done = subprocess.run([*command, "-p", str(ASSETS / "jsconfig.json")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
