"""Two precisions in one estimate: on a world with known answers and synthetic rounding, and on the small model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.diffusion.predictor import Conditions
from core.information import precision
from core.information.attribution import attribute, attribute_iter
from core.information.precision import Costs, best_every, half_precision, pick
from core.information.quadrature import Sampler
from core.information.results import Attribution
from tests.fakes.gaussian import Floats, GaussianWorld

WORDS = ["red", "cat", "sea"]
PROMPT = "red cat sea"
BITS = 1 / np.log(2)


class RoundingWorld(GaussianWorld):
    """In half precision it rounds its predictions to multiples of `step`, and takes `cost` of float32's time."""

    def __init__(self, *, step: float = 0.5, cost: float = 0.2, dtype: torch.dtype = torch.float16) -> None:
        super().__init__(WORDS)
        self.step, self.cost, self.dtype, self.seconds = step, cost, dtype, 0.0
        self.evaluated = {torch.float16: 0, torch.float32: 0}

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before

    def predict_noise(self, x: Tensor, log_snr: Tensor, conditions: Conditions) -> Tensor:
        eps = super().predict_noise(x, log_snr, conditions)
        self.evaluated[self.dtype] += len(x)
        self.seconds += len(x) * (self.cost if self.dtype == torch.float16 else 1.0)
        return (eps / self.step).round() * self.step if self.dtype == torch.float16 else eps


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> RoundingWorld:
    world = RoundingWorld()
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: world.seconds))
    return world


def image(world: GaussianWorld) -> Tensor:
    return world.draw_image(np.random.default_rng(1))


def truth(world: GaussianWorld, x: Tensor) -> tuple[Floats, Floats]:
    """[W] orthogonal and direct bits of each word given the rest, over log-SNR -5 to 7."""
    pairs = [(world.without(word), PROMPT) for word in WORDS]
    orthogonal = [world.orthogonal(x, *pair, -5, 7).sum() for pair in pairs]
    return BITS * np.array(orthogonal), BITS * np.array([world.direct(x, *pair, -5, 7) for pair in pairs])


def run(world: GaussianWorld, x: Tensor, every: int | None, n_replicates: int = 8, seed: int = 0) -> Attribution:
    sampler = Sampler(n_points=8, interleaved=1, exact_every=every)
    options: dict[str, Any] = {"max_evals": n_replicates * 32, "rel_error": 1e-9, "batch_size": 10_000}
    return attribute(world, x, PROMPT, sampler=sampler, seed=seed, **options)


# --- how often --------------------------------------------------------------------------------------------------------


def test_the_split_is_the_cheapest_for_the_same_error() -> None:
    def best(narrow: float, ratio: float, limit: int = 32) -> int:
        return best_every(Costs(narrow, 1.0), np.array([0.0, ratio]), np.array([1.0, 1.0]), limit)

    # (0.63 + 1 / k)(1 + (k - 1) / 100): 1.14, .906, .807, .787, .914 for k = 2, 4, ..., 32
    assert best(0.63, 0.01) == 16
    assert best(0.63, 0.01, limit=8) == 8
    assert best(0.63, 0.0) == 32
    # (0.1 + 1 / k)(1 + (k - 1) / 4): .75, .6125, .619
    assert best(0.1, 0.25) == 4
    # No split is cheaper: the half precision is no faster, or rounds too much.
    assert best(1.0, 0.0) == 1
    assert best(0.63, 1.0) == 1
    assert best_every(Costs(0.1, 1.0), np.array([1.0]), np.array([0.0]), 32) == 1


