from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu
from transformers import CLIPTextConfig, CLIPTextModel

import core
from core.diffusion.diffuser import Diffuser
from core.diffusion.text import distinct_words, split_words
from core.information.ranking import Ranking
from core.spec import ModelSpec
from tests.conftest import make_pipeline
from training.evaluate import run
from training.evaluate.common.evaluation import Evaluation
from training.evaluate.common.maps import normalised
from training.evaluate.common.masks import weighted_pearson
from training.evaluate.information import captions, counterfactual, excess, likelihood, localisation, pid, words
from training.evaluate.information.captions import OPPOSITE, others_of, outcome_of, shuffled
from training.evaluate.information.counterfactual import Changed, Regenerated, predicted
from training.evaluate.information.localisation import (
    ALONG_SAMPLER,
    AT_FLAT,
    AT_LOGISTIC,
    BOTH,
    CMI,
    CMI_KONG,
    METHODS,
    WHOLE,
    Scored,
    Source,
    as_kong,
    best_threshold,
    masks_of,
    targets_of,
    word_ious,
)
from training.evaluate.information.pid import Found
from training.evaluate.information.pid_pairs import (
    HOMONYM,
    KINDS,
    OBJECT_AND_BACKGROUND,
    OBJECTS,
    PLANTED,
    SYNONYMS,
    joint_of,
    log2_together,
    scenes_with,
)
from training.picturebook.world.captions import Caption, Story, log2_word_given_rest
from training.picturebook.world.scenes import caption_of, make_scene, paint
from training.picturebook.world.tokens import MAX_TOKENS, build_tokenizer
from training.picturebook.world.world import BACKGROUNDS, LABELS, PLANTED_PAIR
from training.picturebook.world.world import OBJECTS as ALL_OBJECTS

CAPTIONS = [caption_of(make_scene(seed, "test")) for seed in range(120)]


@pytest.fixture(scope="module")
def reader() -> Diffuser:
    """The small pipeline, untrained, with the embedded model's vocabulary."""
    pipeline = make_pipeline()
    pipeline.tokenizer = build_tokenizer()
    end = pipeline.tokenizer.eos_token_id
    pipeline.text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(pipeline.tokenizer.get_vocab()),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=pipeline.tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    return Diffuser(pipeline, ModelSpec("small", "nowhere"))


def caption(*nouns: str, background: str = "sea", style: str = "plain") -> Caption:
    return Caption(Story(nouns, None, background, style), nouns, "and", background, False, style != "plain", False, "")


# --- pid --------------------------------------------------------------------------------------------------------------


def test_every_kind_picks_the_pairs_it_is_named_after() -> None:
    picked = {kind: [(c, kind.pick(c)) for c in CAPTIONS if c.background_word is not None] for kind in KINDS}
    found = {kind: [(c, pair) for c, pair in pairs if pair] for kind, pairs in picked.items()}
    assert all(len(pairs) > 2 for pairs in found.values())
    for described, pair in found[SYNONYMS]:
        assert pair[0] in (*described.words, described.background_word)
        assert pair[1] not in split_words(described.text)
    assert {pair for _, pair in found[SYNONYMS]} >= {("sea", "ocean"), ("ocean", "sea")}
    assert all({*pair} == {*PLANTED_PAIR} for _, pair in found[PLANTED])
    assert all(
        pair[0] in ("bat", "mouse") and pair[1] == described.background_word for described, pair in found[HOMONYM]
    )
    assert all(pair[0] not in ("bat", "mouse") for _, pair in found[OBJECT_AND_BACKGROUND])
    assert not any(
        {"bat", "mouse"} & {*described.story.nouns} or {*pair} == {*PLANTED_PAIR} for described, pair in found[OBJECTS]
    )
    first = list(islice(scenes_with(PLANTED), 2))
    assert all({*PLANTED_PAIR} <= {*scene.story.nouns} for scene in first)


