"""Redundancy, uniqueness and synergy against worlds where they are known, and the bookkeeping."""

import json
import math
import subprocess
import sys
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from core.diffusion.diffuser import Diffuser
from core.errors import Cancelled, PromptError, WordNotInPromptError
from core.information.decomposition import Decomposition, smaller_of_means, split_by_surprisal
from core.information.partial import decompose, decompose_iter
from core.information.quadrature import Sampler
from core.information.results import Given, Progress
from tests.fakes.discrete import DiscreteWorld, world_of
from tests.fakes.gaussian import Floats, GaussianWorld

WORDS = ["red", "cat", "sea"]
PROMPT = "red cat sea"
LOW, HIGH = -5.0, 7.0
"""The range that is integrated."""
BITS = 1 / math.log(2)


def run(world: Any, x: torch.Tensor, prompt: str, *words: str, n_replicates: int = 0, **options: Any) -> Decomposition:
    """A decomposition in few big batches; with `n_replicates`, that many, whatever the error."""
    if n_replicates:
        n = len(words or prompt.split())
        options |= {"max_evals": n_replicates * 8 * (1 + n + n * (n - 1) // 2), "rel_error": 1e-9}
    return decompose(world, x, prompt, *words, batch_size=100_000, **options)


def true_parts(world: GaussianWorld, x: torch.Tensor, first: str, second: str, given: Given) -> list[Floats]:
    """[h, w] bits of redundancy, both unique parts and synergy."""
    rest = " ".join(word for word in WORDS if word not in (first, second)) if given == "rest" else ""
    texts = [f"{rest} {words}" for words in (first, second, f"{first} {second}")]
    one, other, both = (BITS * world.orthogonal(x, rest, text, LOW, HIGH).sum(0) for text in texts)
    redundant = np.minimum(one, other)
    return [redundant, one - redundant, other - redundant, both - one - other + redundant]


@pytest.fixture(scope="module")
def world() -> GaussianWorld:
    return GaussianWorld(WORDS)


@pytest.fixture(scope="module")
def x(world: GaussianWorld) -> torch.Tensor:
    return world.draw_image(np.random.default_rng(1))


@pytest.mark.parametrize("given", ["rest", "nothing"])
def test_every_part_of_every_pair_is_the_true_one(world: GaussianWorld, x: torch.Tensor, given: Given) -> None:
    result = run(world, x, PROMPT, n_replicates=512, given=given)
    assert [pair.words for pair in result.pairs] == list(combinations(WORDS, 2))
    for pair in result.pairs:
        for part, truth in zip(pair.parts, true_parts(world, x, *pair.words, given), strict=True):
            assert part.stderr < 0.02 * pair.together.bits
            assert abs(part.bits - truth.sum()) < 4 * part.stderr + 1e-9
            assert (np.abs(part.map - truth) < 4.5 * part.map_stderr + 1e-9).all()


@pytest.mark.parametrize("given", ["rest", "nothing"])
def test_the_parts_add_up(world: GaussianWorld, x: torch.Tensor, given: Given) -> None:
    result = run(world, x, PROMPT, "cat", "sea", given=given)
    redundancy, first, second, synergy = result.pairs[0].parts
    (cat, sea), together = result.pairs[0].alone, result.pairs[0].together
    for left, right in (
        ([redundancy, first], cat),
        ([redundancy, second], sea),
        ([redundancy, first, second, synergy], together),
    ):
        assert sum(part.bits for part in left) == pytest.approx(right.bits)
        np.testing.assert_allclose(sum(part.map for part in left), right.map, atol=1e-12)
    for part in (redundancy, first, second, synergy, together):
        assert part.map.sum() == pytest.approx(part.bits)


@pytest.mark.parametrize("n_seeds", [4, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stopping", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_intervals_cover(stopping: bool, n_seeds: int) -> None:
    """95 % intervals of all parts, totals and cells, over 12 images."""
    world, rng = GaussianWorld(WORDS), np.random.default_rng(3)
    totals, cells, looks = [], [], []
    for picture in range(12):
        world.draw_words(rng)
        x = world.draw_image(rng)
        truth = {pair: true_parts(world, x, *pair, "rest") for pair in combinations(WORDS, 2)}
        for repeat in range(n_seeds):
            options: dict[str, Any] = {"rel_error": 0.05} if stopping else {"n_replicates": 8}
            result = run(world, x, PROMPT, seed=100 * picture + repeat, **options)
            factor = result.interval_factor()
            looks.append(result.n_replicates)
            for pair in result.pairs:
                for part, true in zip(pair.parts, truth[pair.words], strict=True):
                    totals.append(abs(part.bits - true.sum()) <= factor * part.stderr + 1e-9)
                    cells.append((np.abs(part.map - true) <= factor * part.map_stderr + 1e-9).mean())
    assert 0.91 <= np.mean(totals) <= 0.98
    assert 0.91 <= np.mean(cells) <= 0.98
    if stopping:
        assert len(set(looks)) >= 2


def test_the_jackknife_takes_the_bias_off_a_minimum() -> None:
    """Two means whose difference lies anywhere from -3 to 3 of its errors: the plain minimum is too small."""
    rng = np.random.default_rng(0)
    n, cells = 16, 40_000
    second = np.linspace(-3, 3, cells) / math.sqrt(n)
    noisy = rng.normal(size=(n, cells))
    truth = np.minimum(0, second).mean()
    plain = np.minimum(noisy.mean(0), second).mean() - truth
    jackknifed = smaller_of_means(noisy, np.broadcast_to(second, noisy.shape)).mean() - truth
    assert plain < -0.06 / math.sqrt(n)  # in errors of one cell
    assert abs(jackknifed) < 0.02 / math.sqrt(n)
    same = smaller_of_means(noisy, noisy + 10)
    np.testing.assert_allclose(same, noisy)  # where one is clearly the smaller, its own replicates


# --- a world of finitely many things ----------------------------------------------------------------------------------

PAIRS = {"cat dog": 0.4, "cat hen": 0.1, "pig dog": 0.2, "pig hen": 0.3}


@pytest.fixture(scope="module")
def pairs() -> DiscreteWorld:
    """Two dependent words; the image determines both."""
    return world_of(PAIRS)


def test_the_discrete_worlds_own_formulas_agree(pairs: DiscreteWorld) -> None:
    picture = pairs.image(1, np.random.default_rng(0))
    for text in ("cat", "hen", "cat hen"):
        assert pairs.direct(picture, "", text, -40, 40) == pytest.approx(pairs.log_ratio(picture, "", text), abs=1e-6)
        assert pairs.log_ratio(picture, "", text) == pytest.approx(-math.log(pairs.probability(text)), abs=1e-6)


@pytest.mark.parametrize("state", range(4))
def test_redundancy_less_synergy_is_the_words_own_information(pairs: DiscreteWorld, state: int) -> None:
    """R - S = log p(both) / p(one) p(other) of two words that the image determines, whatever redundancy is."""
    first, second = pairs.states[state].words.split()
    picture = pairs.image(state, np.random.default_rng(state))
    prompt = f"{first} {second}"
    result = run(pairs, picture, prompt, n_replicates=256, given="nothing")
    own = math.log2(pairs.probability(prompt) / pairs.probability(first) / pairs.probability(second))
    inside = [BITS * pairs.direct(picture, "", text, LOW, HIGH) for text in (first, second, prompt)]
    bits, stderr = result.pairs[0].coinformation
    assert stderr < 0.15
    assert abs(bits - (inside[0] + inside[1] - inside[2])) < 4 * stderr
    assert abs(bits - own) < 4 * stderr + 0.08  # what lies outside [-5, 7]


def test_synonyms_are_redundant() -> None:
    world = world_of({"dog hound": 0.5, "cat": 0.5})
    result = run(world, world.image(0, np.random.default_rng(0)), "dog hound", given="nothing", rel_error=0.2)
    assert result.redundancy.bits > 0.2
    for part in (*result.unique, result.synergy):
        assert part.bits == pytest.approx(0, abs=1e-9)
    assert result.redundancy.bits == pytest.approx(result.pairs[0].together.bits)


def test_what_only_two_words_together_determine_is_synergy() -> None:
    """The centre is the exclusive or of two words: neither alone has any information."""
    p = dict.fromkeys(["red big", "red small", "blue big", "blue small"], 0.25)
    world = world_of(p, {"red big": 0, "blue small": 0, "red small": 1, "blue big": 1})
    rng = np.random.default_rng(0)
    synergy, less_than_nothing = [], []
    for seed in range(40):
        result = run(world, world.image(0, rng), "red big", n_replicates=8, given="nothing", seed=seed)
        assert result.redundancy.bits == result.unique[0].bits == result.unique[1].bits == 0
        synergy.append(result.synergy.bits)
        less_than_nothing.append(-result.pairs[0].coinformation.bits)
    for bits in (synergy, less_than_nothing):
        assert abs(np.mean(bits) - 1) < 4 * np.std(bits) / math.sqrt(40)


def test_the_split_by_surprisal(pairs: DiscreteWorld) -> None:
    """If the image determines both words, redundancy is the surprisal of the likelier one."""
    picture = pairs.image(1, np.random.default_rng(0))
    result = run(
        pairs,
        picture,
        "cat hen",
        n_replicates=512,
        given="nothing",
        surprisal=lambda word: -math.log2(pairs.probability(word)),
    )
    split = result.pairs[0].by_surprisal
    assert split is not None
    h = {word: -math.log2(pairs.probability(word)) for word in ("cat", "hen", "cat hen")}
    assert split.surprisals == (h["cat"], h["hen"])
    expected = [h["cat"], 0.0, h["hen"] - h["cat"], h["cat hen"] - h["hen"]]
    found = [split.redundancy, *split.unique, split.synergy]
    for (bits, stderr), truth in zip(found, expected, strict=True):
        assert abs(bits - truth) < 4 * stderr + 0.08  # what lies outside [-5, 7]
    assert split.exceeded == (False, False)
    assert run(pairs, picture, "cat hen").pairs[0].by_surprisal is None


def test_bits_beyond_a_surprisal_are_flagged() -> None:
    rng = np.random.default_rng(0)
    direct = tuple(bits + 0.1 * rng.normal(size=16) for bits in (3.0, 1.0, 4.0))
    split = split_by_surprisal((direct[0], direct[1], direct[2]), (2.0, 1.0))
    assert split.exceeded == (True, False)
    # h - i is -1 of the first and 0 of the second: R = 1 - (-1)
    assert split.redundancy.bits == pytest.approx(2, abs=0.1)
    assert split.unique[1].bits == pytest.approx(-1, abs=0.1)


# --- bookkeeping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["rest", "nothing"])
@pytest.mark.parametrize("n_words", [2, 3])
def test_a_table_costs_no_more_than_its_texts(x: torch.Tensor, given: Given, n_words: int) -> None:
    world = GaussianWorld(WORDS)
    result = run(world, x, PROMPT, *WORDS[:n_words], n_replicates=8, given=given)
    n_texts = 1 + n_words + n_words * (n_words - 1) // 2
    assert result.n_evals == sum(world.batch_sizes) == 8 * 8 * n_texts
    assert len(set(world.encoded)) == n_texts
    with pytest.raises(ValueError, match=rf"{n_words} words need at least {16 * n_texts}\. .* fewer words"):
        run(world, x, PROMPT, *WORDS[:n_words], given=given, max_evals=16 * n_texts - 1)


def test_a_pair_of_a_table_is_the_same_pair_alone(world: GaussianWorld, x: torch.Tensor) -> None:
    table = run(world, x, PROMPT, n_replicates=8)
    alone = run(world, x, PROMPT, "sea", "red", n_replicates=8)
    assert alone.pairs[0].words == ("sea", "red")  # as asked for
    pair = table.pair("Sea", "red")
    assert pair.words == ("red", "sea")
    assert alone.redundancy.bits == pytest.approx(pair.redundancy.bits, rel=1e-4)
    assert alone.unique[0].bits == pytest.approx(pair.unique[1].bits, rel=1e-4)
    with pytest.raises(ValueError, match=r"3 pairs; ask for one: \.pair\('red', 'cat'\)"):
        _ = table.redundancy
    with pytest.raises(ValueError, match=r"no pair of 'red' and 'dog'"):
        table.pair("red", "dog")


def test_it_stops_when_all_parts_are_known_well_enough(world: GaussianWorld, x: torch.Tensor) -> None:
    easy = run(world, x, PROMPT, rel_error=0.5)
    assert (easy.stopped, easy.n_replicates) == ("converged", 4)
    hard = run(world, x, PROMPT, n_replicates=11)
    assert (hard.stopped, hard.n_replicates) == ("budget", 11)
    worst = max(part.stderr / pair.together.bits for pair in hard.pairs for part in pair.parts)
    assert hard.rel_error == pytest.approx(worst)


def test_results_do_not_depend_on_the_batch_size(world: GaussianWorld, x: torch.Tensor) -> None:
    small, large = (decompose(world, x, PROMPT, "red", "cat", batch_size=size, rel_error=0.3) for size in (3, 1000))
    for part, other in zip(small.pairs[0].parts, large.pairs[0].parts, strict=True):
        np.testing.assert_allclose(part.map, other.map, rtol=1e-4, atol=1e-6)


def test_progress_grows_and_a_callback_can_cancel(world: GaussianWorld, x: torch.Tensor) -> None:
    *progress, last = decompose_iter(world, x, PROMPT, "red", "cat", batch_size=8, rel_error=0.5)
    assert isinstance(last, Decomposition)
    seen = [event for event in progress if isinstance(event, Progress)]
    assert len(seen) == len(progress) == 8
    assert seen[0].partial is None
    assert seen[-1].partial is not None
    np.testing.assert_array_equal(seen[-1].partial.synergy.map, last.synergy.map)
    stopped = decompose(world, x, PROMPT, batch_size=28, callback=lambda event: event.n_replicates < 3)
    assert (stopped.stopped, stopped.n_replicates) == ("cancelled", 3)
    with pytest.raises(Cancelled):
        decompose(world, x, PROMPT, batch_size=8, callback=lambda _: False)


def test_results_survive_json(world: GaussianWorld, x: torch.Tensor) -> None:
    result = run(world, x, PROMPT, "red", "cat", surprisal=lambda _: 3.0)
    data = json.loads(json.dumps(result.to_dict()))
    (pair,) = data["pairs"]
    assert pair["words"] == ["red", "cat"]
    assert pair["unique"][1]["map"] == result.unique[1].map.tolist()
    assert pair["by_surprisal"]["surprisals"] == [3.0, 3.0]
    assert data["settings"]["surprisals"] == {"red": 3.0, "cat": 3.0}


def test_results_can_be_shown_without_torch() -> None:
    code = "import sys, core\ncore.Decomposition, core.Ranking\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_real_pipeline_end_to_end(model: Diffuser) -> None:
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"sampler": Sampler(n_points=4, min_replicates=2), "rel_error": 100.0}
    rows = model.n_unet_rows
    result = decompose(model, latents, "A cat on grass", "cat", "grass", **options)
    assert model.n_unet_rows - rows == result.n_evals == 2 * 4 * 4
    assert result.redundancy.map.shape == (16, 16)
    job = decompose_iter(model, latents, "A cat on grass", "cat", "grass", batch_size=4, **options)
    next(job)
    assert model._lock.is_held
    job.close()
    assert not model._lock.is_held


def test_two_words_may_be_the_whole_prompt(world: GaussianWorld, x: torch.Tensor) -> None:
    rest, nothing = (run(world, x, "red cat", given=given, rel_error=0.5) for given in ("rest", "nothing"))
    assert rest.redundancy.bits == pytest.approx(nothing.redundancy.bits)


@pytest.mark.parametrize(
    ("prompt", "words", "options", "error", "message"),
    [
        (PROMPT, ["cat", "Cat "], {}, PromptError, r"'cat' was given twice"),
        (PROMPT, ["cat", "dog"], {}, WordNotInPromptError, r"'dog' is not in the prompt"),
        (PROMPT, ["cat"], {}, PromptError, r"Two different words are needed; there is only 'cat'"),
        ("cat", [], {}, PromptError, r"Two different words are needed; there is only 'cat'"),
        ("cat", ["cat", "cat"], {}, PromptError, r"twice"),
        ("...", [], {}, PromptError, r"no word"),
        (PROMPT, ["red", "cat"], {"given": "all"}, ValueError, r"given is 'rest'"),
        (PROMPT, ["red", "cat"], {"rel_error": 0.0}, ValueError, r"rel_error"),
    ],
)
def test_wrong_arguments_fail_before_the_model_is_called(
    world: GaussianWorld,
    x: torch.Tensor,
    prompt: str,
    words: list[str],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        decompose_iter(world, x, prompt, *words, **options)
