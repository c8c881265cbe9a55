"""Ranking against worlds where the right order is known, how often its probabilities are right, and the bookkeeping."""

import json
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from core.diffusion.diffuser import Diffuser
from core.errors import Cancelled, PromptError, UnknownWordError
from core.information.captions import rank_captions, rank_captions_iter
from core.information.quadrature import Sampler
from core.information.ranking import UNKNOWN, Ranking, differences
from core.information.results import Progress, t_cdf
from tests.fakes.discrete import world_of
from tests.fakes.gaussian import GaussianWorld

WORDS = ["red", "cat", "sea"]
CAPTIONS = ["cat", "red cat sea", "sea"]
LOW, HIGH = -5.0, 7.0
"""The range that is integrated."""
BITS = 1 / math.log(2)


def run(world: Any, x: torch.Tensor, captions: list[str], n_replicates: int = 0, **options: Any) -> Ranking:
    """A ranking in few big batches; with `n_replicates`, that many, however sure the order."""
    if n_replicates:
        n_texts = len(captions) + options.get("orthogonal", True)
        options |= {"max_evals": n_replicates * 8 * n_texts, "certainty": 1 - 1e-12}
    return rank_captions(world, x, captions, batch_size=100_000, **options)


@pytest.fixture(scope="module")
def world() -> GaussianWorld:
    return GaussianWorld(WORDS)


@pytest.fixture(scope="module")
def x(world: GaussianWorld) -> torch.Tensor:
    return world.draw_image(np.random.default_rng(1))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_bits_are_the_log_ratio_and_differences_are_paired(
    world: GaussianWorld, x: torch.Tensor, orthogonal: bool
) -> None:
    result = run(world, x, CAPTIONS, n_replicates=256, orthogonal=orthogonal)
    truth = BITS * np.array([world.direct(x, "", caption, LOW, HIGH) for caption in CAPTIONS])
    if not orthogonal:
        truth -= truth.mean()
    assert (np.abs(result.bits - truth) < 4 * result.stderr).all()
    apart = truth[:, None] - truth[None]
    assert (np.abs(result.ahead - apart) <= 4 * result.ahead_stderr).all()
    assert result.order == tuple(np.argsort(-truth))
    np.testing.assert_allclose(result.ahead, result.bits[:, None] - result.bits[None], atol=1e-9)