@pytest.mark.parametrize("described", [c for c in CAPTIONS if c.background_word is not None and len(c.words) > 1][:6])
def test_words_together_agree_with_each_given_the_other(described: Caption) -> None:
    """p(one | other, rest), from the joint, is what the grammar says of one slot."""
    for first, second in (
        (described.words[0], described.words[1]),
        (described.words[1], str(described.background_word)),
    ):
        joint = joint_of(described, first, second)
        given_second = sum(p for (_, word), p in joint.items() if word == second)
        assert np.log2(joint[first, second] / given_second) == pytest.approx(log2_word_given_rest(described, first))
        assert all(p == 0 for (one, other), p in joint.items() if one == other)


def test_the_planted_pair_shares_information_and_others_do_not() -> None:
    planted = log2_together(caption(*PLANTED_PAIR, background="grass"), *PLANTED_PAIR)
    assert planted > 2
    assert log2_together(caption("butterfly", "cat", background="grass"), "butterfly", "cat") < 0  # it has its partner
    assert abs(log2_together(caption("cat", "pig", background="kitchen"), "cat", "pig")) < 0.7
    assert log2_together(caption("whale"), "whale", "sea") > 1  # at home


def test_tables_of_decompositions_by_hand(reader: Diffuser) -> None:
    bench = pid.PidBench(reader, pid.PidSettings(n_bootstrap=20))
    parts = np.array([[1.0, 2.0, 3.0, 0.5], [3.0, 2.0, 1.0, 1.5]])
    found = Found(parts, np.array([8.0, 8.0]), np.array([[1.0, 4.0], [1.0, 4.0]]), np.full(2, 2.0), np.full(2, 0.5))
    for kind in KINDS:
        for given in ("nothing", "rest"):
            bench._found[kind, given] = found  # type: ignore[index]
    row = pid.shares(bench).rows[0]
    assert str(row["redundancy"]).startswith("2.00 (")
    assert str(row["redundancy share"]).startswith("0.500 (")  # 2 of (8 / 2)
    (planted, *_) = pid.planted(bench).rows
    assert planted["measured minus grammar"] == "1.50 (1.50 to 1.50)"
    assert pid.homonyms(bench).rows[0]["synergy share"] == "0.250 (0.250 to 0.250)"


def test_scenes_are_measured_where_their_objects_are(reader: Diffuser) -> None:
    bench = pid.PidBench(reader, pid.PidSettings(n_scenes=1, n_points=2, n_replicates=2, n_bootstrap=20))
    rows = reader.n_unet_rows
    for kind in (SYNONYMS, HOMONYM):
        found = bench.found(kind, "nothing")
        assert found.parts.shape == (1, 4)
        assert np.isnan(found.grammar).all() == (kind is SYNONYMS)
        redundancy, first, second, _ = found.parts[0]
        assert found.alone[0] == pytest.approx(2 * redundancy + first + second)
    assert reader.n_unet_rows - rows == 2 * 2 * 2 * 4
    assert bench.found(HOMONYM, "nothing") is found
    assert found.there[0, 1] < found.parts[0].sum()  # the object does not fill the image
    scene = next(scenes_with(HOMONYM))
    shares = pid._share_of_cells(paint(scene).labels, caption_of(scene), HOMONYM.of(caption_of(scene))[0])
    assert shares.shape == (16, 16)
    senses = [LABELS.index(name) for name in ("bat", "club", "rodent", "device")]
    assert shares.mean() == pytest.approx(np.isin(paint(scene).labels, senses).mean())


