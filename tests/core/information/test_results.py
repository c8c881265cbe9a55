import json

import numpy as np
import pytest

from core.information.results import STOPPING_FACTOR, Attribution, Timeline, t_quantile


def attribution(**changes: object) -> Attribution:
    values: dict[str, object] = {
        "words": ("cat", "grass"),
        "bits": np.array([20.0, 5.0]),
        "stderr": np.array([1.0, 0.5]),
        "maps": np.ones((2, 2, 2)),
        "map_stderr": np.ones((2, 2, 2)) / 3,
        "direct_bits": np.array([18.0, -4.0]),
        "direct_stderr": np.array([3.0, 1.0]),
        "timeline": Timeline(np.arange(4.0), np.ones((2, 3)), np.ones((2, 3))),
        "prompt_bits": None,
        "prompt_stderr": None,
        "n_evals": 288,
        "n_replicates": 8,
        "stopped": "budget",
        "rel_error": 0.1,
        "prompt": "Cat, grass",
        "given": "rest",
        "seed": 0,
        "settings": {"rel_error": 0.1},
    }
    return Attribution(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("p", "df", "table"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 7, 2.3646),
        (0.975, 15, 2.1314),
        (0.975, 31, 2.0395),
        (0.95, 7, 1.8946),
        (0.995, 8, 3.3554),
        (0.5, 9, 0.0),
    ],
)
def test_t_quantiles_are_those_of_the_tables(p: float, df: int, table: float) -> None:
    assert t_quantile(p, df) == pytest.approx(table, abs=6e-5)


def test_intervals_are_students_and_wider_after_an_early_stop() -> None:
    low, high = attribution().interval()
    np.testing.assert_allclose(low, [20 - 2.36462, 5 - 1.18231], atol=1e-4)
    np.testing.assert_allclose(high, [20 + 2.36462, 5 + 1.18231], atol=1e-4)
    low, _ = attribution(stopped="converged").interval()
    np.testing.assert_allclose(low, [20 - STOPPING_FACTOR * 2.36462, 5 - STOPPING_FACTOR * 1.18231], atol=1e-4)


def test_a_word_contradicts_the_image_if_its_direct_bits_are_significantly_negative() -> None:
    assert attribution().contradicts.tolist() == [False, True]
    assert attribution(direct_stderr=np.array([3.0, 2.0])).contradicts.tolist() == [False, False]


def test_results_survive_json() -> None:
    before = attribution(prompt_bits=30.0)
    after = Attribution.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after.words == before.words
    assert after.prompt_bits == 30.0
    np.testing.assert_array_equal(after.maps, before.maps)
    np.testing.assert_array_equal(after.timeline.edges, before.timeline.edges)
    assert after.to_dict() == before.to_dict()
