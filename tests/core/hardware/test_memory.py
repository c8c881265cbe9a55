"""How many rows go through a network at once, and what happens when memory runs out in the middle."""

import logging
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import core
from core.activations.hooks import ActivationKey, edit, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.errors import ModelError, OutOfMemory
from core.hardware import memory
from core.hardware.batch_sizer import BatchSizer, Load, is_out_of_memory
from core.hardware.memory import GIB, DeviceMemory
from core.information.quadrature import Sampler

PROMPT = "a cat on the grass"
FEW = Sampler(n_points=4, min_replicates=2)
LOAD = Load("the U-Net", torch.float16)
OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.\nGPU 0 has ...")


class FakeMemory:
    """A device on which a row of a call takes `per_row` bytes, and calls make themselves known by `rows`."""

    def __init__(self, available: int | None, per_row: int = 10, fixed: int = 0, measurable: bool = True) -> None:
        self.left, self.per_row, self.fixed, self.measurable = available, per_row, fixed, measurable
        self.calls: list[int] = []
        self.released = 0

    def __str__(self) -> str:
        return "a small device"

    def available(self) -> int | None:
        return self.left

    def measure(self, call: Callable[[], object]) -> int:
        self.calls.clear()
        call()
        return self.fixed + self.per_row * max(self.calls)

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def small(model_folder: Path) -> Diffuser:
    """A model of which nothing has been measured yet."""
    return load_model(model_folder, device="cpu")


def sizer(available: int | None, per_row: int = 10, fixed: int = 0, measurable: bool = True) -> BatchSizer:
    return BatchSizer(FakeMemory(available, per_row, fixed, measurable))


def probe_of(one: BatchSizer) -> Callable[[int], None]:
    fake: Any = one.memory
    return lambda n: fake.calls.append(n)


def out_of_memory_above(model: Diffuser, n: int, part: str = "predictor.call") -> list[int]:
    """From now on a call of more than n rows fails; the sizes of all calls that were tried."""
    owner, _, name = part.partition(".")
    target = getattr(model, owner)
    plain, tried = getattr(target, name), []

    def call(x: Tensor, *args: Any) -> Any:
        tried.append(len(x))
        if len(x) > n:
            if part == "predictor.call":  # as the real one, which counts before it computes
                model.predictor.n_calls += 1
                model.predictor.n_rows += len(x)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.\nGPU 0 has ...")
        return plain(x, *args)

    setattr(target, name, call)
    return tried


# --- how many fit -----------------------------------------------------------------------------------------------------


def test_as_many_rows_fit_as_a_further_one_was_measured_to_take() -> None:
    one = sizer(available=1000, per_row=90, fixed=300)
    assert one.fits(LOAD, 32, 1, probe_of(one)) == 7  # (1000 - 300) / 90
    assert one.fits(LOAD, 5, 1, probe_of(one)) == 5
    one.memory.left = 2000  # type: ignore[attr-defined]
    assert one.fits(LOAD, 32, 1, probe_of(one)) == 18
    one.memory.left = 5  # type: ignore[attr-defined]
    assert one.fits(LOAD, 32, 1, probe_of(one)) == 1  # which may fail; the sizer does not refuse


def test_a_kind_of_call_is_measured_once_and_another_again() -> None:
    one = sizer(available=1000)
    probed: list[int] = []

    def probe(n: int) -> None:
        probed.append(n)
        probe_of(one)(n)

    for load in (LOAD, LOAD, LOAD._replace(n_tokens=154), LOAD._replace(dtype=torch.float32), LOAD):
        one.fits(load, 32, 1, probe)
    assert probed == [1, 1, 2] * 3
    one.fits(LOAD._replace(n_tokens=231), 1, 1, probe)
    assert len(probed) == 9  # one row is not worth a measurement


def test_a_measurement_below_the_estimate_is_not_believed() -> None:
    one = sizer(available=1000, per_row=0, fixed=0)
    assert one.fits(LOAD, 32, 100, probe_of(one)) == 10


def test_an_estimate_is_used_where_nothing_can_be_measured() -> None:
    one = sizer(available=1000, measurable=False)
    assert one.fits(LOAD, 32, 100, lambda _: pytest.fail("a call for nothing")) == 8  # 1.25 times the estimate
    assert sizer(None, measurable=False).fits(LOAD, 32, 100, lambda _: None) == 32  # nobody knows what is free


def test_a_measurement_that_runs_out_of_memory_leaves_one_row_at_a_time() -> None:
    one = sizer(available=1000)

    def probe(n: int) -> None:
        if n > 1:
            raise OUT
        probe_of(one)(n)

    assert one.fits(LOAD, 32, 1, probe) == 1
    with pytest.raises(RuntimeError, match="some other"):
        sizer(1000).fits(LOAD, 32, 1, lambda _: (_ for _ in ()).throw(RuntimeError("some other")))


