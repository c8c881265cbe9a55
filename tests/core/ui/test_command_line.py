"""`python app.py`: mistakes on its command line, and what it logs."""

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import app

ROOT = Path(__file__).parents[3]


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        app.parse_args(arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "picturbook"), "Did you mean 'picturebook'?"),
        (("--model", "a/b/c"), "nor a Hub id `owner/name[@revision]`"),
        (("--saes", "no such folder"), "There are no autoencoders 'no such folder'"),
        (("--dtype", "float8"), "choose from"),
        (("--device", "gpu"), "use cpu, cuda, cuda:1 or mps"),
        (("--port", "99999"), "from 1 to 65535"),
        (("--port", "many"), "invalid int value: 'many'"),
        (("--host", "203.0.113.7"), "cannot listen on '203.0.113.7'"),
        (("--hookpoint",), "--hookpoints"),
        (("--colour", "red"), "unrecognized arguments"),
    ],
)
def test_a_mistake_ends_in_one_line_with_the_remedy(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert says in mistake(capsys, *arguments)


def test_a_folder_without_a_model_and_a_used_port_are_mistakes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, used_port: int
) -> None:
    assert "is not a StableDiffusionPipeline folder" in mistake(capsys, "--model", str(tmp_path))
    assert f"Port {used_port} is in use" in mistake(capsys, "--port", str(used_port))


def test_a_mistake_is_the_exit_code_and_shows_no_traceback() -> None:
    command = [sys.executable, "app.py", "--model", "picturbook"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("app.py: There is no model 'picturbook'")
    assert "Traceback" not in done.stderr


def test_only_the_notes_of_libraries_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    loggers = [logging.getLogger(name) for name in app.LIBRARY_NOTES]
    before = [list(logger.filters) for logger in loggers]
    try:
        app.set_up_logging()
        for logger, note in zip(loggers, app.LIBRARY_NOTES.values(), strict=True):
            logger.propagate = True
            logger.warning("A note: %s.", note)
            logger.warning("something else")
    finally:
        for logger, filters in zip(loggers, before, strict=True):
            logger.filters[:] = filters
    assert [record.getMessage() for record in caplog.records] == ["something else"] * len(loggers)
