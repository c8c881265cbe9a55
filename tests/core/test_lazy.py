import subprocess
import sys

import pytest

import core


def test_importing_core_imports_no_torch() -> None:
    code = (
        "import sys, core, core.spec, core.diffusion.schedule, core.diffusion.text, core.errors, core.diffusion.images, core.information.results\n"
        "core.Attribution, core.prepare_image, core.ModelSpec, core.PromptError\n"
        "heavy = [name for name in ('torch', 'diffusers', 'transformers', 'gradio') if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_can_be_had() -> None:
    assert sorted(core.__all__) == sorted(core._HOME)
    for name in core.__all__:
        assert getattr(core, name) is not None
        assert name in dir(core)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atribute'"):
        core.atribute  # noqa: B018
