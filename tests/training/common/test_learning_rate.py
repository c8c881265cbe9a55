import pytest
import torch

from training.common.learning_rate import warmup_stable_decay


def rates(n_steps: int, n_warmup: int, decay_fraction: float, start: int = 0, peak: float = 1.0) -> list[float]:
    """The rates at which the steps from `start` on are taken."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=peak)
    schedule = warmup_stable_decay(optimizer, n_steps, n_warmup, decay_fraction, step=start)
    taken = []
    for _ in range(start, n_steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return taken


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    taken = rates(100, 10, 0.5)
    assert taken[0] == pytest.approx(0.1)
    assert taken[10] == taken[50] == 1
    assert taken[75] == pytest.approx(0.5)
    assert taken[99] == pytest.approx(0.02)


def test_the_rate_is_the_formulas_to_the_bit_from_whatever_step_on() -> None:
    expected = [3e-4 * min((step + 1) / 7, (40 - step) / (0.3 * 40), 1.0) for step in range(40)]
    for start in (0, 1, 6, 25, 39, 40):
        assert rates(40, 7, 0.3, start, peak=3e-4) == expected[start:]


def test_without_warm_up_and_decay_the_rate_is_constant() -> None:
    assert set(rates(10, 0, 0.0)) == {1.0}