# --- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("described", CAPTIONS[:30])
def test_other_captions_differ_in_one_respect(described: Caption) -> None:
    others = others_of(described, np.random.default_rng(0))
    story = described.story
    assert set(others) >= {"object"}
    assert ("relation" in others) == (story.relation is not None)
    assert ("background" in others) == (described.background_word is not None)
    assert ("style" in others) == described.style_named
    own = [word.text for word in split_words(described.text)]
    for kind in {"object", "relation", "style"} & set(others):
        words = [word.text for word in split_words(others[kind][0])]
        changed = [(a, b) for a, b in zip(own, words, strict=False) if a != b]
        if kind == "object":
            assert len(changed) == 1
            assert changed[0][0] in described.words
        if kind == "style":
            assert [a for a, _ in changed] == [story.style]
        if kind == "relation" and story.relation is not None:
            assert (story.relation, OPPOSITE[story.relation]) in changed
    if "background" in others:
        assert not {story.background, described.background_word} & {
            word.text for word in split_words(others["background"][0])
        }
    for order in others.get("order of the words", []):
        assert sorted(order.split()) == sorted(own)
        assert order.split() != own
    texts = [text for listed in others.values() for text in listed]
    assert len({described.text, *texts}) == len(texts) + 1


def test_too_few_words_have_no_other_orders() -> None:
    assert shuffled("a cat", np.random.default_rng(0)) == []
    assert len(set(shuffled("a cat and a dog", np.random.default_rng(0)))) == captions.N_SHUFFLES


def test_an_outcome_is_that_of_its_own_comparisons() -> None:
    bits = np.array([5.0, 1.0, 6.0, 4.9])
    ranking = Ranking(
        captions=("a", "b", "c", "d"),
        bits=bits,
        stderr=np.ones(4),
        ahead=bits[:, None] - bits,
        ahead_stderr=np.full((4, 4), 0.2),
        orthogonal_bits=np.array([3.0, 4.0, 2.0, 2.0]),
        orthogonal_stderr=np.ones(4),
        n_evals=1,
        n_replicates=8,
        stopped="budget",
        rel_error=1.0,
        seed=0,
        settings={},
    )
    assert outcome_of(ranking, [1]) == (True, False, True, 4.0)
    assert outcome_of(ranking, [2]) == (False, True, True, -1.0)
    direct, orthogonal, sure, margin = outcome_of(ranking, [1, 3])
    assert (direct, orthogonal, sure) == (True, False, False)
    assert margin == pytest.approx(0.1)
    with pytest.raises(ValueError, match="empty prompt"):
        outcome_of(replace(ranking, orthogonal_bits=None), [1])


# --- localisation -----------------------------------------------------------------------------------------------------


def square(kind: str = "object") -> Scored:
    """Two words on 8 x 8 pixels: a map that is high on its own quarter, and one that is high elsewhere too."""
    truth = torch.zeros(2, 8, 8, dtype=torch.bool)
    truth[:, :4, :4] = True
    right = torch.zeros(8, 8)
    right[:4, :4] = 10
    spread = right.clone()
    spread[:4, 4:] = 6
    return Scored(
        (kind, "background"), truth, {"m": torch.stack([right, spread]) - 3, WHOLE: torch.ones(2, 8, 8)}, {"m": 1}
    )


def test_words_are_scored_one_by_one_at_a_fraction_of_their_maps_range() -> None:
    scene = square()
    assert word_ious(scene, "m", "object", 0.5).tolist() == [1.0]
    assert word_ious(scene, "m", "background", 0.5).tolist() == [0.5]
    assert word_ious(scene, "m", "background", 0.7).tolist() == [1.0]
    assert word_ious(scene, WHOLE, "object", 0.95).tolist() == [0.25]
    assert 0.6 < best_threshold([scene], "m", "background") <= 0.95
    assert len(word_ious(square("background"), "m", "object", 0.5)) == 0
    hidden = scene._replace(truth=torch.zeros(2, 8, 8, dtype=torch.bool))
    assert len(word_ious(hidden, "m", "object", 0.5)) == 0
    ranged = normalised(scene.maps["m"])
    assert (ranged.amin().item(), ranged.amax().item()) == (0.0, 1.0)


def test_words_know_what_they_can_name() -> None:
    targets = targets_of(caption("bat", "cat"))
    names = {word: [LABELS[i] for i in classes] for word, classes in targets.items()}
    assert names == {"bat": ["bat", "club"], "cat": ["cat"], "sea": ["sea"]}
    assert len(LABELS) == len(ALL_OBJECTS) + len(BACKGROUNDS)


