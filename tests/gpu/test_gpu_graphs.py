"""CUDA graphs change the time of a call and nothing else: results are compared to the bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from core.activations.hooks import edit, record
from core.diffusion.diffuser import Diffuser
from core.hardware.graphs import N_EAGER, CallGraphs
from tests.fakes.taped import TapeCapture
from tests.gpu.conftest import PROMPT

pytestmark = pytest.mark.gpu


@pytest.fixture
def fast(narrow: Diffuser) -> Iterator[Diffuser]:
    """A model whose small calls are replayed: from CUDA graphs, or elsewhere than on a GPU from tape."""
    before = narrow.graphs
    narrow.predictor.graphs = (
        CallGraphs(narrow.unet) if narrow.device.type == "cuda" else CallGraphs(narrow.unet, capture=TapeCapture)
    )
    yield narrow
    narrow.graphs.clear()
    narrow.predictor.graphs = before


def draw(model: Diffuser, *contexts: Any) -> Tensor:
    *_, last = model.sample([PROMPT], seeds=[0], num_inference_steps=N_EAGER + 3, contexts=contexts)
    return last.x


def anew(model: Diffuser, work: Callable[[], Any]) -> Any:
    model.graphs.enabled = False
    try:
        return work()
    finally:
        model.graphs.enabled = True


def test_images_are_the_same_with_graphs(fast: Diffuser) -> None:
    first, second = draw(fast), draw(fast)
    assert fast.graphs.enabled, "recording failed; the log says why"
    assert (fast.graphs.n_captured, fast.graphs.n_replayed) == (1, 2 + N_EAGER + 3)
    plain = anew(fast, lambda: draw(fast))
    assert torch.equal(first, plain)
    assert torch.equal(second, plain)


def test_recordings_and_edits_after_a_graph_are_complete(fast: Diffuser) -> None:
    plain = draw(fast)

    def recorded() -> dict[Any, Tensor]:
        with record(fast) as updates:
            assert torch.equal(draw(fast), plain)
        return dict(updates)

    replayed, launched = recorded(), anew(fast, recorded)
    assert fast.graphs.enabled, "recording failed; the log says why"
    assert fast.graphs.n_captured > 10  # of the blocks, too
    assert replayed.keys() == launched.keys()
    assert all(torch.equal(replayed[key], launched[key]) for key in launched)

    def edited() -> Tensor:
        return draw(fast, edit(fast, lambda _, update: 2 * update))

    assert torch.equal(edited(), anew(fast, edited))
    assert not torch.equal(edited(), plain)


def test_float32_for_a_while_and_back(fast: Diffuser) -> None:
    plain = draw(fast)
    with fast.in_float32():
        wide = draw(fast)
        assert torch.equal(draw(fast), anew(fast, lambda: draw(fast)))
    assert not torch.equal(wide, plain)
    assert torch.equal(draw(fast), plain)
    assert torch.equal(draw(fast), plain)
    assert fast.graphs.enabled, "recording failed; the log says why"


def test_other_batches_and_texts_do_not_mix(fast: Diffuser) -> None:
    def outputs() -> list[Tensor]:
        made = []
        for turn in range(N_EAGER + 3):
            for n in (1, 2, 5):
                x = torch.randn(n, *fast.latent_shape, generator=torch.Generator().manual_seed(10 * turn + n))
                texts = [PROMPT, "", "a dog", "a ship in the sea", "a tree"][turn % 2 : turn % 2 + n]
                texts += [""] * (n - len(texts))
                made.append(fast.predict_noise(x, torch.linspace(-3, turn, n), fast.encode_text(texts)))
        return made

    replayed, launched = outputs(), anew(fast, outputs)
    assert fast.graphs.n_captured == 3
    assert all(torch.equal(a, b) for a, b in zip(replayed, launched, strict=True))


def test_cleared_graphs_give_back_their_memory(fast: Diffuser) -> None:
    if fast.device.type != "cuda":
        pytest.skip("memory is counted on CUDA alone")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(fast.device)
    draw(fast)
    assert torch.cuda.memory_reserved(fast.device) > before
    fast.graphs.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(fast.device) <= before + 2**26
