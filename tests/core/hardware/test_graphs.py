"""Whatever is done to a model, its replayed calls are what they would be without graphs."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from core.activations.attention import record_attention
from core.activations.hooks import edit, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.diffusion.predictor import Conditions
from core.diffusion.text_encoder import MASK, TEXT
from core.hardware import graphs
from core.hardware.graph_capture import Output, Work
from core.hardware.graphs import MAX_BATCH, N_EAGER, CallGraphs
from tests.fakes.taped import TapeCapture

MIDDLE = "mid_block.attentions.0"
N_BLOCKS = 14
"""Residual and attention blocks and changes of size in the small U-Net."""


@pytest.fixture
def fast(model_folder: Path) -> Iterator[Diffuser]:
    """The small model with graphs on tape."""
    model = load_model(model_folder, device="cpu")
    assert not model.graphs.enabled
    model.predictor.graphs = CallGraphs(model.unet, capture=TapeCapture)
    yield model
    assert not any("forward" in vars(module) for module in model.unet.modules()), "the U-Net is not as it was"


def call(model: Diffuser, n: int = 2, seed: int = 0, log_snr: float = 0.5) -> Tensor:
    x = torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    texts = ["a cat on the grass", "a dog", "", "a red ship"] * 4
    return model.predict_noise(x, torch.linspace(log_snr, 1, n), model.encode_text(texts[seed : seed + n]))


def eagerly(model: Diffuser, work: Callable[[], Any]) -> Any:
    kept, model.graphs.enabled = model.graphs.enabled, False
    try:
        return work()
    finally:
        model.graphs.enabled = kept


def warm(model: Diffuser, n: int = 2) -> None:
    for _ in range(N_EAGER + 1):
        call(model, n)


def test_a_replayed_call_is_the_call_to_the_bit_and_its_output_stays(fast: Diffuser) -> None:
    warm(fast)
    assert (fast.graphs.n_captured, fast.graphs.n_replayed) == (1, 0)
    outputs = [call(fast, seed=seed, log_snr=seed - 1.0) for seed in range(3)]
    assert (fast.graphs.n_captured, fast.graphs.n_replayed) == (1, 3)
    for seed, output in enumerate(outputs):
        assert torch.equal(output, eagerly(fast, lambda seed=seed: call(fast, seed=seed, log_snr=seed - 1.0)))
    assert not torch.equal(outputs[0], outputs[1])


def test_an_image_is_the_same_with_graphs_and_one_graph_serves_all_its_steps(fast: Diffuser) -> None:
    def draw() -> Tensor:
        return fast.generate("a cat on the grass", seed=1, num_inference_steps=6, previews=False).latents

    drawn = draw()
    assert (fast.graphs.n_captured, fast.graphs.n_replayed) == (1, 6 - N_EAGER - 1)
    assert torch.equal(drawn, eagerly(fast, draw))


def test_calls_of_other_shapes_texts_and_masks_have_graphs_of_their_own_and_large_calls_none(fast: Diffuser) -> None:
    warm(fast, 2)
    warm(fast, 3)
    assert fast.graphs.n_captured == 2
    warm(fast, MAX_BATCH + 1)
    assert fast.graphs.n_captured == 2
    x, text = torch.ones(2, *fast.latent_shape), fast.text_embeddings(["a cat", "a dog"])
    longer = torch.cat([text, torch.nn.functional.pad(text[:1], (0, 0, 0, 0, 0, 1))[:2]], 1)
    masked = Conditions({TEXT: longer, MASK: longer.any(-1)})

    def with_mask() -> Tensor:
        return fast.predict_noise(x, torch.zeros(2), masked)

    outputs = [with_mask() for _ in range(N_EAGER + 2)]
    assert fast.graphs.n_captured == 3
    assert all(torch.equal(output, eagerly(fast, with_mask)) for output in outputs)


def test_only_the_most_recently_used_graphs_are_kept(fast: Diffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    for n in (1, 2, 3):
        warm(fast, n)
    call(fast, 2)
    call(fast, 3)
    assert (fast.graphs.n_captured, fast.graphs.n_replayed) == (3, 2)
    call(fast, 1)  # was dropped, and is recorded again
    assert (fast.graphs.n_captured, fast.graphs.n_replayed) == (4, 2)
    call(fast, 2)  # of 2 and 3, it was used longer ago
    assert (fast.graphs.n_captured, fast.graphs.n_replayed) == (5, 2)


def test_a_recording_after_a_graph_sees_every_update(fast: Diffuser) -> None:
    warm(fast)

    def recorded() -> dict[Any, Tensor]:
        with record(fast) as updates:
            for seed in range(5):
                call(fast, seed=seed)
            fast.generate("a cat", seed=2, num_inference_steps=5, previews=False)
        return dict(updates)

    replayed = recorded()
    assert fast.graphs.n_captured == 1 + N_BLOCKS  # of the U-Net, and of its blocks
    assert fast.graphs.n_replayed > 5 * N_BLOCKS
    plain = eagerly(fast, recorded)
    assert replayed.keys() == plain.keys()
    assert len(replayed) == 3 * (2 * 5 + 1)
    assert all(torch.equal(replayed[key], plain[key]) for key in plain)


def test_an_edit_after_a_graph_changes_what_it_would_and_none_leaves_the_bits(fast: Diffuser) -> None:
    def draw(*contexts: Any) -> Tensor:
        return fast.generate("a cat", num_inference_steps=5, previews=False, contexts=contexts).latents

    plain = draw()
    for _ in range(2):
        assert torch.equal(draw(edit(fast, lambda _, update: update.clone())), plain)
        doubled = draw(edit(fast, lambda _, update: 2 * update))
        assert not torch.allclose(doubled, plain)
    assert torch.equal(doubled, eagerly(fast, lambda: draw(edit(fast, lambda _, update: 2 * update))))
    assert fast.graphs.n_captured == 1 + N_BLOCKS


def test_hooks_inside_a_block_have_it_run_module_by_module_and_the_other_blocks_not(fast: Diffuser) -> None:
    warm(fast)
    seen: list[Tensor] = []
    inner = fast.unet.get_submodule(MIDDLE).transformer_blocks[0].attn2
    handle = inner.register_forward_hook(lambda *call: seen.append(call[-1]))
    outputs = [call(fast, seed=seed) for seed in range(5)]
    assert len(seen) == 5
    assert fast.graphs.n_captured == 1 + N_BLOCKS - 1
    handle.remove()
    assert all(torch.equal(output, call(fast, seed=seed)) for seed, output in enumerate(outputs))
    assert len(seen) == 5


def test_a_hook_on_the_whole_unet_and_a_global_one_see_every_call(fast: Diffuser) -> None:
    warm(fast)
    seen: list[str] = []
    handle = fast.unet.register_forward_pre_hook(
        lambda _, args, kwargs: ((0 * args[0], *args[1:]), kwargs), with_kwargs=True
    )
    emptied = call(fast)
    handle.remove()
    assert fast.graphs.n_replayed == 1  # it is called outside the forward, which is replayed
    assert not torch.equal(emptied, call(fast))
    n = fast.graphs.n_replayed
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append("module"))
    call(fast)
    everywhere.remove()
    assert fast.graphs.n_replayed == n
    assert len(seen) > 100


def test_attention_is_recorded_after_a_graph_and_other_processors_run(fast: Diffuser) -> None:
    warm(fast)
    with record_attention(fast) as maps:
        for seed in range(4):
            call(fast, seed=seed)
            kept = maps[MIDDLE, "cond", None]
            with record_attention(fast) as plain:
                eagerly(fast, lambda seed=seed: call(fast, seed=seed))
            assert torch.equal(kept, plain[MIDDLE, "cond", None])
    called: list[int] = []

    class Own(AttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            called.append(1)
            return super().__call__(*args, **kwargs)

    unet: Any = fast.unet
    before = dict(unet.attn_processors)
    unet.set_attn_processor(Own())
    for _ in range(5):
        call(fast)
    assert len(called) == 5 * len(before)
    unet.set_attn_processor(AttnProcessor())  # diffusers' own, but another: the old graph is of no use
    n = fast.graphs.n_captured
    warm(fast)
    assert fast.graphs.n_captured == n + 1


@pytest.mark.parametrize("change", ["dtype", "weights", "module", "setting"])
def test_graphs_of_what_the_unet_no_longer_is_are_dropped(fast: Diffuser, change: str) -> None:
    warm(fast)
    unet: Any = fast.unet
    if change == "dtype":
        torch.nn.Module.to(unet, torch.float64)
        torch.nn.Module.to(unet, torch.float32)  # the same values in other memory
    elif change == "weights":
        unet.conv_in.weight = torch.nn.Parameter(unet.conv_in.weight * 2, requires_grad=False)
    elif change == "module":
        unet.conv_act = torch.nn.Tanh()
    else:
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    output = call(fast)
    assert (fast.graphs.n_captured, fast.graphs.n_replayed) == (1, 0)
    assert torch.equal(output, eagerly(fast, lambda: call(fast)))
    call(fast)
    call(fast)
    assert fast.graphs.n_captured == 2


def test_weights_written_in_place_are_followed(fast: Diffuser) -> None:
    warm(fast)
    before = call(fast)
    with torch.no_grad():
        fast.unet.conv_in.weight.mul_(2)
    after = call(fast)
    assert (fast.graphs.n_captured, fast.graphs.n_replayed) == (1, 2)
    assert not torch.equal(before, after)
    assert torch.equal(after, eagerly(fast, lambda: call(fast)))


def test_float32_for_a_while_leaves_no_graph_of_either(model_folder: Path) -> None:
    narrow = load_model(model_folder, device="cpu", dtype="bfloat16")
    narrow.predictor.graphs = CallGraphs(narrow.unet, capture=TapeCapture)
    warm(narrow)
    before = call(narrow)
    with narrow.in_float32():
        wide = call(narrow)
        assert narrow.graphs.n_replayed == 1
        warm(narrow)
        assert torch.equal(call(narrow), wide)
        assert narrow.graphs.n_captured == 2
    n = narrow.graphs.n_replayed
    assert torch.equal(call(narrow), before)
    assert narrow.graphs.n_replayed == n
    assert not torch.equal(wide, before)


def test_modules_and_forwards_of_other_libraries_are_never_recorded(fast: Diffuser) -> None:
    class Adapter(torch.nn.Conv2d):
        """As an adapter it has a setting that Python reads at every call."""

        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    unet: Any = fast.unet
    adapter = Adapter(8, 16, 3, padding=1).eval().requires_grad_(False)
    adapter.load_state_dict(unet.conv_in.state_dict())
    unet.conv_in = adapter
    warm(fast)
    one = call(fast)
    assert fast.graphs.n_captured == N_BLOCKS  # not the whole, of which the adapter is a part
    adapter.scale = 2.0
    assert not torch.equal(call(fast), one)
    captured, replayed = fast.graphs.n_captured, fast.graphs.n_replayed
    unet.forward = lambda *args, **kwargs: type(unet).forward(unet, *args, **kwargs)  # as accelerate does
    warm(fast)
    assert (fast.graphs.n_captured, fast.graphs.n_replayed) == (captured, replayed)
    del unet.forward


def test_offloaded_models_have_no_graphs(model_folder: Path) -> None:
    assert not load_model(model_folder, device="cpu", offload=True).graphs.enabled


class Broken:
    """Records nothing."""

    def __call__(self, work: Work, inputs: Sequence[Tensor]) -> Callable[[], Output]:
        del work, inputs
        raise torch.OutOfMemoryError("CUDA out of memory.")


class Wrong:
    """Replays zeros."""

    def __call__(self, work: Work, inputs: Sequence[Tensor]) -> Callable[[], Output]:
        zeros = tuple(torch.zeros_like(output) for output in work(*inputs))
        return lambda: zeros


@pytest.mark.parametrize("capture", [Broken, Wrong])
def test_what_cannot_be_recorded_runs_as_before_and_is_logged_once(
    fast: Diffuser, capture: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fast.predictor.graphs = CallGraphs(fast.unet, capture=capture)
    with caplog.at_level(logging.WARNING, "core.hardware.graphs"):
        outputs = [call(fast) for _ in range(5)]
        with record(fast) as updates:
            call(fast)
    assert len(updates) == 3
    assert len(caplog.records) == 1
    assert "graphs of the U-Net are off" in caplog.text
    assert not fast.graphs.enabled
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_inference_mode_and_threads_are_no_trap(fast: Diffuser) -> None:
    with torch.inference_mode():
        warm(fast)
        inside = call(fast)
    assert fast.graphs.n_replayed == 1
    assert torch.equal(call(fast), inside)
    seen: list[bool] = []

    # Another thread that calls the U-Net while this one's call is replayed gets no graph of this one's.
    def other() -> None:
        n = fast.graphs.n_replayed
        seen.append(torch.equal(call(fast), inside) and fast.graphs.n_replayed == n)

    handle = fast.unet.register_forward_pre_hook(lambda *_: _run(other) if not seen else None)

    def _run(work: Callable[[], None]) -> None:
        seen.append(True)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    assert torch.equal(call(fast), inside)
    handle.remove()
    assert seen == [True, True]


def test_cleared_graphs_give_their_memory_back(fast: Diffuser) -> None:
    made: list[weakref.ref[Any]] = []

    class Noted(TapeCapture):
        def __init__(self) -> None:
            made.append(weakref.ref(self))

        def __call__(self, work: Work, inputs: Sequence[Tensor]) -> Callable[[], Output]:
            replay = super().__call__(work, inputs)
            made.append(weakref.ref(replay))
            return replay

    fast.predictor.graphs = CallGraphs(fast.unet, capture=Noted)
    warm(fast)
    assert all(held() is not None for held in made)
    fast.graphs.clear()
    gc.collect()
    assert [held() for held in made] == [None, None]
    warm(fast)
    assert fast.graphs.n_captured == 2