# --- running out ------------------------------------------------------------------------------------------------------


def test_a_batch_is_halved_until_it_fits_and_nothing_is_computed_twice(caplog: pytest.LogCaptureFixture) -> None:
    one, computed = sizer(1000), []

    def compute(part: slice) -> list[int]:
        if part.stop - part.start > 3:
            raise OUT
        computed.extend(range(part.start, part.stop))
        return list(range(part.start, part.stop))

    with caplog.at_level(logging.WARNING, "core"):
        results = one.run(LOAD, 20, 16, compute)
    assert [row for result in results for row in result] == list(range(20)) == computed
    (line,) = caplog.messages
    assert line == "a small device: the U-Net ran out of memory with a batch of 16; going on with 2"
    assert one.memory.released == 3  # type: ignore[attr-defined]
    assert one.learned(LOAD, 16) == 2  # and the next batch does not try again
    one.memory.left = 2000  # type: ignore[attr-defined]
    assert one.learned(LOAD, 16) == 16  # until there is twice as much


def test_memory_may_run_out_in_the_middle() -> None:
    one, calls = sizer(1000), []

    def compute(part: slice) -> range:
        calls.append((part.start, part.stop))
        if len(calls) == 2:
            raise OUT
        return range(part.start, part.stop)

    results = one.run(LOAD, 12, 4, compute)
    assert [row for result in results for row in result] == list(range(12))
    assert calls == [(0, 4), (4, 8), (4, 6), (6, 8), (8, 10), (10, 12)]


def test_where_not_even_one_fits_the_error_says_what_to_do() -> None:
    one = sizer(2 * GIB)

    def compute(_: slice) -> None:
        raise OUT

    with pytest.raises(OutOfMemory, match="a small device has too little memory for the U-Net with a batch of 1 ") as e:
        one.run(LOAD, 4, 4, compute, remedy="Buy some.")
    assert str(e.value).endswith(
        "(2.0 GiB are left for it): CUDA out of memory. Tried to allocate 12.00 GiB. Buy some."
    )
    with pytest.raises(OutOfMemory, match="with a batch of 4 "):
        one.run(LOAD, 4, 4, compute, whole=True)


