"""What every measurement takes of a GPU's memory at the size of Stable Diffusion v1.4, with random weights."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import core
from core.diffusion.diffuser import Diffuser
from training.benchmark.full_size import FULL, SMALL, make_pipeline
from training.benchmark.latency import make_diffuser

pytestmark = pytest.mark.gpu

PROMPT = "a cat on the grass"
MOST = 8 * 2**30
"""Bytes, the model's 2.1 GB included."""


@pytest.fixture(scope="module")
def model(device: torch.device) -> Iterator[Diffuser]:
    """Of full size in float16 on CUDA; a small one of its shape elsewhere."""
    is_cuda = device.type == "cuda"
    size = FULL if is_cuda else SMALL
    dtype = torch.float16 if is_cuda else torch.bfloat16
    yield make_diffuser(make_pipeline(size, dtype=dtype, device=device), size, n_steps=5)
    if is_cuda:
        torch.cuda.empty_cache()


MEASURES: dict[str, Callable[[Diffuser, Tensor], Any]] = {
    "generate": lambda model, _: model.generate(PROMPT, seed=0).latents,
    "attribute": lambda model, x: core.attribute(model, x, PROMPT, max_evals=600).maps,
    "decompose": lambda model, x: core.decompose(model, x, PROMPT, "cat", "grass", max_evals=600).redundancy.map,
    "rank_captions": lambda model, x: core.rank_captions(model, x, [PROMPT, "a dog"], max_evals=600).bits,
    "likelihood": lambda model, x: core.likelihood(model, x, PROMPT, max_evals=600).errors,
    "change_word": lambda model, x: core.change_word(model, x, PROMPT, "cat", num_inference_steps=3).change,
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_measurement_fits_into_8_gib(name: str, model: Diffuser) -> None:
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    is_cuda = model.device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    found = MEASURES[name](model, latents)
    assert np.isfinite(np.asarray(found, np.float64)).all()
    if is_cuda:
        peak = torch.cuda.max_memory_allocated(model.device)
        print(f"{name}: {peak / 2**30:.2f} GiB")
        assert peak < MOST
