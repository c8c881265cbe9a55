import itertools
from collections import Counter
from functools import cache
from math import log2

import numpy as np
import pytest

from core.diffusion.text import distinct_words
from training.picturebook.world.captions import (
    N_OBJECTS_P,
    RELATIONS,
    Caption,
    Story,
    background_probabilities,
    caption_probability,
    log2_word_given_rest,
    nouns_probability,
    sample_caption,
    sample_story,
    vocabulary,
)
from training.picturebook.world.tokens import MAX_TOKENS, build_tokenizer
from training.picturebook.world.world import BACKGROUNDS, NOUNS, PLANTED_PAIR


def a_caption(text_of: str = "a {style} picture of a {a} {relation} of a {b} on the {background}") -> Caption:
    story = Story(("cat", "dog"), "left", "grass", "sepia")
    caption = Caption(story, ("cat", "hound"), "and", "grass", False, True, True, "")
    assert caption.text == text_of.format(style="sepia", a="cat", relation="left", b="hound", background="grass")
    return caption


@cache
def samples() -> tuple[Caption, ...]:
    rng = np.random.default_rng(0)
    return tuple(sample_caption(rng, sample_story(rng)) for _ in range(20000))


def test_nouns_have_probabilities_that_sum_to_one() -> None:
    names = [noun.name for noun in NOUNS]
    assert sum(nouns_probability((a,)) for a in names) == pytest.approx(N_OBJECTS_P[0])
    assert sum(nouns_probability(pair) for pair in itertools.product(names, repeat=2)) == pytest.approx(N_OBJECTS_P[1])
    assert background_probabilities(("cat", "whale")).sum() == pytest.approx(1)


def test_sampled_frequencies_are_the_stated_probabilities() -> None:
    captions = samples()
    firsts = Counter(c.story.nouns[0] for c in captions if len(c.story.nouns) == 1)
    expected = nouns_probability(("bat",)) * len(captions)
    assert abs(firsts["bat"] - expected) < 5 * expected**0.5
    of_whale = [c for c in captions if c.story.nouns == ("whale",)]
    in_sea = sum(c.story.background == "sea" for c in of_whale) / len(of_whale)
    sea = [background.name for background in BACKGROUNDS].index("sea")
    assert in_sea == pytest.approx(background_probabilities(("whale",))[sea], abs=0.12)


def test_caption_probabilities_are_those_of_the_sampler() -> None:
    # All captions of one story that differ in their wording alone: their probabilities add up to the story's.
    story = Story(("cat",), None, "sea", "plain")
    texts: dict[str, float] = {}
    rng = np.random.default_rng(0)
    for _ in range(3000):
        caption = sample_caption(rng, story)
        texts[caption.text] = caption_probability(caption)
    p = nouns_probability(("cat",)) * background_probabilities(("cat",))[3] * 0.4
    assert sum(texts.values()) == pytest.approx(p)


def test_the_planted_pair_meets_every_other_time() -> None:
    a, b = PLANTED_PAIR
    with_a = sum(nouns_probability((a, noun.name)) for noun in NOUNS)
    assert nouns_probability((a, b)) / with_a == pytest.approx(0.5)
    assert nouns_probability((b, a)) == nouns_probability((a, b))


def test_relations_are_balanced_over_ordered_pairs() -> None:
    related = [c.story for c in samples() if c.story.relation]
    counts = Counter(story.relation for story in related)
    for relation in RELATIONS:
        assert counts[relation] / len(related) == pytest.approx(1 / 4, abs=0.02)
    first = Counter(story.nouns[0] < story.nouns[1] for story in related if story.relation == "left")
    assert first[True] / first.total() == pytest.approx(0.5, abs=0.04)


def test_ceilings_computed_by_hand() -> None:
    caption = a_caption()
    assert log2_word_given_rest(caption, "sepia") == pytest.approx(log2(1 / 5))  # five named styles, equally likely
    assert log2_word_given_rest(caption, "left") == pytest.approx(log2(1 / 2))  # `of` leaves left and right
    assert log2_word_given_rest(caption, "the") == 0
    # Four places follow `on the`; street and road are one place with two words. The first two nouns like grass.
    on = {
        p.words[0]: background_probabilities(("cat", "dog"))[i]
        for i, p in enumerate(BACKGROUNDS)
        if p.preposition == "on"
    }
    assert log2_word_given_rest(caption, "grass") == pytest.approx(log2(on["grass"] / sum(on.values())))
    with pytest.raises(ValueError, match="whale"):
        log2_word_given_rest(caption, "whale")


def test_ceilings_match_the_frequencies_of_samples() -> None:
    # p(cat | "a sits alone") by counting captions with one noun and nothing else told.
    bare = [c for c in samples() if len(c.words) == 1 and c.text == f"a {c.words[0]}"]
    bats = [c for c in bare if c.words == ("bat",)]
    assert 2 ** log2_word_given_rest(bats[0], "bat") == pytest.approx(len(bats) / len(bare), rel=0.3)


def test_every_word_is_one_token_and_every_caption_fits() -> None:
    tokenizer = build_tokenizer()
    for caption in samples()[:3000]:
        words = set(distinct_words(caption.text))
        assert words <= set(vocabulary())
        ids = tokenizer(caption.text).input_ids
        assert len(ids) <= MAX_TOKENS
        assert tokenizer.eos_token_id not in ids[1:-1]
        assert len(ids) == 2 + len(caption.text.replace(",", " , ").split())


def test_train_and_test_share_no_combination() -> None:
    rng = np.random.default_rng(0)
    train = {(tuple(sorted(s.nouns)), s.background, s.style) for s in (sample_story(rng, "train") for _ in range(5000))}
    test = {(tuple(sorted(s.nouns)), s.background, s.style) for s in (sample_story(rng, "test") for _ in range(500))}
    assert not train & test
