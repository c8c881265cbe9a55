from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from core.diffusion.schedule import NoiseSchedule
from core.information.measuring import sampler_for
from core.information.quadrature import Density, Sampler, block_size, draw, fit
from core.spec import ModelSpec

RANGE = NoiseSchedule.stable_diffusion().log_snr_range
FAST = Sampler()
PLAIN = Sampler.kong2024()
LOGISTIC = Sampler.kong2024().density(RANGE)


def test_the_logistic_is_the_papers() -> None:
    assert (LOGISTIC.low, LOGISTIC.high) == (-5.0, 7.0)
    a = np.linspace(-4.99, 6.99, 50)
    u = (a - 1.0) / 2.0
    sigmoid = 1 / (1 + np.exp(-u))
    # papers.md 2.1: weight = scale * tanh(clip / 2) / (sigmoid(u) sigmoid(-u))
    np.testing.assert_allclose(1 / LOGISTIC.pdf(a), 2.0 * np.tanh(1.5) / (sigmoid * (1 - sigmoid)))


def test_the_range_stays_inside_what_was_trained() -> None:
    wide = Sampler(scale=2.0, clip=4.0).density(RANGE)
    assert (wide.low, wide.high) == (RANGE[0], RANGE[1])
    with pytest.raises(ValueError, match="does not meet the trained range"):
        Sampler(loc=50.0).density(RANGE)


@pytest.mark.parametrize("knots", [[0.0, 1.0], [0.0, 0.1, 0.7, 0.9, 1.0]])
@pytest.mark.parametrize("base", [LOGISTIC, FAST.density(RANGE)])
def test_densities_add_up_to_one_and_quantiles_invert_them(base: Density, knots: list[float]) -> None:
    density = replace(base, knots=np.array(knots))
    assert isinstance(density, Density)
    u = np.linspace(0, 1, 200_001)
    a = density.quantile(u)
    assert (a[0], a[-1]) == (-5.0, 7.0)
    middle = (a[1:] + a[:-1]) / 2
    np.testing.assert_allclose(np.diff(a) * density.pdf(middle) * 200_000, 1, rtol=1e-3)


@pytest.mark.parametrize(
    "sampler",
    [
        FAST,
        PLAIN,
        Sampler(stratified=False),
        Sampler(antithetic=False),
        Sampler(scale=2.0, clip=3.0),
        Sampler(profile=(1.0, 3.0, 0.5)),
    ],
)
def test_every_way_of_drawing_is_unbiased(sampler: Sampler) -> None:
    # Int a^2 E[(1 + sum of eps)^2] da over [-5, 7] with 4 noises a sample: 5 * (7^3 + 5^3) / 3
    density = sampler.density(RANGE)
    values = []
    for replicate in range(1500):
        log_snr, weight, noise = draw(sampler, density, (4, 1, 1), (1, replicate))
        values.append(float((weight * log_snr**2 * (1 + noise.sum((1, 2, 3))) ** 2).sum()))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 780) < 4 * error
    assert error < 45


def test_a_profile_gives_the_frequency_of_each_piece() -> None:
    density = Sampler(profile=(1.0, 6.0, 1.0)).density(RANGE)
    flat = FAST.density(RANGE)
    thirds = flat.quantile(np.array([0, 1 / 3, 2 / 3, 1]))
    np.testing.assert_allclose(density.quantile(np.array([0, 1 / 8, 7 / 8, 1])), thirds)
    inside = (thirds[1:] + thirds[:-1]) / 2
    np.testing.assert_allclose(density.pdf(inside) / flat.pdf(inside), [3 / 8, 18 / 8, 3 / 8])
    fitted = Sampler(profile=(1.0, 6.0, 1.0), fitted=True).density(RANGE)  # the pilot's own takes its place
    np.testing.assert_array_equal(fitted.knots, flat.knots)
    with pytest.raises(ValueError, match="has to be positive, not 0"):
        Sampler(profile=(1.0, 0.0))


def test_the_profile_of_the_model_is_the_default_and_a_given_sampler_stays() -> None:
    model = SimpleNamespace(spec=ModelSpec("m", "nowhere", log_snr_profile=(1.0, 2.0)))
    assert sampler_for(model, None) == Sampler(profile=(1.0, 2.0))  # type: ignore[arg-type]
    assert sampler_for(model, PLAIN) is PLAIN  # type: ignore[arg-type]
    assert sampler_for(SimpleNamespace(), None) == Sampler()  # type: ignore[arg-type]


