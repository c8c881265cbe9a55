import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.sae import selection
from core.sae.selection import by_kernel, kernel_works, largest
from tests import triton_on_cpu

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def try_anew() -> Iterator[None]:
    kernel_works.cache_clear()
    yield
    kernel_works.cache_clear()


def difficult(width: int, dtype: torch.dtype) -> Tensor:
    """Rows with everything that can go wrong in one."""
    generator = torch.Generator().manual_seed(width)
    pre = torch.randn(12, width, generator=generator)
    pre[1] = pre[1].round()  # ties at the edge
    pre[2] = -pre[2].abs()  # nothing is positive
    pre[3] = 0
    pre[4] = -0.0
    pre[5] = 1.5  # all alike
    pre[6, 1:] = -1  # one is positive
    pre[7] *= 1e-30  # subnormal or zero, by precision
    pre[8] *= 1e4
    pre[9, 0] = torch.inf
    pre[10, width - 1] = 100  # the last lane
    pre[11] = torch.linspace(-1, 1, width)
    return pre.to(dtype)


def check(pre: Tensor, values: Tensor, sites: Tensor, k: int) -> None:
    assert values.dtype == pre.dtype
    assert sites.dtype == torch.int64
    assert torch.equal(values.sort(1, descending=True).values, pre.topk(k).values.relu())
    assert torch.equal(pre.gather(1, sites).relu(), values)
    assert all(len(set(row)) == k for row in sites.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "k"), [(64, 5), (100, 1), (37, 37), (129, 20)])
def test_the_kernel_selects_what_topk_does(dtype: torch.dtype, width: int, k: int) -> None:
    pre = difficult(width, dtype)
    with triton_on_cpu.installed():
        values, sites = by_kernel(pre, k)
        assert kernel_works(CPU, dtype, width, k)
    check(pre, values, sites, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_without_a_gpu_topk_selects(dtype: torch.dtype) -> None:
    pre = difficult(64, dtype)
    check(pre, *largest(pre, 5), 5)


def test_what_the_kernel_is_not_made_for_is_left_to_topk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "by_kernel", lambda pre, k: (pre.topk(k).values.relu(), pre.topk(k).indices))
    assert kernel_works(CPU, torch.bfloat16, 2**15, 3)
    assert not kernel_works(CPU, torch.bfloat16, 2**15 + 1, 3)
    assert not kernel_works(CPU, torch.float64, 64, 3)


@pytest.mark.parametrize("fault", ["raises", "values", "backgrounds", "repeats"])
def test_a_kernel_that_fails_or_errs_is_told_once_and_left_alone(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, sites = pre.topk(k)
        values = values.relu()
        if fault == "raises":
            raise RuntimeError("no ptxas")
        if fault == "values":
            values[5] *= 2
        if fault == "backgrounds":
            sites = (sites + 1) % pre.shape[1]
        if fault == "repeats":  # all the same value, all from one place
            sites[20] = sites[20, 0]
            values[20] = values[20, 0]
        return values, sites

    monkeypatch.setattr(selection, "by_kernel", faulty)
    assert not any(kernel_works(CPU, torch.bfloat16, 64, 4) for _ in range(3))
    (record,) = caplog.records
    assert "topk" in record.getMessage()
    assert ("no ptxas" in record.getMessage()) == (fault == "raises")


def test_without_triton_topk_selects_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    if find_spec("triton") is not None:
        pytest.skip("Triton is installed")
    assert not kernel_works(CPU, torch.bfloat16, 64, 4)
    assert not caplog.records


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_tritons_own_interpreter_agrees() -> None:
    script = (
        "import torch; from core.sae.selection import kernel_works\n"
        "for dtype in (torch.bfloat16, torch.float16, torch.float32):\n"
        "    assert kernel_works(torch.device('cpu'), dtype, 200, 20), dtype"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, check=True, timeout=200)
