"""The documents against the code: what they link, the commands and names that they show, and the citation."""

import argparse
import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import app
import core
from training.__main__ import COMMANDS
from training.evaluate.run import EVALUATIONS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", ".github/*.md", "core/**/*.md", "training/**/*.md")
    for path in ROOT.glob(pattern)
)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose_of(document: str) -> str:
    """Without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(document), flags=re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def command_lines(document: str) -> list[list[str]]:
    """The words of every command in the bash blocks, continued lines put together."""
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", text_of(document), flags=re.DOTALL | re.MULTILINE))
    return [shlex.split(line, comments=True) for line in blocks.replace("\\\n", " ").splitlines() if line.strip()]


def training_lines() -> list[tuple[str, list[str]]]:
    """What follows `-m training` in all documents, each with its document."""
    lines = [(document, words) for document in DOCUMENTS for words in command_lines(document)]
    return [(document, words[words.index("training") + 1 :]) for document, words in lines if "training" in words]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose_of(document)):
        path, _, anchor = target.partition("#")
        found = (ROOT / document).parent / path if path else ROOT / document
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_the_training_commands_parse() -> None:
    lines = training_lines()
    assert {words[0] for _, words in lines} >= set(COMMANDS)
    for document, (name, *options) in lines:
        parser = argparse.ArgumentParser(prog=f"{document}: {name}", exit_on_error=False)
        importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
        try:
            arguments = parser.parse_args(options)
        except (argparse.ArgumentError, SystemExit) as error:
            pytest.fail(f"{document}: {name} {shlex.join(options)}: {error}")
        recipe = getattr(arguments, "recipe", None)
        assert recipe is None or (ROOT / recipe).is_file(), f"{document}: there is no {recipe}"


def test_the_app_commands_parse() -> None:
    found = [match for document in DOCUMENTS for match in re.findall(r"python app\.py([^`\n]*)", text_of(document))]
    assert len(found) > 3
    for options in found:
        app.build_parser().parse_args(shlex.split(options))


def test_every_command_evaluation_and_recipe_is_described() -> None:
    training = text_of("training/README.md")
    for name in COMMANDS:
        assert f"## {name}\n" in training
    for name in EVALUATIONS:
        assert f"| `{name}` |" in training
    recipes = text_of("training/recipes/README.md")
    for path in (ROOT / "training" / "recipes").iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in recipes


def test_dotted_names_in_the_documents_exist() -> None:
    names = {name for document in DOCUMENTS for name in re.findall(r"\bcore(?:\.[A-Za-z_]\w*)+", text_of(document))}
    assert "core.attribute" in names
    for dotted in names:
        found, *rest = core, *dotted.split(".")[1:]
        for i, name in enumerate(rest):
            if not hasattr(found, name):
                importlib.import_module(".".join(["core", *rest[: i + 1]]))
            found = getattr(found, name)


def test_the_design_lists_every_public_name() -> None:
    listed = re.findall(r"`(\w+)`", text_of("core/README.md").partition("## Public names")[2].partition("## Files")[0])
    iterators = {name for name in core.__all__ if name.endswith("_iter")}
    assert set(core.__all__) - iterators <= set(listed)
    assert {name.removesuffix("_iter") for name in iterators} <= set(listed)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load(text_of("CITATION.cff"))
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
