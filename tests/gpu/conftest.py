"""Models on the GPU, or elsewhere by `--device`, and the same in float32 on the CPU to hold them against."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import core
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import Generation

PROMPT = "a cat on the grass"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where the GPU suite computes; cpu shows that it runs at all")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    found = torch.device(request.config.getoption("--device", default="cuda"))
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device; --device cpu shows that the suite runs")
    return found


@pytest.fixture(scope="session")
def reference() -> Diffuser:
    """`picturebook` in float32 on the CPU."""
    return core.load_model("picturebook", device="cpu", dtype="float32")


@pytest.fixture(scope="session", params=["float16", "bfloat16"])
def narrow(request: pytest.FixtureRequest, device: torch.device) -> Diffuser:
    """`picturebook` in half precision on the GPU."""
    return core.load_model("picturebook", device=device, dtype=request.param)


@pytest.fixture(scope="session")
def drawn(reference: Diffuser) -> Generation:
    """A picture of the reference."""
    return reference.generate(PROMPT, seed=0, previews=False)


@pytest.fixture
def accelerate_forgets() -> Iterator[None]:
    """Its precision is the process's: each training wants its own."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
