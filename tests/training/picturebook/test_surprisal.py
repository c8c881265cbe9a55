"""How rare the grammar's words are, against probabilities that can be worked out by hand."""

import json
from math import log2

import pytest

from core.diffusion.vocabulary import Vocabulary
from core.information.surprisal import TABLE, load_surprisal
from core.spec import BUILT_IN
from training.picturebook.world.captions import (
    BACKGROUND_NAMED_P,
    N_OBJECTS_P,
    RELATED_P,
    RELATIONS,
    STYLE_NAMED_P,
    STYLE_P,
    vocabulary,
)
from training.picturebook.world.surprisal import surprisals
from training.picturebook.world.tokens import build_tokenizer


def test_the_committed_table_is_the_grammars() -> None:
    table = json.loads((BUILT_IN["picturebook"].assets / TABLE).read_text())
    assert list(table) == vocabulary()
    assert table["above"] == pytest.approx(-log2(N_OBJECTS_P[1] * RELATED_P / len(RELATIONS)), abs=0.03)
    assert table["sepia"] == pytest.approx(-log2(STYLE_P[1] * STYLE_NAMED_P), abs=0.03)
    assert table["the"] == pytest.approx(-log2(BACKGROUND_NAMED_P), abs=0.03)
    assert table["a"] == 0
    drawn = surprisals(3000, seed=1)
    assert max(abs(drawn[word] - table[word]) for word in ("the", "and", "picture", "in", "on")) < 0.2


def test_every_word_of_the_model_has_a_surprisal() -> None:
    surprisal = load_surprisal(BUILT_IN["picturebook"])
    assert surprisal is not None
    assert all(surprisal(word) < 12 for word in vocabulary())
    unmet = set(Vocabulary(build_tokenizer()).known_words) - set(vocabulary())
    assert all(surprisal(word) == float("inf") for word in unmet)
