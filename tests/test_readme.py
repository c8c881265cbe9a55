import contextlib
import io
import re
import subprocess
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_in_the_readme_runs_as_it_stands() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n".join(blocks("python")), "README.md", "exec"), {})
    lines = dict(line.split(maxsplit=1) for line in printed.getvalue().splitlines())
    assert set(lines) == {"a", "cat", "on", "the", "grass"}
    assert all("±" in line for line in lines.values())


def test_ci_runs_the_readmes_test_line_and_no_other() -> None:
    # The way `.ci/run` finds it, which would silently run nothing if the README changed its shape.
    script = "sed -n '/<!-- test line -->/,/^```$/p' README.md | grep 'pytest'"
    assert script in (Path(__file__).parent.parent / ".ci" / "run").read_text()
    found = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    lines = found.stdout.splitlines()
    assert len(lines) == 1
    assert f"{lines[0]}\n" in blocks("bash")
    for part in ("pip install", "ruff check .", "ruff format --check .", "mypy", "pytest"):
        assert part in lines[0]


def test_what_the_readme_shows_exists() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
