import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from training.common.options import add_field_options, field_docstrings, field_values


@dataclass(frozen=True)
class Settings:
    """An example."""

    n_images: int = 8
    """Images, 5 % of them
    held out."""
    rate: float = 0.1
    """Learning rate."""
    model: str | None = None
    """A name; None: the default."""
    mode: Literal["fast", "slow"] = "fast"
    """How."""
    folder: Path = Path("here")
    """Where."""
    styles: tuple[str, ...] = ("photo",)
    """Style words."""
    words: dict[str, int] = field(default_factory=dict)


NAMES = ("n_images", "rate", "model", "mode", "folder", "styles")


def parsed(*words: str, **defaults: object) -> Settings:
    parser = argparse.ArgumentParser()
    add_field_options(parser, Settings, NAMES, **defaults)
    return Settings(**field_values(parser.parse_args(words), NAMES))


def test_options_give_back_the_dataclass() -> None:
    assert parsed() == Settings()
    words = "--n-images 3 --rate 1e-3 --model a --mode slow --folder there --styles"
    given = parsed(*words.split())
    assert given == Settings(3, 1e-3, "a", "slow", Path("there"), ())
    assert parsed("--styles", "red", "blue").styles == ("red", "blue")
    assert parsed(styles=("etching",)).styles == ("etching",)


def test_help_is_the_docstring_on_one_line() -> None:
    assert field_docstrings(Settings)["n_images"] == "Images, 5 % of them held out"
    assert "words" not in field_docstrings(Settings)
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_field_options(parser, Settings, NAMES)
    assert "Images, 5 % of them held out (default: 8)" in parser.format_help()