def test_strata_leave_no_gap() -> None:
    density = FAST.density(RANGE)
    log_snr = draw(Sampler(n_points=8, antithetic=False), density, (1, 1, 1), (0, 0)).log_snr.numpy()
    share = np.interp(log_snr, density.quantile(np.linspace(0, 1, 10_001)), np.linspace(0, 1, 10_001))
    np.testing.assert_allclose(np.diff(share), 1 / 8, atol=1e-3)
    pairs = draw(Sampler(n_points=8), density, (1, 1, 1), (0, 0)).log_snr.numpy().reshape(-1, 2)
    np.testing.assert_allclose(pairs.mean(1), [-3.5, -0.5, 2.5, 5.5], atol=0.05)  # in four strata


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("interleaved", [2, 4, 8])
def test_replicates_interleave_to_one_with_finer_strata(interleaved: int, antithetic: bool) -> None:
    sampler = Sampler(antithetic=antithetic, interleaved=interleaved)
    density = sampler.density(RANGE)

    def quantiles(first: int, n: int) -> np.ndarray:
        """Sorted quantiles of the density at the log-SNRs of n replicates."""
        drawn = [draw(sampler, density, (1, 1, 1), (3, first + i)).log_snr.numpy() for i in range(n)]
        share = np.interp(np.concatenate(drawn), density.quantile(np.linspace(0, 1, 10_001)), np.linspace(0, 1, 10_001))
        return np.sort(share)

    for n in (interleaved // 2, interleaved):  # half of a block interleaves, too
        share = quantiles(2 * interleaved, n)
        strata = len(share) // 2 if antithetic else len(share)
        # One point in each stratum, and its mirror image.
        counts = np.histogram(share, np.linspace(0, 1, strata + 1))[0]
        assert (counts == len(share) // strata).all()
        if not antithetic:
            np.testing.assert_allclose(np.diff(share), 1 / strata, atol=1e-3)
    starts = [quantiles(block * interleaved, 1)[0] for block in range(5)]
    assert len(set(np.round(starts, 6))) == 5  # blocks are independent


def test_blocks_are_taken_as_one_once_there_are_many() -> None:
    assert [block_size(n, 4) for n in (4, 8, 12, 16, 24, 32, 48, 33, 34)] == [1, 1, 1, 2, 2, 4, 4, 1, 2]
    assert block_size(64, 1) == 1


def test_noise_comes_with_both_signs() -> None:
    sample = draw(FAST, FAST.density(RANGE), (2, 3, 3), (0, 0))
    assert sample.noise.shape == (4, 2, 3, 3)
    assert torch.equal(sample.noise[0::2], -sample.noise[1::2])


def test_a_replicate_depends_on_its_key_alone() -> None:
    density = FAST.density(RANGE)
    again = [draw(FAST, density, (2, 3, 3), (5, 1)) for _ in range(2)]
    other = draw(FAST, density, (2, 3, 3), (5, 2))
    assert torch.equal(again[0].noise, again[1].noise)
    assert not torch.equal(again[0].noise, other.noise)


def test_a_fitted_density_follows_the_integrand_and_keeps_a_tenth() -> None:
    logistic = LOGISTIC
    log_snr = logistic.quantile((np.arange(16) + 0.5) / 16)
    peak = np.exp(-((log_snr - 1.0) ** 2) / 0.5) * logistic.pdf(log_snr)
    fitted = fit(logistic, log_snr, np.stack([peak, 100 * peak]))  # the size of a word does not matter
    np.testing.assert_allclose(fitted.knots, fit(logistic, log_snr, peak[None]).knots)
    a = np.linspace(-4.9, 6.9, 500)
    ratio = fitted.pdf(a) / logistic.pdf(a)
    assert ratio.min() == pytest.approx(0.1, rel=0.01)
    assert abs(a[ratio.argmax()] - 1.0) < 0.5  # in the bin of 1.0 or next to it
    assert fitted.knots[[0, -1]].tolist() == [0.0, 1.0]
    silent = fit(logistic, log_snr, np.zeros((2, 16)))
    np.testing.assert_allclose(silent.knots, np.linspace(0, 1, 17))


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"n_points": 7}, {"n_points": 0}, {"min_replicates": 1}):
        with pytest.raises(ValueError, match="n_points"):
            Sampler(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1, 2, 4 or 8, not 3"):
        Sampler(interleaved=3)
    with pytest.raises(ValueError, match="exact_every is at least 1"):
        Sampler(exact_every=0)
    with pytest.raises(ValueError, match="2 or 3"):
        Sampler(prompts_per_word=4)
