"""The Python in the documents runs as it stands, and the README's test line is what CI runs."""

import contextlib
import io
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from core.information import measuring
from core.spec import BUILT_IN

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run_python(document: str) -> str:
    """What the Python in a document prints, its blocks run one after another."""
    source = "\n".join(blocks((ROOT / document).read_text(encoding="utf-8"), "python"))
    assert source
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, document, "exec"), {})
    return printed.getvalue()


@pytest.fixture(params=["quick", pytest.param("whole", marks=pytest.mark.slow)])
def measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of few steps and measurements that end early, or those that the documents show."""
    if request.param == "quick":
        monkeypatch.setattr(measuring, "MAX_REPLICATES", 2)
        few = replace(BUILT_IN["picturebook"], num_inference_steps=13)  # core/README.md records the last of them
        monkeypatch.setitem(BUILT_IN, "picturebook", few)


@pytest.mark.usefixtures("measured")
def test_the_readmes_python_runs_as_it_stands() -> None:
    lines = dict(line.split(maxsplit=1) for line in run_python("README.md").splitlines())
    assert set(lines) == {"a", "cat", "on", "the", "grass"}
    assert all("±" in line for line in lines.values())


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("document", ["core/README.md", "core/information/README.md"])
def test_the_python_of_other_documents_runs_as_it_stands(document: str) -> None:
    run_python(document)


def test_ci_runs_the_readmes_test_line_and_no_other() -> None:
    # The way `.ci/run` finds it, which would silently run nothing if the README changed its shape.
    script = "sed -n '/<!-- test line -->/,/^```$/p' README.md | grep 'pytest'"
    assert script in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = found.stdout.splitlines()
    assert len(lines) == 1
    assert f"{lines[0]}\n" in blocks(README, "bash")
    for part in ("pip install", "ruff check .", "ruff format --check .", "pytest"):  # `test_types.py` runs mypy
        assert part in lines[0]


def test_the_headline_table_has_six_results() -> None:
    # `python -m training report` writes between the marks; tests/training/pipeline/test_report.py checks its figures.
    start, end = README.index("<!-- headline: start -->"), README.index("<!-- headline: end -->")
    rows = [line for line in README[start:end].splitlines() if line.startswith("| ")]
    assert len(rows) == 7