@pytest.mark.parametrize(("n_evals", "n_words"), [(256, 3), (192, 2), (64, 1)])
def test_the_published_way_spends_as_much(n_evals: int, n_words: int) -> None:
    sampler = as_kong(n_evals, n_words)
    spent = 3 * n_words * sampler.n_points * sampler.min_replicates
    assert abs(spent - n_evals) <= 6 * n_words
    assert (sampler.scale, sampler.stratified, sampler.antithetic, sampler.shared) == (2.0, False, False, False)


@pytest.mark.parametrize("source", ["painted", "drawn"])
def test_every_method_makes_a_map_of_every_word_for_what_it_says_it_costs(reader: Diffuser, source: Source) -> None:
    settings = localisation.LocalisationSettings(n_scenes=1, n_fit=0, n_points=2, n_replicates=2, num_inference_steps=2)
    rows = reader.n_unet_rows
    ((scored,), _) = localisation.LocalisationBench(reader, settings).scored(source)
    targets = targets_of(caption_of(make_scene(0, "test")))
    assert set(scored.maps) == set(scored.evals) == set(METHODS)
    for maps in scored.maps.values():
        assert maps.shape == (len(targets), 16, 16)
        assert bool(maps.isfinite().all())
    computed = sum(n for name, n in scored.evals.items() if name != BOTH)
    assert reader.n_unet_rows - rows == computed - scored.evals[CMI_KONG] // 3
    attention = scored.maps[AT_FLAT]
    assert not torch.allclose(attention[0], attention[1])
    assert not torch.allclose(attention, scored.maps[AT_LOGISTIC])
    assert not torch.allclose(attention, scored.maps[ALONG_SAMPLER])
    root = (normalised(scored.maps[CMI]) * normalised(attention)).sqrt()
    torch.testing.assert_close(scored.maps[BOTH], root)


def test_masks_are_those_of_a_words_classes_if_they_are_large_enough() -> None:
    labels = torch.zeros(32, 32, dtype=torch.long)
    labels[:20] = 1
    labels[20:, :9] = 2
    one, two, both, none = masks_of(labels, [[1], [2], [1, 2], [5]])
    assert (int(one.sum()), int(two.sum()), int(both.sum()), int(none.sum())) == (640, 0, 748, 0)
    scene = make_scene(1, "test")
    targets = list(targets_of(caption_of(scene)).values())
    truth = torch.from_numpy(paint(scene).labels).long()
    areas = [torch.isin(truth, torch.tensor(classes)).sum() for classes in targets]
    assert masks_of(truth, targets).sum((1, 2)).tolist() == [int(area) for area in areas]


# --- counterfactual ---------------------------------------------------------------------------------------------------


def changed(image: int, kind: str, cmi: float, change: float) -> Changed:
    """A word whose CMI and change are the same ramp over four cells, of two heights."""
    ramp = np.arange(4.0).reshape(2, 2)
    maps = {
        counterfactual.CMI: cmi * ramp,
        counterfactual.ALONG_SAMPLER: -cmi * ramp,
        counterfactual.AT_FLAT: np.ones((2, 2)),
    }
    return Changed(image, kind, maps, dict.fromkeys(counterfactual.CHANGES, change * ramp))


