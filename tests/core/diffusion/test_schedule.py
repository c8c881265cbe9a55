import numpy as np
import pytest
from diffusers import DDIMScheduler

from core.diffusion.schedule import NoiseSchedule, named_steps, stage_at, stage_steps, step_at, step_times
from core.spec import STAGES

SD = NoiseSchedule.stable_diffusion()


def test_the_schedule_is_stable_diffusions() -> None:
    ours = SD.alphas_cumprod
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    # papers.md 1.1 and 2.1: trained range, and the log-SNR of timesteps 981, 501, 481 and 1
    np.testing.assert_allclose(SD.log_snr_range, (-5.36, 7.07), atol=0.005)
    np.testing.assert_allclose(SD.log_snrs[[981, 501, 481, 1]], [-5.15, -0.97, -0.84, 6.37], atol=0.006)


def test_fifty_steps_by_hand() -> None:
    timesteps = SD.sampler_timesteps(50)
    assert timesteps[[0, 1, 24, 49]].tolist() == [981, 961, 501, 1]
    assert step_at(0.5, 50) == 24  # 24.5 is a tie: the earlier
    assert [step_at(t, 50) for t in (1.0, 0.0, 0.499)] == [0, 49, 25]
    assert step_at(0.3, 6) == 3  # 0.7 * 5 = 3.5, a tie that binary fractions put a hair above
    assert step_times(50)[[0, 49]].tolist() == [1.0, 0.0]
    assert step_times(1).tolist() == [1.0]


@pytest.mark.parametrize("n_steps", [1, 7, 25, 50, 400, 999])
def test_steps_agree_with_diffusers(n_steps: int) -> None:
    theirs = DDIMScheduler(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    theirs.set_timesteps(n_steps)
    assert SD.sampler_timesteps(n_steps).tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("n_steps", [0, -3, 1000])
def test_impossible_step_counts_are_refused(n_steps: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 999"):
        SD.sampler_timesteps(n_steps)


def test_timesteps_are_interpolated_between_the_trained_ones_and_held_at_the_ends() -> None:
    np.testing.assert_allclose(SD.timestep_at(SD.log_snrs), np.arange(1000), atol=1e-9)
    half = (SD.log_snrs[500] + SD.log_snrs[501]) / 2
    assert SD.timestep_at(half) == pytest.approx(500.5)
    assert SD.timestep_at([-99.0, 99.0]).tolist() == [999.0, 0.0]


def test_zero_terminal_snr_stays_finite() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.0])
    assert np.isfinite(schedule.log_snrs).all()


def test_bins_lie_half_way_between_steps_and_cover_the_range() -> None:
    edges = SD.bin_edges(25, -5, 7)
    log_snrs = SD.sampler_log_snrs(25)
    assert edges.shape == (26,)
    assert edges[[0, -1]].tolist() == [-5, 7]
    assert edges[10] == pytest.approx((log_snrs[9] + log_snrs[10]) / 2)
    assert (np.diff(edges) > 0).all()
    narrow = SD.bin_edges(25, -1, 1)
    assert (np.diff(narrow) >= 0).all()
    assert np.diff(narrow).sum() == pytest.approx(2)


def test_stages_have_no_gap_and_no_overlap() -> None:
    assert [stage_at(t).name for t in (1.0, 0.6, 0.5999, 0.2, 0.1999, 0.0)] == [
        "early", "early", "middle", "middle", "late", "late",
    ]  # fmt: skip
    for n_steps in (1, 2, 5, 6, 25, 50):
        steps = [step for stage in STAGES for step in stage_steps(stage, n_steps)]
        assert steps == list(range(n_steps))
    assert [len(stage_steps(stage, 50)) for stage in STAGES] == [20, 20, 10]
    assert stage_at(float(step_times(6)[4])).name == "middle"  # 0.2 comes out as 0.19999999999999996


def test_stages_are_named_alone_or_from_one_to_another() -> None:
    assert named_steps("middle", 25) == range(10, 20)
    assert named_steps("middle to late", 25) == range(10, 25)
    assert named_steps("early to late", 25) == range(25)
    assert named_steps("late to late", 25) == named_steps("late", 25)
    assert named_steps("middle", 2) == range(0)
    assert named_steps("middle to late", 2) == range(1, 2)
    for name in ("soon", "late to middle", "early to", "early to soon", " to late", "", None):
        with pytest.raises(ValueError, match="one of early, middle, late, or as early to late"):
            named_steps(name, 25)  # type: ignore[arg-type]
