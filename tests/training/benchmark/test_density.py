from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from core.diffusion.diffuser import Diffuser
from training.benchmark import density
from training.benchmark.density import DensitySettings, Spread, controlled, error, profile_of, spread_of
from training.benchmark.prompts import Sample


def planted(seed: int, spreads: tuple[float, ...] = (1.0, 3.0, 1.0, 1.0), control: float = 0.0) -> Spread:
    """Maps of two words on 2 x 2 cells under 400 noises a piece, of given spread; a share `control` of it is
    explained."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(size=(len(spreads), 400, 2, 2))
    unknown = rng.normal(size=(len(spreads), 400, 2, 2, 2))
    noise = np.sqrt(1 - control**2) * unknown + control * longer[:, :, None]
    maps = 5 + np.array(spreads)[:, None, None, None, None] * noise
    return Spread(maps, longer, np.zeros_like(maps))


def test_a_profile_follows_the_spread_in_part_and_saves_what_neyman_says() -> None:
    spreads = [planted(seed) for seed in range(5)]
    profile = profile_of(spreads)
    np.testing.assert_allclose(
        profile, density.FLAT_SHARE + (1 - density.FLAT_SHARE) * np.array([1, 3, 1, 1]) / 1.5, rtol=0.05
    )
    assert profile.mean() == pytest.approx(1)
    best = profile_of(spreads, flat_share=0.0)
    variance = spreads[0].variance()
    assert (error(variance) / error(variance, best)) ** 2 == pytest.approx(3 / 1.5**2, rel=0.05)
    assert error(variance, best) < error(variance, profile) < error(variance)


def test_a_control_variate_saves_what_it_knows_and_costs_nothing_where_it_knows_nothing() -> None:
    known = planted(0, control=0.8)
    assert controlled(known, known.longer[:, :, None]) == pytest.approx(1 / (1 - 0.8**2), rel=0.1)
    strange = planted(0)
    assert controlled(strange, strange.longer[:, :, None]) == pytest.approx(1, abs=0.02)


def test_spreads_are_in_shares_of_each_words_map() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 500, 4, 2, 2))
    apart = 2 + 0.1 * rng.normal(size=(3, 500, 2, 4, 2, 2))
    apart[:, :, 1] *= 10  # a word with a hundred times the information
    spread = spread_of(apart, noise)
    np.testing.assert_allclose((spread.maps.mean((0, 1)) ** 2).sum((1, 2)), 1)
    assert abs(spread.longer.mean()) < 0.1
    assert abs((spread.along / np.abs(spread.along).mean((0, 1))).mean()) < 0.05
    np.testing.assert_allclose(spread.variance()[:, 0], spread.variance()[:, 1], rtol=0.2)


def test_density_measures_a_model(model: Diffuser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "scenes_with", lambda _, n, __: samples(n))
    rows = model.n_unet_rows
    settings = DensitySettings(lengths=(3,), n_prompts=3, n_pieces=3, n_noises=4)
    profile, variance = density.tables(model, settings)
    assert model.n_unet_rows - rows == 3 * 12 * 4
    assert len(profile.rows) == 3
    ends = [str(row["log-SNR"]).split(" to ") for row in profile.rows]
    assert (ends[0][0], ends[-1][1]) == ("-5.0", "7.0")
    assert all(high == low for (_, high), (low, _) in pairwise(ends))
    assert np.mean(profile.details["profile"]) == pytest.approx(1, abs=0.01)
    assert "log_snr_profile=(" in profile.markdown()
    assert len(variance.rows) == 6
    again, _ = density.tables(model, settings)
    assert again.markdown() == profile.markdown()


def samples(n: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (n, 8, 8, 3), np.uint8)
    images = [Image.fromarray(p).resize((128, 128)) for p in pixels]
    return [Sample(f"{noun} and dog", image) for noun, image in zip("abc", images, strict=True)]
