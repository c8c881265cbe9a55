"""`python app.py`: mistakes on its command line, and what it logs."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        (("--auth", "somebody"), "a name and a password with a colon"),
        (("--auth", "somebody:"), "a name and a password with a colon"),
        (("--auth", "@no such file"), "cannot be read as text"),
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


def test_a_password_is_taken_from_a_file_or_the_environment_and_is_not_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(app.AUTH_VARIABLE, raising=False)
    assert app.parse_args([]).auth == []
    assert app.parse_args(["--auth", "me:a:b"]).auth == [("me", "a:b")]
    (tmp_path / "users").write_text("me:secret\n\nyou: two words \n", encoding="utf-8")
    assert app.parse_args(["--auth", f"@{tmp_path / 'users'}"]).auth == [("me", "secret"), ("you", " two words")]
    monkeypatch.setenv(app.AUTH_VARIABLE, "me:secret")
    assert app.parse_args([]).auth == [("me", "secret")]
    assert app.parse_args(["--auth", "you:other"]).auth == [("you", "other")]
    monkeypatch.setenv(app.AUTH_VARIABLE, "swordfish")
    assert "swordfish" not in mistake(capsys)
    (tmp_path / "users").write_text(" \n")
    assert "is empty" in mistake(capsys, "--auth", f"@{tmp_path / 'users'}")


@pytest.mark.parametrize(
    ("arguments", "warns"),
    [
        ((), ""),
        (("--host", "0.0.0.0"), "this computer on 0.0.0.0 can use this app"),
        (("--share",), "its public link can use this app"),
        (("--host", "0.0.0.0", "--auth", "me:secret"), ""),
    ],
)
def test_an_app_open_to_others_without_a_password_is_warned_about(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], warns: str
) -> None:
    """And it answers to any host name only then."""
    launched: dict[str, Any] = {}

    class Demo:
        def launch(self, **options: Any) -> tuple[None, str, str]:
            launched.update(options)
            return None, "http://here/", ""

        def block_thread(self) -> None:
            pass

    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    monkeypatch.setattr("core.ui.page.build_demo", lambda _: Demo())
    monkeypatch.setattr("core.ui.backend.runtime.Runtime.start", lambda _: None)
    with caplog.at_level(logging.INFO):
        app.main()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert bool(warnings) is bool(warns)
    assert warns in " ".join(warnings)
    (guard,) = launched["app_kwargs"]["middleware"]
    assert bool(guard.kwargs["hosts"]) is not any(name in arguments for name in ("0.0.0.0", "--share"))
    assert launched["auth"] == ([("me", "secret")] if "--auth" in arguments else None)


@pytest.mark.parametrize("module", ["app", "training.__main__"])
def test_threads_sleep_while_they_wait_and_that_is_settled_before_torch_is_there(module: str) -> None:
    code = f"import sys, os, {module}; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    for given, expected in ((None, "PASSIVE False"), ("ACTIVE", "ACTIVE False")):
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        env |= {"OMP_WAIT_POLICY": given} if given else {}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
        assert done.stdout.strip() == expected, done.stderr


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