def test_the_failed_calls_tensors_are_free_before_the_next_call() -> None:
    one, alive = sizer(1000), []

    class Activation:
        def __del__(self) -> None:
            alive.remove(id(self))

    def compute(part: slice) -> int:
        assert not alive
        activation = Activation()
        alive.append(id(activation))
        if part.stop - part.start > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return part.start

    assert one.run(LOAD, 4, 4, compute) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("whatever"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (OutOfMemory("cuda:0", "the U-Net", 4, None, "", ""), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_recognised(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


# --- with a model -----------------------------------------------------------------------------------------------------


def latents() -> Tensor:
    return torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(3))


def attributed(model: Diffuser) -> Any:
    a = core.attribute(model, latents(), PROMPT, sampler=FEW, max_evals=60)
    return a.maps, a.bits, a.timeline.bits, a.n_evals


def decomposed(model: Diffuser) -> Any:
    d = core.decompose(model, latents(), PROMPT, "cat", "grass", sampler=FEW, max_evals=60)
    return d.redundancy.map, d.unique[0].map, d.synergy.bits, d.n_evals


def ranked(model: Diffuser) -> Any:
    r = core.rank_captions(model, latents(), [PROMPT, "a dog on the sea"], sampler=FEW, max_evals=60)
    return r.bits, r.ahead, r.n_evals


def expected(model: Diffuser) -> Any:
    found = core.likelihood(model, latents(), PROMPT, sampler=Sampler(n_points=4, min_replicates=2), max_evals=40)
    return found.bits_per_dim, found.gain, found.errors, found.n_evals


def changed(model: Diffuser) -> Any:
    c = core.change_word(model, latents(), PROMPT, "cat", num_inference_steps=3)
    return c.change, c.reconstruction_error, c.relative_change, c.n_evals


def drawn(model: Diffuser) -> Any:
    return model.generate(PROMPT, seed=1, num_inference_steps=3, previews=False).latents.numpy(), 6


def sampled(model: Diffuser) -> Any:
    *_, last = model.sample([PROMPT, "a dog", "a ship"], seeds=[1, 2, 3], num_inference_steps=3)
    return last.x.numpy(), 18


FUNCTIONS = [attributed, decomposed, ranked, expected, changed, drawn, sampled]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_finds_the_same_when_memory_runs_out(
    function: Callable[[Diffuser], Any], small: Diffuser, caplog: pytest.LogCaptureFixture
) -> None:
    *before, n_before = function(small)
    rows = small.n_unet_rows
    assert rows == n_before
    tried = out_of_memory_above(small, 1)
    with caplog.at_level(logging.WARNING, "core"):
        *after, n_after = function(small)
    assert n_after == n_before == small.n_unet_rows - rows  # failed calls count for nothing, and none is made twice
    assert max(tried) > 1
    assert sum(n for n in tried if n == 1) == n_after
    (line,) = caplog.messages
    assert line.startswith("the CPU: the U-Net ran out of memory with a batch of ")
    assert line.endswith("; going on with 1")
    for new, old in zip(after, before, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_says_what_to_do_when_no_latent_fits_and_frees_the_model(
    function: Callable[[Diffuser], Any], small: Diffuser
) -> None:
    out_of_memory_above(small, 0)
    with pytest.raises(OutOfMemory, match=r"the CPU has too little memory for the U-Net with a batch of 1 .*offload"):
        function(small)
    assert not small._lock.is_held


@pytest.mark.parametrize("function", [attributed, decomposed, ranked, expected])
def test_the_float32_reference_of_a_narrow_model_takes_as_many_latents_as_it_was_measured_to_have_room_for(
    function: Callable[[Diffuser], Any], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(model_folder, device="cpu", dtype="bfloat16")
    fake = FakeMemory(available=4000, per_row=100)
    model.sizer.memory = fake
    monkeypatch.setattr("core.diffusion.unet_predictor._MAPS_PER_LATENT", 0)
    plain, calls = model.predictor.call, {torch.bfloat16: [0], torch.float32: [0]}

    def predict(x: Tensor, *args: Any) -> Tensor:
        fake.per_row = 1500 if model.dtype == torch.float32 else 100
        fake.calls.append(len(x))
        calls[model.dtype].append(len(x))
        return plain(x, *args)

    monkeypatch.setattr(model.predictor, "call", predict)
    *_, n_evals = function(model)
    assert max(calls[torch.float32]) == 2
    assert 2 < max(calls[torch.bfloat16]) <= 32
    assert sum(map(sum, calls.values())) == n_evals + 2 * (1 + 1 + 2)  # and the measurements, which are not counted
    assert model.n_unet_rows == n_evals


def test_images_are_decoded_as_many_at_once_as_fit(small: Diffuser) -> None:
    x = torch.randn(5, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    before = [np.asarray(image).astype(int) for image in small.decode(x)]
    tried = out_of_memory_above(small, 2, "codec._decode")
    after = [np.asarray(image).astype(int) for image in small.decode(x)]
    assert tried == [5, 2, 2, 1]
    assert np.abs(np.stack(before) - np.stack(after)).max() <= 1
    out_of_memory_above(small, 0, "codec._decode")
    with pytest.raises(OutOfMemory, match="too little memory for the decoder with a batch of 1 "):
        small.decode(x)


def test_what_is_hooked_in_sees_whole_batches(small: Diffuser) -> None:
    x = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    text, log_snr = small.encode_text([PROMPT] * 4), torch.zeros(4)
    small.sizer.memory = FakeMemory(30, 10, 0, True)  # where 3 latents fit
    small.sizer.memory.calls = [1]  # type: ignore[attr-defined]
    sizes: list[int] = []
    block = small.hookpoints[0]
    with record(small, [block], sink=lambda _, update: sizes.append(len(update))):
        small.predict_noise(x, log_snr, text)
    with edit(small, lambda _, update: sizes.append(len(update)), [block]):  # type: ignore[func-returns-value]
        small.predict_noise(x, log_snr, text)
    assert sizes == [4, 4]
    assert not small.predictor.has_hooks()
    tried = out_of_memory_above(small, 2)
    with record(small, [block]) as recording, pytest.raises(OutOfMemory, match="batch of 4"):
        small.predict_noise(x, log_snr, text)
    assert tried == [4]
    assert not recording


def test_runs_with_recordings_are_made_with_as_many_prompts_as_fit(
    small: Diffuser, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, kept = [PROMPT, "a dog", "a ship", "a house", "a tree"], []
    tried = out_of_memory_above(small, 4)

    def compute(part: slice) -> Tensor:
        kept.append((part.start, part.stop))
        with record(small, small.hookpoints[:1], steps=[1], branches=["cond"]) as recording:
            for _ in small.sample(prompts[part], seeds=list(range(5))[part], num_inference_steps=2):
                pass
        return recording[ActivationKey(small.hookpoints[0], "cond", 1)]

    with caplog.at_level(logging.WARNING, "core"):
        updates = small.in_parts(5, compute)
    assert kept == [(0, 5), (0, 2), (2, 4), (4, 5)]
    assert tried == [10, 4, 4, 4, 4, 2, 2]
    assert torch.cat(updates).shape[0] == 5
    assert caplog.messages == ["the CPU: the sampler ran out of memory with a batch of 5; going on with 2"]
    kept.clear()
    small.in_parts(5, compute, max_size=3)
    assert kept == [(0, 2), (2, 4), (4, 5)]  # it has learned


def test_as_many_prompts_run_together_as_their_latents_fit(small: Diffuser) -> None:
    fake = FakeMemory(available=70, per_row=10)
    small.sizer.memory = fake
    plain = small.predictor.call
    small.predictor.call = lambda x, *args: (fake.calls.append(len(x)), plain(x, *args))[1]  # type: ignore[method-assign]
    assert small.latents_at_once(1) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.diffusion.unet_predictor._MAPS_PER_LATENT", 0)
        assert small.latents_at_once(32) == 7
        assert [len(range(part.start, part.stop)) for part in small.in_parts(8, lambda part: part)] == [3, 3, 2]
        of_one_branch = small.in_parts(8, lambda part: part, guidance_scale=1.0)
        assert [part.stop for part in of_one_branch] == [7, 8]
    assert (small.n_unet_calls, small.n_unet_rows) == (0, 0)


def test_a_copy_in_float32_that_does_not_fit_leaves_the_model_as_it_was(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(model_folder, device="cpu", dtype="bfloat16")
    convert = torch.nn.Module.to

    def fail(module: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        if args == (torch.float32,):
            convert(next(module.children()), *args)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return convert(module, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    with pytest.raises(OutOfMemory, match="for the U-Net in float32"):
        core.attribute(model, latents(), PROMPT, sampler=FEW)
    assert {weight.dtype for weight in model.unet.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert not model._lock.is_held


# --- the device -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A GPU's allocator, by hand."""
    state = {"free": 0, "held": 0, "reserved": 0, "peak": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (state["free"], 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: state["held"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: state["reserved"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: state["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: state.update(peak=state["held"]))
    yield state
    memory._peaks.clear()


def test_a_process_keeps_to_8_gib_of_a_large_gpu_and_to_what_is_free_of_a_small_one(gpu: dict[str, int]) -> None:
    device = DeviceMemory(torch.device("cuda:0"))
    gpu.update(free=130 * GIB, held=2 * GIB, reserved=5 * GIB)
    assert device.available() == int(7.2 * GIB) - 2 * GIB
    gpu.update(free=GIB)  # and 3 more that torch keeps
    assert device.available() == int(0.9 * 4 * GIB)
    gpu.update(free=130 * GIB, held=9 * GIB, reserved=9 * GIB)
    assert device.available() == GIB  # weights alone fill it: the work still goes on
    device.limit = 24 * GIB
    assert device.available() == int(0.9 * 24 * GIB) - 9 * GIB


def test_a_measurement_is_of_the_call_alone_and_does_not_hide_an_earlier_peak(gpu: dict[str, int]) -> None:
    place = torch.device("cuda:0")
    memory.reset_peak(place)
    gpu.update(held=2 * GIB, peak=6 * GIB)  # something large was here, and is gone

    def call() -> None:
        gpu["peak"] = 3 * GIB

    assert DeviceMemory(place).measure(call) == GIB
    assert memory.peak(place) == 6 * GIB
    memory.reset_peak(place)
    assert memory.peak(place) == 2 * GIB


def test_half_of_the_free_main_memory_is_planned_with() -> None:
    free = memory.main_memory_available()
    planned = DeviceMemory(torch.device("cpu")).available()
    assert free is not None
    assert planned is not None
    assert planned == pytest.approx(free / 2, rel=0.2)


def touch(mebibytes: int) -> None:
    """Hold so much memory for a moment, past an allocator that may keep what is freed."""
    with mmap.mmap(-1, mebibytes * 2**20) as pages:
        for at in range(0, len(pages), mmap.PAGESIZE):
            pages[at] = 1


def test_the_peak_of_a_process_can_be_begun_anew() -> None:
    place = torch.device("cpu")
    if memory.peak(place) is None:
        pytest.skip("this system does not tell")
    touch(400)
    memory.reset_peak(place)
    low = memory.peak(place)
    touch(200)
    high = memory.peak(place)
    assert low is not None
    assert high is not None
    assert 150 * 2**20 < high - low < 300 * 2**20


def test_a_limit_is_given_when_loading(model_folder: Path) -> None:
    model = load_model(model_folder, device="cpu", memory_gib=3.5)
    assert isinstance(model.sizer.memory, DeviceMemory)
    assert model.sizer.memory.limit == int(3.5 * GIB)
    with pytest.raises(ModelError, match="has to be positive, not -1"):
        load_model(model_folder, memory_gib=-1)
