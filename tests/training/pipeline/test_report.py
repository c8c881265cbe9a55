import argparse
import json
from pathlib import Path

import pytest

from training.benchmark import run as benchmark
from training.common.report import Origin, Table
from training.common.results import RESULTS, Section, read_stored, render, store
from training.evaluate import run as evaluate
from training.pipeline import report

MADE = Origin("python -m training evaluate layout", "abc1234", "2026-01-01 00:00 UTC", cpu="a processor", n_cores=2)
SECTION = Section("layout", "Layout prediction", "How early.", ("grid", "pixels"))


def table(name: str, figure: str = "0.50 (0.40 to 0.60)") -> Table:
    return Table(name, f"Title of {name}", [{"method": "concepts", "IoU": figure}], ["A note."], {"raw": [0.5]})


def test_the_readmes_show_the_stored_results() -> None:
    """Fails when a result or a description has changed since `python -m training report` was run."""
    for folder, text in report.readmes().items():
        assert report.is_current(folder, text), f"{folder / 'README.md'}: run `python -m training report`"


@pytest.mark.parametrize(
    ("folder", "names"), [(evaluate.HERE, list(evaluate.EVALUATIONS)), (benchmark.HERE, list(benchmark.BENCHMARKS))]
)
def test_every_stored_table_is_shown_with_its_origin(folder: Path, names: list[str]) -> None:
    readme = (folder / "README.md").read_text(encoding="utf-8")
    paths = list((folder / RESULTS).rglob("*.json"))
    assert len(paths) > 5
    for path in paths:
        assert path.parent.name in names
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["table"]["name"] == path.stem
        assert f"### {content['table']['title']}\n" in readme
        assert content["origin"]["command"] in readme
        assert content["origin"]["commit"] in readme


def test_a_stored_table_replaces_the_last_and_changes_the_readme(tmp_path: Path) -> None:
    store(tmp_path, "layout", [table("pixels"), table("grid"), table("another")], MADE)
    assert [one.table.name for one in read_stored(tmp_path, SECTION)] == ["grid", "pixels", "another"]
    assert read_stored(tmp_path, SECTION)[0] == (table("grid"), MADE)
    before = render(tmp_path, "Results", "Intro.", "python -m training evaluate", [SECTION])
    assert "- [Layout prediction](#layout-prediction): `python -m training evaluate layout`" in before
    assert "| concepts | 0.50 (0.40 to 0.60) |" in before
    assert (
        "- `python -m training evaluate layout` at commit abc1234, 2026-01-01 00:00 UTC, on 2 cores of a processor."
        in before
    )
    store(tmp_path, "layout", [table("grid", "0.70 (0.60 to 0.80)")], MADE)
    after = render(tmp_path, "Results", "Intro.", "python -m training evaluate", [SECTION])
    assert after.count("0.70 (0.60 to 0.80)") == 1
    assert after.count("0.50 (0.40 to 0.60)") == 2
    assert not report.is_current(tmp_path, after)
    (tmp_path / "README.md").write_text(before)
    assert not report.is_current(tmp_path, after)
    with pytest.raises(ValueError, match="Several tables are called 'grid'"):
        store(tmp_path, "layout", [table("grid"), table("grid")], MADE)


def test_a_copied_table_says_so() -> None:
    text = Origin("command", "abc1234", "2026-01-01", copied_from="README.md").markdown()
    assert text == "`command`. Copied from `README.md` as of commit abc1234 (2026-01-01), not written by the command."


def test_the_check_fails_on_a_stale_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    monkeypatch.setattr(report, "readmes", lambda: {tmp_path: "new\n"})
    (tmp_path / "README.md").write_text("old\n")
    with pytest.raises(SystemExit, match="out of date"):
        report.main(parser.parse_args(["--check"]))
    report.main(parser.parse_args([]))
    report.main(parser.parse_args(["--check"]))
