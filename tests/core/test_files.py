import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.files import write_atomically, write_text

ROOT = Path(__file__).parents[2]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    write_text(path, "old")

    def fail() -> None:
        with write_atomically(path) as part:
            part.write_text("ne", encoding="utf-8")
            assert path.read_text(encoding="utf-8") == "old"
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert path.read_text(encoding="utf-8") == "old"
    with write_atomically(path, shared=True) as part:
        assert part.parent == tmp_path
        assert str(os.getpid()) in part.name
        part.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    code = (
        "import locale, sys; from pathlib import Path; from core.files import write_text\n"
        "assert locale.getpreferredencoding(False).lower() not in ('utf-8', 'utf8')\n"
        "write_text(Path(sys.argv[1]), 'caf\\u00e9')"
    )
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=True, timeout=60, cwd=ROOT, env=environ)
    assert (tmp_path / "x").read_bytes() == b"caf\xc3\xa9"


def text_calls_without_encoding(source: str) -> Iterator[int]:
    """Lines that open, read or write text, or read a command's, in the encoding of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        builtin = isinstance(node.func, ast.Name) and node.func.id == "open"
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        modes += [one.value.value for one in node.keywords if one.arg == "mode" and isinstance(one.value, ast.Constant)]
        as_text = any(ast.unparse(one) in ("text=True", "universal_newlines=True") for one in node.keywords)
        opens = builtin or (method == "open" and any(mode in ("r", "w", "a", "x", "r+", "w+", "a+") for mode in modes))
        if method in ("read_text", "write_text") or as_text or (opens and not any("b" in str(mode) for mode in modes)):
            yield node.lineno


def test_no_text_is_read_or_written_in_the_encoding_of_the_locale() -> None:
    assert list(text_calls_without_encoding("open(p)\np.open('a')\np.read_text()\nrun(a, text=True)")) == [1, 2, 3, 4]
    assert not list(
        text_calls_without_encoding("open(p, 'rb')\np.open('w', encoding='utf-8')\nImage.open(p)\nf(text=x)")
    )
    paths = [ROOT / "app.py", *(ROOT / "core").rglob("*.py"), *(ROOT / "training").rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in paths
        for line in text_calls_without_encoding(path.read_text(encoding="utf-8"))
        if path != ROOT / "core" / "files.py"
    ]
    assert found == []