def test_correlations_are_right_by_hand(reader: Diffuser) -> None:
    bench = counterfactual.CounterfactualBench(
        reader, counterfactual.CounterfactualSettings(n_scenes=4, n_bootstrap=50)
    )
    pairs = [(1.0, 2.0), (2.0, 1.0), (3.0, 4.0), (4.0, 3.0)]
    listed = [changed(i, "object", *pair) for i, pair in enumerate(pairs)]
    bench.measured = listed, [Regenerated(0.01, 1.0)] * 4
    assert bench.images("object", "removed", counterfactual.CMI).value == pytest.approx(0.6)
    assert bench.images("object", "removed", counterfactual.ALONG_SAMPLER).value == pytest.approx(-0.6)
    assert bench.images(counterfactual.ALL, "swapped", counterfactual.CMI).value == pytest.approx(0.6)
    # The next picture's word: 2, 3, 4 and, as there is none after the last, 1.
    assert [map_.sum() / 6 for map_ in predicted(listed, counterfactual.CONTROL)] == [2, 3, 4, 1]
    assert bench.images("object", "removed", counterfactual.CONTROL).value == pytest.approx(
        np.corrcoef([2, 3, 4, 1], [2, 1, 4, 3])[0, 1]
    )
    assert bench.pixels("object", "removed", counterfactual.CMI).value == pytest.approx(1)
    assert bench.pixels("object", "removed", counterfactual.ALONG_SAMPLER).value == pytest.approx(-1)
    assert np.isnan(bench.pixels("object", "removed", counterfactual.AT_FLAT).value)  # a flat map predicts nothing
    low, high = bench.images("object", "removed", counterfactual.CMI).estimate[1:]
    assert low < 0.6 < high
    assert "0.010" in counterfactual.distances(bench).markdown()


