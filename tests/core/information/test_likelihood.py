"""A model's bits a dimension and its curves of squared errors, against a world where both are known."""

import math

import numpy as np
import pytest
import torch

from core.diffusion.diffuser import Diffuser
from core.errors import Cancelled
from core.information.attribution import attribute
from core.information.likelihood import likelihood
from core.information.quadrature import Sampler
from tests.fakes.gaussian import GaussianWorld

PROMPT = "red cat sea"


@pytest.fixture(scope="module")
def world() -> GaussianWorld:
    return GaussianWorld(PROMPT.split())


@pytest.fixture(scope="module")
def x(world: GaussianWorld) -> torch.Tensor:
    return world.draw_image(np.random.default_rng(1))


@pytest.mark.parametrize("text", ["", PROMPT])
def test_the_worlds_own_formula_is_the_density(world: GaussianWorld, x: torch.Tensor, text: str) -> None:
    bits = -world._log_density(x, text) / math.log(2) / world.d
    assert world.bits_per_dim(x, text, -40, 40) == pytest.approx(bits)
    low, high = world.schedule.log_snr_range
    assert abs(world.bits_per_dim(x, text, low, high) - bits) < 0.01  # what the trained range leaves out


def test_bits_a_dimension_are_the_density_over_the_range(world: GaussianWorld, x: torch.Tensor) -> None:
    found = likelihood(world, x, PROMPT, error=0.01, max_evals=10**6, batch_size=10_000)
    assert found.log_snr_range == pytest.approx(world.schedule.log_snr_range)
    assert found.n_dims == 32
    for bits, stderr, text in (
        (found.bits_per_dim, found.stderr, PROMPT),
        (found.unprompted_bits_per_dim, found.unprompted_stderr, ""),
    ):
        assert stderr <= 0.01
        assert abs(bits - world.bits_per_dim(x, text, *found.log_snr_range)) < 4 * stderr
    saved = (found.unprompted_bits_per_dim - found.bits_per_dim) * found.n_dims
    assert saved == pytest.approx(found.gain, rel=1e-4)
    truth = world.direct(x, "", PROMPT, *found.log_snr_range) / math.log(2)
    assert abs(found.gain - truth) < 4 * found.gain_stderr


def test_the_curves_are_the_errors_bin_by_bin(world: GaussianWorld, x: torch.Tensor) -> None:
    found = likelihood(world, x, PROMPT, max_evals=10**6, batch_size=10_000, num_inference_steps=5)
    for side, text in enumerate(("", PROMPT)):
        for bin_, (low, high) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
            # What a standard normal's curve would add, less what the bits lack of a standard normal's.
            normal = math.log2(2 * math.pi * math.e) / 2
            lacking = 2 * math.log(2) * (world.bits_per_dim(x, text, low, high) - normal) / (high - low)
            truth = found.normal_errors[bin_] + lacking
            assert abs(found.errors[side, bin_] - truth) < 4.5 * found.error_stderr[side, bin_]


def test_standard_normal_latents_leave_nothing_to_chance() -> None:
    """In a world of pure noise the control variate takes all that varies but the bins' own width."""
    world = GaussianWorld(["cat"])
    world.loadings, world.tau = np.zeros_like(world.loadings), 1.0
    x = torch.randn(1, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    found = likelihood(world, x, "cat", error=1e9, sampler=Sampler(scale=1000.0, n_points=64), batch_size=10_000)
    assert found.n_replicates == 4
    assert found.stderr < 0.005
    assert found.bits_per_dim == pytest.approx(-world._log_density(x, "cat") / math.log(2) / 32, abs=0.01)
    assert found.gain == 0


def test_a_words_two_curves_are_its_direct_bits_apart(world: GaussianWorld, x: torch.Tensor) -> None:
    a = attribute(world, x, PROMPT, rel_error=0.2, num_inference_steps=7)
    assert a.curves is not None
    widths = np.diff(a.timeline.edges)
    apart = ((a.curves.without - a.curves.with_word) * widths).sum(1) / (2 * math.log(2))
    np.testing.assert_allclose(apart, a.direct_bits, rtol=1e-5)
    assert (a.curves.with_word == a.curves.with_word[0]).all()  # the whole prompt, whatever the word
    assert (a.curves.without_stderr > 0).all()
    again = type(a).from_dict(a.to_dict())
    assert again.curves is not None
    np.testing.assert_array_equal(again.curves.without, a.curves.without)
    assert a.curves.difference_stderr is not None
    assert again.curves.difference_stderr is not None
    np.testing.assert_array_equal(again.curves.difference_stderr, a.curves.difference_stderr)
    # The noise that the two share leaves their difference, which is known better than as of two runs.
    assert (a.curves.difference_stderr < np.hypot(a.curves.without_stderr, a.curves.with_word_stderr)).all()


def test_in_a_single_bin_the_error_of_the_difference_is_the_direct_bits(world: GaussianWorld, x: torch.Tensor) -> None:
    a = attribute(world, x, PROMPT, rel_error=0.2, num_inference_steps=1)
    assert a.curves is not None
    assert a.curves.difference_stderr is not None
    width = np.diff(a.timeline.edges)
    np.testing.assert_allclose(a.curves.difference_stderr @ width / (2 * math.log(2)), a.direct_stderr, rtol=1e-4)


def test_it_stops_is_cancelled_and_refuses_as_others_do(world: GaussianWorld, x: torch.Tensor) -> None:
    spent = likelihood(world, x, PROMPT, error=1e-9, max_evals=160)
    assert (spent.stopped, spent.n_evals) == ("budget", 160)
    assert likelihood(world, x, PROMPT, error=1e-9, batch_size=7, max_evals=160).bits_per_dim == pytest.approx(
        spent.bits_per_dim, rel=1e-6
    )
    with pytest.raises(Cancelled):
        likelihood(world, x, PROMPT, batch_size=2, callback=lambda _: False)
    with pytest.raises(ValueError, match="too few"):
        likelihood(world, x, PROMPT, max_evals=10)
    with pytest.raises(ValueError, match="positive"):
        likelihood(world, x, PROMPT, error=0)


def test_a_real_pipeline_end_to_end(model: Diffuser) -> None:
    generation = model.generate("a cat on grass", num_inference_steps=3)
    found = likelihood(model, generation, "a cat on grass", error=1e9, sampler=Sampler(n_points=4, min_replicates=2))
    assert found.errors.shape == (2, 3)
    assert found.n_evals == 2 * 4 * 2
    assert found.n_dims == math.prod(model.latent_shape)
    assert math.isfinite(found.bits_per_dim)
    assert "errors" in found.to_dict()
