"""The part of the bits that is the model's own error: on words whose excess is known, and on the small model."""

import json
from pathlib import Path

import numpy as np
import pytest

from core.information.surprisal import CEILINGS, EXCESS
from training.evaluate.information.excess import (
    EDGES,
    Check,
    ExcessBench,
    ExcessSettings,
    ToldWord,
    by_log_snr,
    check_of,
    content_words,
    excess_of,
    is_of_use,
    told_by,
    write_ceilings,
)
from training.evaluate.information.excess import excess as table_of
from training.picturebook.world.captions import Caption, Story, log2_word_given_rest


def words_with(excess: float, spread: float, told: float = 4.0, n_scenes: int = 40, seed: int = 0) -> list[ToldWord]:
    """One to three words of each scene whose error has a part that they share."""
    rng, parts = np.random.default_rng(seed), np.zeros(len(EDGES) - 1)
    found = []
    for image in range(n_scenes):
        shared = rng.normal(0, spread)
        for _ in range(1 + image % 3):
            bits = told + excess + shared + rng.normal(0, spread / 2)
            found.append(ToldWord(image, "cat", "object", bits, told, parts + bits / len(parts)))
    return found


def test_the_interval_of_the_excess_covers_though_words_of_a_scene_vary_together() -> None:
    held = []
    for seed in range(300):
        _, low, high = excess_of(words_with(3.0, 2.0, seed=seed))
        held.append(low <= 3.0 <= high)
    assert 0.92 <= np.mean(held) <= 0.98
    assert excess_of(words_with(3.0, 2.0, n_scenes=1))[1:] == (-np.inf, np.inf)


def test_a_correction_is_offered_for_one_image_only_where_it_covers_and_tells_more_than_the_ceiling() -> None:
    steady, varying = (check_of(words_with(3.0, spread, n_scenes=60)) for spread in (0.5, 5.0))
    for check in (steady, varying):
        assert check.mean > 0.85
        assert 0.9 < check.each <= 1
    assert is_of_use(steady, 4.0)
    assert not is_of_use(varying, 4.0)
    assert not is_of_use(Check(0.95, 0.8, 0.1), 4.0)


def test_a_check_can_fail() -> None:
    """Where one half of the scenes is unlike the other, the mean of one does not hold on the other."""
    first, second = words_with(0.0, 0.1), words_with(8.0, 0.1)
    mixed = [*first, *(w._replace(image=w.image + 1000) for w in second)]
    assert check_of(mixed[:4]).each != check_of(mixed).each
    assert check_of(mixed).half_width > 3


def test_a_word_tells_its_surprisal_less_the_choice_between_words_for_the_same() -> None:
    caption = Caption(
        Story(("dog", "cat"), None, "grass", "sepia"), ("hound", "cat"), "and", "grass", False, True, True, ""
    )
    assert content_words(caption) == ["sepia", "hound", "cat", "grass"]
    assert told_by(caption, "hound") == pytest.approx(
        -log2_word_given_rest(caption, "hound") - 1
    )  # `dog` says the same
    assert told_by(caption, "cat") == pytest.approx(-log2_word_given_rest(caption, "cat"))
    assert told_by(caption, "sepia") == pytest.approx(np.log2(5))


def test_ceilings_are_stored_by_word(tmp_path: Path) -> None:
    write_ceilings(tmp_path, n_captions=12)
    table = json.loads((tmp_path / CEILINGS).read_text())
    assert {kind for kind, *_ in table.values()} <= {"object", "background", "style", "relation"}
    assert all(0 <= mean <= most + 1e-3 for _, mean, most in table.values())
    assert "a" not in table


def test_the_table_says_what_is_stored(tmp_path: Path) -> None:
    bench = ExcessBench(None, ExcessSettings(n_scenes=60))  # type: ignore[arg-type]
    bench.__dict__["words"] = words_with(3.0, 0.5, n_scenes=60)
    (row,) = table_of(bench).rows
    assert (row["word"], row["one image corrected"]) == ("object", "yes")
    assert row["a perfect model could not have told"] == f"{1 - 4 / float(row['direct bits'] or 0):.0%}"
    (parts,) = by_log_snr(bench).rows
    # Seven bits in six equal parts: four of them are told by the end of the fourth.
    assert parts["all told by"] == f"{EDGES[4]:g}"
    bench.write(tmp_path, "digest")
    stored = json.loads((tmp_path / EXCESS).read_text())
    assert stored["unet"] == "digest"
    entry = stored["kinds"]["object"]
    assert entry["low"] < entry["bits"] < entry["high"]
    assert 0 < entry["half_width"] < 2
