"""Known mutual information from 1 to 15 bits in 8 dimensions: by the optimal denoiser, and by a small trained one."""

import math

import numpy as np
import pytest
import torch

from core.information.attribution import attribute
from core.information.quadrature import Sampler
from tests.fakes.ladder import HIGH, LOW, RUNGS, Network, Rung, TrainedRung, images, train

BITS = 1 / math.log(2)
N_IMAGES = 24


@pytest.fixture(scope="module")
def network() -> Network:
    return train()


def estimates(world: Rung) -> tuple[np.ndarray, np.ndarray]:
    """[N, 2] direct and orthogonal bits of the word for each image, and the true ones by the optimal denoiser."""
    found, true = [], []
    for seed, x in enumerate(images(world, N_IMAGES)):
        sampler = Sampler(n_points=16, min_replicates=4)
        a = attribute(world, x, "word", rel_error=1e9, sampler=sampler, batch_size=1000, seed=seed)
        found.append((a.direct_bits[0], a.bits[0]))
        true.append(known(world, x))
    return np.array(found), np.array(true)


def known(world: Rung, x: torch.Tensor) -> tuple[float, float]:
    """Direct and orthogonal bits over the range."""
    orthogonal = world.orthogonal(x, "", "word", LOW, HIGH).sum()
    return BITS * world.direct(x, "", "word", LOW, HIGH), BITS * float(orthogonal)


def apart(found: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[2] mean error, and its standard error over images."""
    distance = found - true
    return distance.mean(0), distance.std(0, ddof=1) / math.sqrt(len(distance))


@pytest.mark.parametrize("bits", RUNGS)
def test_the_rungs_have_the_bits_that_they_say_and_the_range_loses_little(bits: float) -> None:
    world = Rung(bits)
    assert BITS * world.information("", "word") == pytest.approx(bits)
    within = BITS * world.information_within("", "word", LOW, HIGH)
    assert 0.985 * bits < within < bits  # what lies outside log-SNR -5 to 7
    true = np.array([known(world, x) for x in images(world, 75)])
    error = true.std(0, ddof=1) / math.sqrt(len(true))
    assert (np.abs(true.mean(0) - within) < 4 * error).all()


@pytest.mark.parametrize("bits", RUNGS)
def test_the_optimal_denoiser_measures_every_rung(bits: float) -> None:
    off, error = apart(*estimates(Rung(bits)))
    assert (np.abs(off) < 4 * error).all()
    assert (error < 0.03 * bits + 0.05).all()


@pytest.mark.slow
@pytest.mark.parametrize("bits", RUNGS)
def test_a_trained_denoiser_measures_direct_bits_to_a_tenth(network: Network, bits: float) -> None:
    off, error = apart(*estimates(TrainedRung(bits, network)))
    assert abs(off[0]) < 0.1 * bits + 3 * error[0]


@pytest.mark.slow
def test_orthogonal_bits_of_a_trained_denoiser_are_too_few_of_many_and_too_many_of_few(network: Network) -> None:
    """A network that is not fully trained shrinks large differences of predictions, and adds spurious ones."""
    few, few_error = apart(*estimates(TrainedRung(RUNGS[0], network)))
    many, many_error = apart(*estimates(TrainedRung(RUNGS[-1], network)))
    assert few[1] > 3 * few_error[1]
    assert many[1] < -3 * many_error[1]
    assert abs(many[0]) < abs(many[1])  # direct bits are nearer
    assert abs(few[0]) < abs(few[1])
