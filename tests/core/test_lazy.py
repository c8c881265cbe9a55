import subprocess
import sys
from pathlib import Path

import pytest

import core


def test_importing_core_imports_no_torch() -> None:
    code = (
        "import sys, core, core.files, core.spec, core.diffusion.schedule, core.diffusion.text, core.errors\n"
        "import core.diffusion.images, core.information.results\n"
        "core.Attribution, core.prepare_image, core.ModelSpec, core.PromptError\n"
        "heavy = [name for name in ('torch', 'diffusers', 'transformers', 'gradio') if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_name_of_the_stub_can_be_had() -> None:
    stub = Path(core.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    names = [line.rpartition(" as ")[2] for line in stub.splitlines() if line]
    assert names
    assert sorted(core.__all__) == sorted(names)
    for name in names:
        assert getattr(core, name) is not None
        assert name in dir(core)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="atribute"):
        core.atribute  # type: ignore[attr-defined]  # noqa: B018