@pytest.mark.parametrize("every", [1, 2, 4, 8, 32])
def test_every_sample_is_as_likely_to_be_picked(every: int) -> None:
    picks = np.array([pick(8, every, (5, replicate, 0)) for replicate in range(4000)])
    assert picks.shape == (4000, 8)
    error = np.sqrt((every - 1) / every**2 / 4000)
    assert (np.abs(picks.mean(0) - 1 / every) <= 4.5 * error).all()
    if every <= 8:
        assert (picks.sum(1) == 8 // every).all()


@pytest.mark.parametrize(("flags", "expected"), [({}, None), ({"avx512_bf16": True}, torch.bfloat16)])
def test_a_cpu_without_units_for_it_has_no_half_precision(
    flags: dict[str, bool], expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert half_precision(torch.device("cpu")) == expected
    assert half_precision(torch.device("cuda")) is None


# --- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_it_is_unbiased_and_its_intervals_cover_both_levels(every: int | None, world: RoundingWorld) -> None:
    x = image(world)
    orthogonal, direct = truth(world, x)
    results = [run(world, x, every, n_replicates=16, seed=seed) for seed in range(80)]
    shares = [result.settings["rounding"] for result in results]
    assert np.median(shares) > 0.1  # there is something to correct: half precision alone is wrong by this
    for true, bits, stderr in (
        (orthogonal, np.array([r.bits for r in results]), np.array([r.stderr for r in results])),
        (direct, np.array([r.direct_bits for r in results]), np.array([r.direct_stderr for r in results])),
    ):
        off = (bits.mean(0) - true) / (bits.std(0, ddof=1) / np.sqrt(len(bits)))
        assert (np.abs(off) < 4).all()
        covered = np.abs(bits - true) <= results[0].interval_factor() * stderr
        assert 0.91 <= covered.mean() <= 0.99


def test_half_precision_alone_would_be_far_off(world: RoundingWorld) -> None:
    x = image(world)
    with world.computing_in(torch.float16):
        a = attribute(_without_precisions(world), x, PROMPT, sampler=Sampler(), rel_error=0.02, batch_size=10_000)
    assert (np.abs(a.bits - truth(world, x)[0]) > 4 * a.stderr).any()


def _without_precisions(world: RoundingWorld) -> Any:
    names = ("schedule", "latent_shape", "device", "busy", "encode_text", "predict_noise")
    return SimpleNamespace(**{name: getattr(world, name) for name in names})


def test_everything_else_adds_up_as_in_one_precision(world: RoundingWorld) -> None:
    a = run(world, image(world), 4, n_replicates=16)
    np.testing.assert_allclose(a.maps.sum((1, 2)), a.bits, rtol=1e-9)
    np.testing.assert_allclose((a.timeline.bits * np.diff(a.timeline.edges)).sum(1), a.bits, rtol=1e-9)
    assert a.curves is not None
    gap = (a.curves.without - a.curves.with_word) * np.diff(a.timeline.edges)
    np.testing.assert_allclose(BITS / 2 * gap.sum(1), a.direct_bits, rtol=1e-3)
    in_small_batches = attribute(
        world,
        image(world),
        PROMPT,
        sampler=Sampler(n_points=8, interleaved=1, exact_every=4),
        rel_error=1e-9,
        max_evals=16 * 32,
        batch_size=7,
    )
    np.testing.assert_allclose(in_small_batches.maps, a.maps, rtol=1e-4, atol=1e-6)
    assert in_small_batches.n_evals == a.n_evals


def test_the_split_follows_the_time_and_the_rounding(world: RoundingWorld) -> None:
    x = image(world)
    world.step = 0.05
    fast = run(world, x, None, n_replicates=32)
    assert fast.settings["dtype"] == "float16 and float32"
    assert fast.settings["exact_every"] >= 8
    assert fast.n_evals == sum(world.evaluated.values())
    assert world.evaluated[torch.float16] == 32 * 32
    assert world.evaluated[torch.float32] < 32 * 32 / 3
    exact = run(world, x, 1, n_replicates=32)
    assert exact.settings["dtype"] == "float32"
    np.testing.assert_allclose(fast.stderr, exact.stderr, rtol=0.1)
    world.step = 3.0
    coarse = run(world, x, None, n_replicates=32)
    assert coarse.settings["exact_every"] < fast.settings["exact_every"]


def test_float32_alone_where_half_precision_is_no_faster_and_no_second_trial(world: RoundingWorld) -> None:
    x = image(world)
    world.cost = 1.0
    first = run(world, x, None)
    assert first.settings == {**first.settings, "dtype": "float16 and float32", "exact_every": 1}
    assert world.evaluated[torch.float16] == 2 * 32  # the trial
    second = run(world, x, None)
    assert second.settings["dtype"] == "float32"
    assert world.evaluated[torch.float16] == 2 * 32
    exact = run(world, x, 1)
    for result in (first, second):
        np.testing.assert_array_equal(result.maps, exact.maps)
    assert (first.n_evals, second.n_evals) == (8 * 32 + 2 * 32, 8 * 32)


def test_what_overflows_in_half_precision_is_corrected(world: RoundingWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    x, plain = image(world), world.predict_noise

    def overflowing(*args: Any) -> Tensor:
        eps = plain(*args)
        return torch.full_like(eps, torch.inf) if world.dtype == torch.float16 else eps

    monkeypatch.setattr(world, "predict_noise", overflowing)
    result = run(world, x, None)
    assert result.settings["exact_every"] == 1
    np.testing.assert_array_equal(result.maps, run(world, x, 1).maps)


def test_progress_counts_the_repeats_on_top_of_the_budget(world: RoundingWorld) -> None:
    events = list(
        attribute_iter(world, image(world), PROMPT, sampler=Sampler(n_points=8, exact_every=2), batch_size=40)
    )
    *progress, result = cast("list[Any]", events)
    assert all(e.n_evals <= e.max_evals and e.expected_evals <= e.max_evals for e in progress)
    assert result.n_evals == result.n_replicates * (32 + 16)


# --- on the small model -----------------------------------------------------------------------------------------------


def latents_of(model: Diffuser) -> Tensor:
    return torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_model_measures_in_two_precisions_what_it_does_in_float32_and_keeps_its_weights(
    dtype: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    model = load_model(model_folder, device="cpu", dtype=dtype)
    before = {name: weight.clone() for name, weight in model.unet.state_dict().items()}
    options: dict[str, Any] = {"max_evals": 384, "words": ["cat"], "rel_error": 1e-9}
    measured = attribute(model, latents_of(model), "a cat", sampler=Sampler(n_points=4, exact_every=2), **options)
    assert measured.settings["dtype"] == "bfloat16 and float32"
    assert measured.settings["rounding"] > 0
    assert model.dtype == getattr(torch, dtype)
    for name, weight in model.unet.state_dict().items():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, before[name])
    wide = attribute(model, latents_of(model), "a cat", sampler=Sampler(n_points=4, exact_every=1), **options)
    error = np.hypot(measured.stderr, wide.stderr) * measured.interval_factor(0.999)
    assert (np.abs(measured.bits - wide.bits) < error).all()
    assert wide.settings["dtype"] == "float32"


def test_closing_in_the_middle_leaves_the_model_narrow_and_free(model_folder: Path) -> None:
    narrow: Diffuser = load_model(model_folder, device="cpu", dtype="bfloat16")
    for n in (1, 4, 9):  # in the narrow part of the trial, in its wide part, and after it
        run = attribute_iter(narrow, torch.zeros(1, *narrow.latent_shape), "a cat", batch_size=12)
        for _ in range(n):
            next(run)
        run.close()
        assert narrow.dtype == narrow.unet.dtype == torch.bfloat16
        assert not narrow._lock.is_held
