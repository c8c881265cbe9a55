"""What words can tell, and whose weights a measured excess belongs to. (The tables: `tests/training/picturebook`.)"""

import json
from pathlib import Path

import pytest

from core.information.surprisal import CEILINGS, EXCESS, TABLE, Excess, ceiling, load_ceilings, load_excess, unet_digest
from core.spec import ModelSpec


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    unet = tmp_path / "model" / "unet"
    unet.mkdir(parents=True)
    (unet / "weights.safetensors").write_bytes(b"weights")
    (tmp_path / TABLE).write_text('{"cat": 4.0}')
    (tmp_path / CEILINGS).write_text('{"cat": ["object", 3.5, 5.25]}')
    kinds = {"object": {"bits": 9.5, "low": 7.4, "high": 11.5, "n_words": 148, "half_width": None}}
    table = {"unet": unet_digest(tmp_path / "model"), "kinds": kinds}
    (tmp_path / EXCESS).write_text(json.dumps(table))
    return ModelSpec("m", str(tmp_path / "model"), assets=tmp_path)


def test_a_word_can_tell_what_is_known_of_it_under_its_condition(spec: ModelSpec) -> None:
    assert load_ceilings(spec)["cat"] == ("object", 3.5, 5.25)
    assert ceiling(spec, "cat", "rest") == 5.25
    assert ceiling(spec, "cat", "nothing") == 4.0
    assert ceiling(spec, "dog", "rest") is None
    assert ceiling(spec, "dog", "nothing") is None


def test_a_model_without_a_grammar_has_no_ceiling(tmp_path: Path) -> None:
    for spec in (ModelSpec("m", "nowhere"), ModelSpec("m", "nowhere", assets=tmp_path)):
        assert ceiling(spec, "cat", "rest") is None
        assert load_ceilings(spec) == {}
        assert load_excess(spec) == {}
    assert ceiling(ModelSpec("m", "nowhere"), "cat", "nothing") is None


def test_an_excess_holds_for_the_weights_that_it_was_measured_on(spec: ModelSpec, tmp_path: Path) -> None:
    assert load_excess(spec) == {"object": Excess(9.5, 7.4, 11.5, 148, None)}
    other = tmp_path / "other" / "unet"
    other.mkdir(parents=True)
    assert load_excess(ModelSpec("m", str(other.parent), assets=tmp_path)) == {}
    (other / "weights.safetensors").write_bytes(b"others")
    assert load_excess(ModelSpec("m", str(tmp_path / "other" / "."), assets=tmp_path)) == {}