def test_weights_of_a_correlation_are_repeats() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5))
    times = np.array([[2, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    by_hand = [np.corrcoef(np.repeat(x, row), np.repeat(y, row))[0, 1] for row in times]
    np.testing.assert_allclose(weighted_pearson(x, y, times.astype(float)), by_hand)


@pytest.mark.parametrize("described", CAPTIONS[:20])
def test_every_word_that_was_chosen_can_be_another(described: Caption) -> None:
    others = counterfactual.others_of(described, np.random.default_rng(0))
    present = set(distinct_words(described.text))
    assert set(others) <= present
    assert {"object", "background", "style", "relation"}.issuperset(kind for kind, _ in others.values())
    assert not any(to in others for kind, to in others.values() if kind != "relation")
    assert len(others) == len(described.words) + bool(described.background_word) + described.style_named + bool(
        described.story.relation
    )


def test_an_images_changes_are_those_of_its_own_noise(reader: Diffuser) -> None:
    settings = counterfactual.CounterfactualSettings(
        n_points=2, n_replicates=2, num_inference_steps=2, n_fixed_point_iterations=1
    )
    rows = reader.n_unet_rows
    found, back = counterfactual.measure(reader, 7, make_scene(1, "test"), settings)
    caption_ = caption_of(make_scene(1, "test"))
    n = len(counterfactual.others_of(caption_, np.random.default_rng(0)))
    assert len(found) == n
    assert reader.n_unet_rows - rows == 2 * 1 + 2 * (1 + 2 * n) + 4 * (n + 1) + 4
    x = reader.encode(Image.fromarray(paint(make_scene(1, "test")).image))
    whole = core.change_word(
        reader, x, caption_.text, caption_.words[0], num_inference_steps=2, n_fixed_point_iterations=1
    )
    np.testing.assert_allclose(found[0].change["removed"], whole.change, rtol=1e-3, atol=1e-6)
    assert back.error == pytest.approx(whole.reconstruction_error, rel=1e-3)
    assert all(word.image == 7 for word in found)


# --- words ------------------------------------------------------------------------------------------------------------


def test_auroc_and_lift_by_hand() -> None:
    scores, positive = np.array([3.0, 1.0, 2.0, 0.0]), np.array([True, True, False, False])
    weights = np.array([[1.0, 1, 1, 1], [1, 0, 1, 1], [0, 1, 2, 1]])
    np.testing.assert_allclose(words.auroc(scores, positive, weights), [3 / 4, 1, 1 / 3])
    assert words.auroc(np.zeros(4), positive, weights)[0] == 0.5
    area = np.array([[1.0, 0], [0, 0]])
    assert words.lift(np.ones((2, 2)), area) == 1
    assert words.lift(area, area) == 4
    assert np.isnan(words.lift(np.zeros((2, 2)), area))


def test_every_word_has_its_kind_and_its_bits(reader: Diffuser) -> None:
    number = next(n for n in range(99) if CAPTIONS[n].story.relation and CAPTIONS[n].style_named)
    scene, described = make_scene(number, "test"), CAPTIONS[number]
    settings = words.WordSettings(n_points=2, n_replicates=2)
    rows = reader.n_unet_rows
    found = words.measure(reader, number, scene, settings)
    present = distinct_words(described.text)
    assert len(found) == len(present)
    assert reader.n_unet_rows - rows == 4 * (2 * (len(present) + 1) + 1)
    kinds = {word: row.kind for word, row in zip(present, found, strict=True)}
    assert [word for word, kind in kinds.items() if kind == "relation"] == [described.story.relation]
    assert [word for word, kind in kinds.items() if kind == "style"] == [described.story.style]
    assert {word for word, kind in kinds.items() if kind == "object"} == set(described.words)
    assert all(row.grammar == 0 for row in found if row.kind == "other")
    assert all(row.grammar > 0 for row in found if row.kind != "other")
    assert 0 < sum(row.totals["attention"] for row in found) < 1
    shown = words.share_of_objects(paint(scene).labels, described)
    assert 0 < shown.mean() < 1


def test_the_excess_bench_measures_what_words_say_and_where(reader: Diffuser) -> None:
    bench = excess.ExcessBench(reader, excess.ExcessSettings(n_scenes=1, n_replicates=2))
    assert [word.word for word in bench.words] == excess.content_words(caption_of(make_scene(0, "test")))
    for word in bench.words:
        assert word.by_log_snr.sum() == pytest.approx(word.bits, rel=1e-3, abs=1e-3)


# --- from the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluation", "settings"),
    [
        (captions.EVALUATION, captions.CaptionSettings(n_scenes=2, n_points=2, n_replicates=2, n_bootstrap=20)),
        (pid.EVALUATION, pid.PidSettings(n_scenes=1, n_points=2, n_replicates=2, n_bootstrap=20)),
        (
            counterfactual.EVALUATION,
            counterfactual.CounterfactualSettings(
                n_scenes=3,
                n_points=2,
                n_replicates=2,
                num_inference_steps=2,
                n_fixed_point_iterations=1,
                n_bootstrap=20,
            ),
        ),
        (likelihood.EVALUATION, likelihood.LikelihoodSettings(n_scenes=2, n_fit=3, n_bootstrap=20)),
        (excess.EVALUATION, excess.ExcessSettings(n_scenes=2, n_replicates=2)),
        (words.EVALUATION, words.WordSettings(n_scenes=3, n_points=2, n_replicates=2, n_bootstrap=20)),
        pytest.param(
            localisation.EVALUATION,
            localisation.LocalisationSettings(
                n_scenes=2, n_fit=1, n_points=2, n_replicates=2, num_inference_steps=2, n_bootstrap=20
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_each_makes_its_tables_once(
    reader: Diffuser, tmp_path: Path, evaluation: Evaluation[Any, Any], settings: object
) -> None:
    tiny = replace(evaluation, quick=settings)
    options = run.EvalOptions(quick=True, folder=tmp_path)
    tables = run.evaluate(tiny, reader, options)
    assert [table.name for table in tables] == list(tiny.part_names)
    rows = reader.n_unet_rows
    again = run.evaluate(tiny, reader, options)
    assert reader.n_unet_rows == rows
    for table, other in zip(tables, again, strict=True):
        assert table.markdown() == other.markdown()
        assert table.rows
        assert all(set(row) == set(table.rows[0]) for row in table.rows)


def test_the_area_under_the_curve_is_scipys() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 40).astype(float), rng.uniform(size=40) < 0.4
    u = mannwhitneyu(scores[positive], scores[~positive]).statistic
    area = words.auroc(scores, positive, np.ones((1, 40)))[0]
    assert area == pytest.approx(u / (positive.sum() * (~positive).sum()))