def test_with_and_without_the_empty_text_the_order_is_the_same(world: GaussianWorld, x: torch.Tensor) -> None:
    beside, alone = (run(world, x, CAPTIONS, n_replicates=8, orthogonal=with_) for with_ in (True, False))
    np.testing.assert_allclose(beside.ahead, alone.ahead, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(beside.ahead_stderr, alone.ahead_stderr, rtol=1e-2, atol=1e-3)
    assert alone.orthogonal_bits is alone.orthogonal_stderr is alone.orthogonal_order is None
    assert alone.bits.sum() == pytest.approx(0, abs=1e-9)
    assert (beside.n_evals, alone.n_evals) == (8 * 8 * 4, 8 * 8 * 3)
    assert beside.orthogonal_bits is not None
    assert beside.orthogonal_stderr is not None
    truth = BITS * np.array([world.orthogonal(x, "", caption, LOW, HIGH).sum() for caption in CAPTIONS])
    assert (np.abs(beside.orthogonal_bits - truth) < 6 * beside.orthogonal_stderr).all()


def test_the_rule_of_kong_2024_prefers_what_contradicts_the_image() -> None:
    """An optimal denoiser is moved most by the caption that is wrong."""
    world = world_of({"cat": 0.5, "dog": 0.5})
    result = run(world, world.image(0, np.random.default_rng(0)), ["dog", "cat"], certainty=0.9)
    assert result.order == (1, 0)
    assert result.orthogonal_order == (0, 1)
    assert result.p_best == result.p_order >= 0.9
    assert result.stopped == "converged"


@pytest.mark.slow
def test_probabilities_are_as_often_right_as_they_say() -> None:
    """Orders that were claimed at 95 % or more, and all pairs by what they claim, over 60 images."""
    world, rng = GaussianWorld(WORDS), np.random.default_rng(4)
    captions = [" ".join(words) for n in (1, 2) for words in combinations(WORDS, n)]
    claimed, right, orders = [], [], []
    for seed in range(60):
        world.draw_words(rng)
        x = world.draw_image(rng)
        truth = np.array([world.direct(x, "", caption, LOW, HIGH) for caption in captions])
        chosen = rng.permutation(len(captions))[:3]
        result = run(world, x, [captions[i] for i in chosen], seed=seed, max_evals=16 * 8 * 4)
        for i, j in combinations(range(3), 2):
            p = result.p_ahead[i, j]
            claimed.append(max(p, 1 - p))
            right.append((p > 0.5) == (truth[chosen[i]] > truth[chosen[j]]))
        if result.p_order >= 0.95:
            orders.append(result.order == tuple(np.argsort(-truth[chosen])))
    sure = np.array(claimed) > 0.9
    assert len(orders) > 20
    assert np.mean(orders) >= 0.95
    assert np.mean(np.array(right)[sure]) >= 0.95
    assert (~sure).sum() > 8
    assert np.mean(np.array(right)[~sure]) >= np.array(claimed)[~sure].mean() - 0.15


def ranking(ahead: list[float], stderr: float, n_replicates: int = 8) -> Ranking:
    """Of captions that lie so many bits above zero, every difference known to `stderr`."""
    bits = np.array(ahead)
    return Ranking(
        captions=tuple("abc"[: len(bits)]),
        bits=bits,
        stderr=np.full_like(bits, stderr),
        ahead=bits[:, None] - bits,
        ahead_stderr=np.full((len(bits), len(bits)), stderr),
        orthogonal_bits=None,
        orthogonal_stderr=None,
        n_evals=1,
        n_replicates=n_replicates,
        stopped="budget",
        rel_error=1.0,
        seed=0,
        settings={},
    )


def test_probabilities_by_hand() -> None:
    found = ranking([1.0, 3.0, 0.0], 1.3)
    one, two, three = (t_cdf(bits / (1.3 * 1.3), 7) for bits in (1.0, 2.0, 3.0))
    assert found.order == (1, 0, 2)
    np.testing.assert_allclose(found.p_ahead, [[0.5, 1 - two, one], [two, 0.5, three], [1 - one, 1 - three, 0.5]])
    assert found.p_order == pytest.approx(1 - (1 - two) - (1 - one))
    assert found.p_best == pytest.approx(1 - (1 - two) - (1 - three))
    assert ranking([1.0, 1.0], 1.0).p_order == 0.5
    assert ranking([0.0, 1.0], 0.0).p_order == 1.0
    assert ranking([0.01, 0.02, 0.03], 1.0).p_order < 0.1


def test_differences_keep_what_the_captions_share() -> None:
    rng = np.random.default_rng(0)
    shared = 100 * rng.normal(size=(16, 1))
    ahead, stderr = differences(shared + np.array([1.0, 3.0]) + 0.1 * rng.normal(size=(16, 2)))
    assert ahead[1, 0] == pytest.approx(2, abs=0.2)
    assert 0 < stderr[1, 0] < 0.1
    assert stderr[0, 0] == 0


def test_it_stops_when_the_order_is_sure_enough(world: GaussianWorld, x: torch.Tensor) -> None:
    sure = run(world, x, ["red", "red cat sea"])
    assert (sure.stopped, sure.n_replicates) == ("converged", 8)
    assert sure.p_order >= 0.95
    unsure = run(world, x, CAPTIONS, max_evals=8 * 8 * 4, certainty=1 - 1e-9)
    assert unsure.stopped == "budget"
    with pytest.raises(ValueError, match=r"3 captions need at least 64\. .* fewer captions"):
        run(world, x, CAPTIONS, max_evals=63)


def test_a_model_that_ignores_its_text_cannot_rank(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = GaussianWorld(WORDS)
    monkeypatch.setattr(deaf, "predict_noise", lambda x, *_: x)
    result = rank_captions(deaf, x, CAPTIONS, max_evals=320)
    assert (result.stopped, result.rel_error) == ("budget", UNKNOWN)
    assert result.order == (0, 1, 2)
    assert result.p_order == 0
    assert (result.p_ahead == 0.5).all()


def test_progress_grows_a_callback_can_cancel_and_json_keeps_it(world: GaussianWorld, x: torch.Tensor) -> None:
    *progress, last = rank_captions_iter(world, x, CAPTIONS, batch_size=32)
    assert isinstance(last, Ranking)
    final = progress[-1]
    assert isinstance(final, Progress)
    assert final.partial is not None
    np.testing.assert_array_equal(final.partial.bits, last.bits)
    stopped = rank_captions(world, x, CAPTIONS, batch_size=16, callback=lambda event: event.n_replicates < 3)
    assert (stopped.stopped, stopped.n_replicates) == ("cancelled", 3)
    with pytest.raises(Cancelled):
        rank_captions(world, x, CAPTIONS, batch_size=16, callback=lambda _: False)
    assert json.loads(json.dumps(last.to_dict()))["ahead"] == last.ahead.tolist()


def test_a_real_pipeline_end_to_end(model: Diffuser) -> None:
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(n_points=4, min_replicates=2)
    rows = model.n_unet_rows
    result = rank_captions(model, latents, ["a cat", "a dog on grass"], sampler=sampler, max_evals=24)
    assert model.n_unet_rows - rows == result.n_evals == 24
    again = rank_captions(model, latents, ["a dog on grass", "a cat"], sampler=sampler, max_evals=24, batch_size=5)
    np.testing.assert_allclose(again.bits[::-1], result.bits, rtol=1e-3, atol=1e-3)
    with pytest.raises(UnknownWordError):
        rank_captions_iter(model, latents, ["a cat", "a zebra"])
    job = rank_captions_iter(model, latents, ["a cat", "a dog"], batch_size=3)
    next(job)
    assert model._lock.is_held
    job.close()
    assert not model._lock.is_held


@pytest.mark.parametrize(
    ("captions", "options", "error", "message"),
    [
        (["cat"], {}, PromptError, r"two captions or more"),
        ("cat", {}, PromptError, r"two captions or more"),
        ([], {}, PromptError, r"two captions or more"),
        (["red", "cat", " Red "], {}, PromptError, r"Captions 1 and 3 are the same"),
        (["red", "cat"], {"certainty": 95}, ValueError, r"certainty"),
        (["red", "cat"], {"certainty": 0.5}, ValueError, r"certainty"),
    ],
)
def test_wrong_arguments_fail_before_the_model_is_called(
    world: GaussianWorld, x: torch.Tensor, captions: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rank_captions_iter(world, x, captions, **options)
