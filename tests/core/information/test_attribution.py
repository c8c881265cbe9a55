"""The estimator against a world where every answer is known (`gaussian.py`), and its bookkeeping."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from core.diffusion.diffuser import Diffuser
from core.errors import Cancelled, ImageError, PromptError, WordNotInPromptError
from core.information.attribution import attribute, attribute_iter
from core.information.measuring import CAUTION
from core.information.quadrature import Sampler
from core.information.results import Attribution, AttributionProgress
from tests.fakes.gaussian import Floats, GaussianWorld

WORDS = ["red", "cat", "sea"]
PROMPT = "red cat sea"
LOW, HIGH = -5.0, 7.0
"""The range that is integrated."""
BITS = 1 / math.log(2)
COVERED = [(6, 0.90, 0.985), pytest.param(24, 0.92, 0.97, marks=pytest.mark.slow)]
"""Seeds for each of 20 images, and what share of 95 % intervals should hold the truth. Of 480 repeats it is 93 to 97 %
with 95 % probability; of 120, 91 to 99 %."""


def run(world: GaussianWorld, x: torch.Tensor, n_replicates: int | None = None, **options: Any) -> Attribution:
    """An attribution in few big batches; with `n_replicates`, that many times eight samples, whatever the error."""
    sampler = options.pop("sampler", Sampler())
    if n_replicates is not None:
        cost = 8 * (len(world.words) + 1)
        options |= {"max_evals": n_replicates * cost, "rel_error": 1e-9}
    return attribute(world, x, PROMPT, sampler=sampler, batch_size=100_000, **options)


def true_maps(world: GaussianWorld, x: torch.Tensor) -> Floats:
    """[W, h, w] orthogonal bits of each word given the rest."""
    return BITS * np.stack([world.orthogonal(x, world.without(word), PROMPT, LOW, HIGH).sum(0) for word in WORDS])


@pytest.fixture(scope="module")
def world() -> GaussianWorld:
    return GaussianWorld(WORDS)


@pytest.fixture(scope="module")
def x(world: GaussianWorld) -> torch.Tensor:
    return world.draw_image(np.random.default_rng(1))


def test_the_worlds_own_formulas_agree(world: GaussianWorld, x: torch.Tensor) -> None:
    for word in WORDS:
        context = world.without(word)
        assert world.direct(x, context, PROMPT, -40, 40) == pytest.approx(world.log_ratio(x, context, PROMPT))
        assert world.information_within(context, PROMPT, -40, 40) == pytest.approx(world.information(context, PROMPT))
        parts = [world.orthogonal(x, context, PROMPT, *ends) for ends in ((LOW, 1), (1, HIGH))]
        np.testing.assert_allclose(sum(parts), world.orthogonal(x, context, PROMPT, LOW, HIGH), rtol=1e-12)


def test_direct_is_the_pointwise_log_ratio_less_the_tail(world: GaussianWorld, x: torch.Tensor) -> None:
    result = run(world, x, n_replicates=512)
    inside = BITS * np.array([world.direct(x, world.without(word), PROMPT, LOW, HIGH) for word in WORDS])
    ratio = BITS * np.array([world.log_ratio(x, world.without(word), PROMPT) for word in WORDS])
    tail = ratio - inside
    assert np.abs(tail).max() < 0.4  # bits that lie outside [-5, 7], of 5 to 19
    assert (result.direct_stderr < 0.04 * inside).all()
    assert (np.abs(result.direct_bits - inside) < 4 * result.direct_stderr).all()
    assert (np.abs(result.direct_bits + tail - ratio) < 4 * result.direct_stderr).all()


def test_orthogonal_bits_are_their_integral_at_that_image(world: GaussianWorld, x: torch.Tensor) -> None:
    result = run(world, x, n_replicates=512)
    truth = true_maps(world, x)
    assert (result.stderr < 0.012 * truth.sum((1, 2))).all()
    assert (np.abs(result.bits - truth.sum((1, 2))) < 4 * result.stderr).all()
    assert (np.abs(result.maps - truth) < 4.5 * result.map_stderr).all()
    # at one picture it differs from the direct one, by far more than its error
    assert (np.abs(result.bits - result.direct_bits) > 4 * np.hypot(result.stderr, result.direct_stderr)).any()


@pytest.mark.parametrize("given", ["rest", pytest.param("nothing", marks=pytest.mark.slow)])
def test_both_average_to_the_mutual_information(given: str) -> None:
    world, rng = GaussianWorld(WORDS), np.random.default_rng(2)
    orthogonal, direct = [], []
    for seed in range(125):
        world.draw_words(rng)
        result = run(world, world.draw_image(rng), n_replicates=8, given=given, seed=seed)
        orthogonal.append(result.bits)
        direct.append(result.direct_bits)
    texts = [(world.without(word), PROMPT) if given == "rest" else ("", word) for word in WORDS]
    inside = BITS * np.array([world.information_within(*pair, LOW, HIGH) for pair in texts])
    whole = BITS * np.array([world.information(*pair) for pair in texts])
    assert (whole - inside < 0.05 * whole).all()  # the tail outside [-5, 7]
    assert (whole - inside > 0).all()
    for values in (orthogonal, direct):
        error = np.std(values, axis=0) / math.sqrt(len(values))
        assert (np.abs(np.mean(values, axis=0) - inside) < 4 * error).all()
        assert (error < 0.07 * inside).all()


@pytest.mark.parametrize(("n_seeds", "least", "most"), COVERED)
@pytest.mark.parametrize("stopping", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_intervals_cover(stopping: bool, n_seeds: int, least: float, most: float) -> None:
    """95 % intervals of totals, cells and direct totals, over 20 images."""
    world, rng = GaussianWorld(WORDS), np.random.default_rng(3)
    totals, cells, direct, looks = [], [], [], []
    for picture in range(20):
        world.draw_words(rng)
        x = world.draw_image(rng)
        maps = true_maps(world, x)
        signed = BITS * np.array([world.direct(x, world.without(word), PROMPT, LOW, HIGH) for word in WORDS])
        for repeat in range(n_seeds):
            options: dict[str, Any] = {"rel_error": 0.05} if stopping else {"n_replicates": 8}
            result = run(world, x, seed=100 * picture + repeat, **options)
            low, high = result.interval()
            factor = result.interval_factor()
            totals.append((low <= maps.sum((1, 2))) & (maps.sum((1, 2)) <= high))
            cells.append(np.abs(result.maps - maps) <= factor * result.map_stderr)
            direct.append(np.abs(result.direct_bits - signed) <= factor * result.direct_stderr)
            looks.append(result.n_replicates)
    for held in (totals, cells, direct):
        assert least <= np.mean(held) <= most
    if stopping:  # the rule is put to the test: runs end at several looks
        assert len(set(looks)) >= 3


def test_maps_and_timeline_add_up(world: GaussianWorld, x: torch.Tensor) -> None:
    result = run(world, x, num_inference_steps=25)
    np.testing.assert_allclose(result.maps.sum((1, 2)), result.bits, rtol=1e-9)
    edges, bits, stderr = result.timeline
    assert edges.shape == (26,)
    assert bits.shape == stderr.shape == (3, 25)
    assert (edges[0], edges[-1]) == (LOW, HIGH)
    np.testing.assert_allclose((bits * np.diff(edges)).sum(1), result.bits, rtol=1e-9)


def test_the_timeline_is_right_bin_by_bin(world: GaussianWorld, x: torch.Tensor) -> None:
    result = run(world, x, n_replicates=512, num_inference_steps=6)
    edges, bits, stderr = result.timeline
    for i, word in enumerate(WORDS):
        for bin_, ends in enumerate(pairwise(edges)):
            truth = BITS * world.orthogonal(x, world.without(word), PROMPT, *ends).sum() / (ends[1] - ends[0])
            assert abs(bits[i, bin_] - truth) < 4.5 * stderr[i, bin_]


def test_results_do_not_depend_on_the_batch_size(world: GaussianWorld, x: torch.Tensor) -> None:
    results = [attribute(world, x, PROMPT, batch_size=size, rel_error=0.2) for size in (1, 3, 4, 7, 32, 1000)]
    for other in results[1:]:
        for name in ("bits", "maps", "stderr", "direct_bits"):
            np.testing.assert_allclose(getattr(other, name), getattr(results[0], name), rtol=1e-4, atol=1e-6)
        assert other.n_evals == results[0].n_evals


def test_a_word_does_not_depend_on_which_others_are_measured(world: GaussianWorld, x: torch.Tensor) -> None:
    together = run(world, x, n_replicates=8)
    alone = attribute(world, x, PROMPT, words=["Sea"], rel_error=1e-9, max_evals=8 * 16, batch_size=1000)
    assert alone.words == ("sea",)
    np.testing.assert_allclose(alone.maps[0], together.maps[2], rtol=1e-9)


def test_a_word_given_twice_counts_and_costs_once(world: GaussianWorld, x: torch.Tensor) -> None:
    twice = attribute(world, x, PROMPT, words=["sea", "red", " SEA"], rel_error=1e9, batch_size=1000)
    once = attribute(world, x, PROMPT, words=["red", "sea"], rel_error=1e9, batch_size=1000)
    assert twice.words == ("red", "sea")
    assert twice.n_evals == once.n_evals
    np.testing.assert_array_equal(twice.bits, once.bits)


def test_words_share_their_evaluations_and_texts_are_encoded_once() -> None:
    world = GaussianWorld(WORDS)
    x = world.draw_image(np.random.default_rng(0))
    result = attribute(world, x, PROMPT, batch_size=32, rel_error=0.5)
    assert result.n_replicates == 4  # a first answer
    assert result.n_evals == 4 * 4 * (3 + 1) == sum(world.batch_sizes)
    assert max(world.batch_sizes) <= 32
    assert sorted(set(world.encoded)) == sorted([PROMPT, "cat sea", "red sea", "red cat"])
    unshared = {n: run(world, x, sampler=Sampler(shared=False, prompts_per_word=n), rel_error=0.9) for n in (2, 3)}
    assert [unshared[n].n_evals // unshared[n].n_replicates for n in (2, 3)] == [4 * 3 * 2, 4 * 3 * 3]


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler.kong2024(),
        Sampler(stratified=False, antithetic=False),
        Sampler(stratified=False),
        Sampler(scale=2.0, clip=3.0),
        Sampler(antithetic=False),
        Sampler(shared=False),
        Sampler(fitted=True),
        Sampler(fitted=True, shared=False),
    ],
)
def test_every_sampler_estimates_the_same_integral(sampler: Sampler, world: GaussianWorld, x: torch.Tensor) -> None:
    budget = 400 * 8 * (4 if sampler.shared else 3 * sampler.prompts_per_word)
    result = run(world, x, sampler=sampler, max_evals=budget, rel_error=1e-9)
    assert (np.abs(result.bits - true_maps(world, x).sum((1, 2))) < 4 * result.stderr).all()
    assert (result.stderr < 0.035 * result.bits).all()


def test_it_stops_when_converged_or_at_the_budget(world: GaussianWorld, x: torch.Tensor) -> None:
    easy = run(world, x, rel_error=0.6)
    assert (easy.stopped, easy.n_replicates) == ("converged", 4)
    assert easy.rel_error <= 0.6 / CAUTION
    # Of four replicates, a spread that is small enough proves little.
    doubtful = run(world, x, rel_error=1.5 * easy.rel_error)
    assert (doubtful.stopped, doubtful.n_replicates) == ("converged", 8)
    hard = run(world, x, rel_error=0.001, max_evals=11 * 16 + 5)
    assert (hard.stopped, hard.n_replicates, hard.n_evals) == ("budget", 11, 11 * 16)
    assert hard.rel_error > 0.001
    with pytest.raises(ValueError, match="need at least 64"):
        run(world, x, max_evals=63)


def test_the_pilot_counts_in_the_budget_and_not_in_the_estimate(world: GaussianWorld, x: torch.Tensor) -> None:
    fitted = Sampler(fitted=True, n_pilot=16)
    result = run(world, x, sampler=fitted, rel_error=1e-9, max_evals=11 * 16 + 16 * 4)
    assert (result.n_replicates, result.n_evals) == (11, 11 * 16 + 16 * 4)
    less = run(world, x, sampler=fitted, rel_error=1e-9, max_evals=11 * 16 + 16 * 4 - 1)
    assert less.n_replicates == 10


def test_a_small_word_is_measured_against_a_tenth_of_the_largest(world: GaussianWorld, x: torch.Tensor) -> None:
    result = run(world, x, n_replicates=8)
    scale = np.maximum(result.bits, result.bits.max() / 10)
    assert result.rel_error == pytest.approx((result.stderr / scale).max())


def test_a_model_that_ignores_its_text_gives_zero_and_stops(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = GaussianWorld(WORDS)
    monkeypatch.setattr(deaf, "predict_noise", lambda x, *_: x)
    result = attribute(deaf, x, PROMPT)
    assert (result.bits == 0).all()
    assert (result.stopped, result.n_replicates, result.rel_error) == ("converged", 4, 0.0)


def test_the_whole_prompt_on_request(world: GaussianWorld, x: torch.Tensor) -> None:
    result = run(world, x, whole_prompt=True, rel_error=0.03)
    truth = BITS * world.orthogonal(x, "", PROMPT, LOW, HIGH).sum()
    assert result.prompt_bits is not None
    assert result.prompt_stderr is not None
    assert abs(result.prompt_bits - truth) < 4 * result.prompt_stderr
    assert result.words == ("red", "cat", "sea")
    assert run(world, x, rel_error=0.5).prompt_bits is None


def test_progress_counts_evaluations_and_has_the_result_so_far(world: GaussianWorld, x: torch.Tensor) -> None:
    events = list(attribute_iter(world, x, PROMPT, batch_size=20, rel_error=0.5))
    *progress, last = events
    assert isinstance(last, Attribution)
    assert all(isinstance(event, AttributionProgress) for event in progress)
    evals = [event.n_evals for event in progress if isinstance(event, AttributionProgress)]
    assert evals == sorted(evals)
    assert evals[-1] == last.n_evals == 64
    first = progress[0]
    assert isinstance(first, AttributionProgress)
    assert (first.partial, first.rel_error, first.expected_evals) == (None, math.inf, 64)
    before = progress[-1]
    assert isinstance(before, AttributionProgress)
    assert before.partial is not None
    np.testing.assert_array_equal(before.partial.bits, last.bits)


def test_a_callback_can_cancel(world: GaussianWorld, x: torch.Tensor) -> None:
    options: dict[str, Any] = {"rel_error": 1e-9, "batch_size": 16}
    result = attribute(world, x, PROMPT, callback=lambda progress: progress.n_replicates < 3, **options)
    assert (result.stopped, result.n_replicates, result.n_evals) == ("cancelled", 3, 48)
    with pytest.raises(Cancelled):
        attribute(world, x, PROMPT, batch_size=16, callback=lambda _: False)


def test_closing_stops_within_one_call_and_frees_the_model(model: Diffuser) -> None:
    generation = model.generate("a cat on grass", num_inference_steps=2)
    run_ = attribute_iter(model, generation, "a cat on grass", batch_size=10)
    next(run_)
    next(run_)
    calls = model.n_unet_calls
    assert model._lock.is_held
    run_.close()
    assert not model._lock.is_held
    assert model.n_unet_calls == calls


def test_a_real_pipeline_end_to_end(model: Diffuser) -> None:
    generation = model.generate("A cat on grass", num_inference_steps=3)
    sampler = Sampler(n_points=4, min_replicates=2)
    rows = model.n_unet_rows
    options: dict[str, Any] = {"sampler": sampler, "rel_error": 100.0, "seed": 4}
    result = attribute(model, generation, "A cat on grass", **options)
    assert result.words == ("a", "cat", "on", "grass")
    assert result.maps.shape == (4, 16, 16)
    assert result.timeline.bits.shape == (4, 3)  # the generation's steps
    assert model.n_unet_rows - rows == result.n_evals == 2 * 4 * 5
    again = attribute(model, generation.latents, "A cat on grass", batch_size=7, **options)
    np.testing.assert_allclose(again.maps, result.maps, rtol=1e-4)
    pictured = attribute(model, generation.image, "A cat on grass", words=["cat"], **options)
    assert pictured.maps.shape == (1, 16, 16)
    assert pictured.timeline.bits.shape == (1, 50)  # the model's default


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"words": ["dog"]}, WordNotInPromptError, r"'dog' is not in the prompt.*cat"),
        ({"given": "all"}, ValueError, "given is 'rest'"),
        ({"rel_error": 0.0}, ValueError, "rel_error"),
        ({"prompt": "..."}, PromptError, "no word"),
    ],
)
def test_wrong_arguments_fail_before_the_model_is_called(
    world: GaussianWorld, x: torch.Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"prompt": PROMPT} | options
    with pytest.raises(error, match=message):
        attribute_iter(world, x, **arguments)


def test_latents_of_another_shape_are_refused(world: GaussianWorld) -> None:
    with pytest.raises(ImageError, match=r"\(1, 4, 64, 64\).*\(8, 2, 2\)"):
        attribute(world, torch.zeros(1, 4, 64, 64), PROMPT)
    with pytest.raises(ImageError, match="give it latents"):
        attribute(world, "picture.png", PROMPT)
