import argparse
import io
import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

import core
from core.diffusion.diffuser import Diffuser
from core.diffusion.text import distinct_words
from core.information.quadrature import Sampler
from training.benchmark import baselines, estimator, latency, prompts, run, saes, streaming
from training.benchmark.arithmetic import equal_error_evals, needed, ratio, relative_errors, resamples, times
from training.benchmark.benchmark import Benchmark, BenchmarkRun
from training.benchmark.estimator import (
    RUN,
    EstimatorSettings,
    Method,
    ladder,
    measure,
    precisions,
    replicates,
    tabulate,
)
from training.benchmark.full_size import SMALL, components, make_pipeline
from training.benchmark.prompts import Sample, held_out
from training.common import report
from training.common.report import Figure, Table

# Maps of two words, and noise of known size on them: the relative error of one replicate is 8 * spread / |map|.
SIDE = 8
TRUTH = np.stack([np.full((SIDE, SIDE), 1.0), np.full((SIDE, SIDE), 4.0)])
SPREAD = np.array([0.5, 6.0])
ERRORS = SPREAD / TRUTH[:, 0, 0]


def noisy_maps(n: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(n, *TRUTH.shape))
    return TRUTH + SPREAD[:, None, None] * noise


def test_the_error_of_gaussian_maps_is_the_known_one() -> None:
    errors = relative_errors(noisy_maps(400, 1), noisy_maps(400, 2))
    np.testing.assert_allclose(errors, ERRORS, rtol=0.03)
    of_four = relative_errors(noisy_maps(400, 1), noisy_maps(400, 2), n_together=4)
    np.testing.assert_allclose(of_four, ERRORS / 2, rtol=0.06)


def test_a_poor_reference_gives_the_same_error_once_its_variance_is_subtracted() -> None:
    few = [relative_errors(noisy_maps(100, seed), noisy_maps(20, 100 + seed)) for seed in range(40)]
    np.testing.assert_allclose(np.mean(few, 0), ERRORS, rtol=0.03)
    # What is subtracted is not small: as much as the error of a run as long as the reference.
    long_runs = [relative_errors(noisy_maps(100, seed), noisy_maps(20, 100 + seed), 20) for seed in range(40)]
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(long_runs), 0)), ERRORS / 20**0.5, rtol=0.08)


def test_a_reference_of_pure_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="more replicates"):
        relative_errors(noisy_maps(4, 1), (noisy_maps(20, 2) - TRUTH) * np.tile([1, -1], 10)[:, None, None, None])


def test_twice_the_error_takes_four_times_the_evaluations() -> None:
    n_evals, errors = np.array([100.0, 300.0]), np.array([0.1, 0.3])
    assert equal_error_evals(n_evals, errors, 0.2) == pytest.approx(200)
    assert equal_error_evals(n_evals, errors, 0.1) == pytest.approx(800)


def test_intervals_cover_and_are_paired_over_prompts() -> None:
    # Errors that are all twice those of ours leave no doubt, however much prompts differ.
    ours = np.random.default_rng(0).uniform(0.1, 0.9, 21)
    evals, strata = np.full(21, 60.0), np.repeat([3, 6, 10], 7)
    drawn = resamples(strata)
    assert needed(3 * evals, 2 * ours, ours, drawn) == pytest.approx((720, 720, 720))
    assert times(3 * evals, 2 * ours, evals, ours, drawn) == pytest.approx((12, 12, 12))
    # Each stratum keeps its size in every resample.
    assert (np.sort(strata[drawn], axis=1) == strata).all()
    # The interval of a mean over 21 prompts holds the true one about 19 times in 20.
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        _, low, high = ratio(rng.normal(2.0, 0.3, 21), np.ones(21), resamples(strata, 400))
        held += low <= 2.0 <= high
    assert 0.86 * 200 <= held <= 0.99 * 200


def test_the_ladder_goes_from_kong_et_al_to_ours_one_setting_at_a_time() -> None:
    switches = ("stratified", "interleaved", "antithetic", "shared", "fitted", "profile", "prompts_per_word")
    for ours in (
        Sampler(),
        Sampler(profile=(1.0, 2.0)),
        Sampler(fitted=True),
        Sampler(antithetic=False),
        Sampler(n_points=4),
    ):
        samplers = [method.sampler for method in ladder(ours)]
        assert samplers[0] == replace(Sampler.kong2024(), n_points=ours.n_points)
        assert samplers[-1] == ours
        for before, after in pairwise(samplers):
            changed = {name for name, value in vars(before).items() if value != getattr(after, name)}
            assert len(changed) == 1 or not changed.intersection(switches)
    with pytest.raises(ValueError, match="integrals differ"):
        ladder(Sampler(loc=2.0))


@pytest.mark.parametrize("n_words", [3, 6, 10])
def test_prompts_are_held_out_captions_of_that_many_distinct_words(
    n_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = held_out(n_words, 3)
    assert len({sample.prompt for sample in samples}) == 3
    assert all(len(distinct_words(sample.prompt)) == n_words for sample in samples)
    assert all(sample.image.size == (128, 128) for sample in samples)
    monkeypatch.setattr(prompts, "_SCENES", 50)
    with pytest.raises(ValueError, match="40 distinct words"):
        held_out(40, 1)


# --- on the small model -----------------------------------------------------------------------------------------------

SETTINGS = EstimatorSettings(n_prompts=1, n_guided=0, n_runs=2, n_reference=4)
SHORT = Sampler(n_points=4)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (2, 8, 8, 3), np.uint8)
    images = [Image.fromarray(p).resize((128, 128)) for p in pixels]
    return [Sample("cat and dog", images[0]), Sample("a red cat on the grass", images[1])]


def test_replicates_are_what_attribute_takes_the_mean_of(model: Diffuser, samples: list[Sample]) -> None:
    maps = replicates(model, samples[0], SHORT, seed=5, n=1, batch_size=64)
    assert len(maps) == 1
    n_evals = RUN * 4
    same = core.attribute(
        model, samples[0].image, samples[0].prompt, seed=5, rel_error=1e-9, max_evals=n_evals, sampler=SHORT
    )
    assert same.n_evals == n_evals
    np.testing.assert_allclose(maps.mean(0), same.maps, rtol=1e-3)


def test_the_third_prompt_of_kong_et_al_is_counted_and_changes_nothing(model: Diffuser, samples: list[Sample]) -> None:
    three, two = ladder(SHORT)[0].sampler, ladder(SHORT)[1].sampler
    a, b = (replicates(model, samples[0], sampler, 3, 1, 64) for sampler in (three, two))
    np.testing.assert_allclose(a, b, rtol=1e-3)


@pytest.mark.slow
def test_the_estimator_measures_every_method_and_resumes(
    model: Diffuser, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimator, "RUN", 4)
    methods = ladder(SHORT)
    first = measure(model, samples[:1], methods, SETTINGS, tmp_path)
    calls = model.n_unet_calls
    results = measure(model, samples, methods, SETTINGS, tmp_path)
    assert calls < model.n_unet_calls
    assert all(result.errors[0] == again.errors[0] for result, again in zip(first, results, strict=True))
    calls = model.n_unet_calls
    measure(model, samples, methods, SETTINGS, tmp_path)
    assert model.n_unet_calls == calls
    # 4 noise samples; 3 and 6 words: three prompts a word, two, then one more than there are words.
    assert [result.n_evals.tolist() for result in results] == [[36, 72], [24, 48], *[[16, 28]] * 5]
    assert all((result.errors > 0).all() for result in results)
    # Another sampler does not hit the cache.
    measure(model, samples[:1], [Method("other", replace(SHORT, loc=1.5))], SETTINGS, tmp_path)
    assert model.n_unet_calls > calls
    table = tabulate(results, [3, 6], samples, SETTINGS, n_guided=1)
    assert table.rows[0]["painted"] == table.rows[0]["3 words"]
    assert table.rows[0]["generated"] == table.rows[0]["6 words"]
    assert [row["over ours"] for row in table.rows][-1] == "1 [1, 1]"
    assert table.rows[0]["this step"] is None
    json.dumps(table.details)


def test_precisions_are_compared_at_the_same_error(model: Diffuser, samples: list[Sample]) -> None:
    table = precisions(model, samples[:1], replace(SETTINGS, n_precision=4))
    alone, chosen = table.rows
    assert alone["times less for the same error"] == 1
    assert alone["used"] == "float32, one of 1"
    assert chosen["error of the worst word"] == alone["error of the worst word"]  # of one precision on this device
    assert float(chosen["times less for the same error"] or 0) > 0


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_target_is_met_only_if_the_slowest_repeat_meets_it() -> None:
    assert Figure("page, s", [3.0, 4.0, 5.5], 5.0).row()["met"] is False
    row = Figure("page, s", [3.0, 4.0, 5.0], 5.0, "bare import 2 s").row()
    assert row == {
        "what": "page, s",
        "median": 4.0,
        "worst": 5.0,
        "target": 5.0,
        "met": True,
        "reference": "bare import 2 s",
    }
    assert Figure("call, ms", [3.0]).row()["met"] is None


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("app", "Start", [Figure("page, s", [3.25], 5.0).row()], ["a note"], {"seed": 1})
    benchmark = Benchmark("App", "Its start.", 3, 1, lambda _, n: [table] if n == 3 else [])
    monkeypatch.setattr(run, "load_benchmark", lambda _: benchmark)
    monkeypatch.setattr("sys.argv", ["python", "benchmark", "app"])
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    monkeypatch.setattr(run, "HERE", tmp_path / "stored")
    run.main(parser.parse_args(["app", "--out", str(tmp_path), "--store"]))
    assert "| page, s | 3.25 | 3.25 | 5 | yes |" in (tmp_path / "stored" / "README.md").read_text()
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "benchmark.md").read_text().strip()
    assert "| page, s | 3.25 | 3.25 | 5 | yes |" in printed
    assert "python -m training benchmark app" in printed
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["tables"][0]["details"] == {"seed": 1}
    assert {"command", "commit", "date", "cpu", "n_cores", "torch", "n_threads"} <= set(content["origin"])
    with pytest.raises(SystemExit, match="does not go with --quick"):
        run.main(parser.parse_args(["app", "--out", str(tmp_path), "--quick", "--store"]))


def test_every_benchmark_runs_unless_some_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    assert parser.parse_args([]).names == []
    on_cpu, on_gpu = (BenchmarkRun("picturebook", device, True, Path()) for device in ("cpu", "cuda"))
    names = list(run.BENCHMARKS)
    assert [name for name in names if run._wanted(name, [], on_gpu)] == names[:-2]  # all but conformance, latency
    assert [name for name in names if run._wanted(name, [], on_cpu)] == names[:-3]  # nor streaming
    assert [name for name in names if run._wanted(name, ["sae", "streaming"], on_cpu)] == ["sae", "streaming"]
    with pytest.raises(SystemExit):
        parser.parse_args(["estimater"])
    assert "Did you mean 'estimator'" in capsys.readouterr().err


def test_numbers_are_shown_with_three_digits_and_absent_ones_as_nothing() -> None:
    cells: list[report.Cell] = [1234.56, 0.012345, 3.0, None, False]
    text = Table("t", "T", [dict(zip("abcde", cells, strict=True))]).markdown()
    assert "| 1235 | 0.0123 | 3 |  | **no** |" in text


@pytest.mark.slow  # three processes
def test_sae_trainers_race_on_the_same_batches(tmp_path: Path) -> None:
    table = saes.measure(saes.QUICK, tmp_path)
    rows = {(row["trainer"], row["precision"]): row for row in table.rows}
    assert list(rows) == [("product", "bf16"), ("ours", "bf16"), ("ours", "fp32")]
    assert rows["product", "bf16"]["times the product"] == 1
    low, full = rows["ours", "bf16"]["FVU"], rows["ours", "fp32"]["FVU"]
    assert isinstance(full, float)
    assert 0 < full < 1  # it learned something in eight steps
    assert low == pytest.approx(full, abs=0.02)
    assert not list(tmp_path.iterdir())  # no peer was requested, so none was installed


@pytest.mark.slow
def test_saes_are_trained_while_a_sampler_feeds_them() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    table = streaming.measure(streaming.QUICK, "cpu")
    sampler, both = table.rows
    assert (sampler["what"], both["what"]) == ("the sampler", "sampler and training")
    assert both["share of the time"] == "100 %"
    alone, together = (float(str(row["samples a second"])) for row in table.rows)
    assert alone > together > 0
    # 24 SAEs: three hookpoints, two branches, three times and all of them; as many samples as the 2 x 2 block has.
    assert together / float(str(both["images a second"])) == pytest.approx(24 * 4)
    assert "2 such buffers" in table.notes[0]
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_sampler_that_feeds_is_stable_diffusions() -> None:
    with torch.device("meta"):
        unet: Any = components(streaming.StreamingSettings().size)["unet"]
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964  # as v1.4's weights have
    hookpoints = streaming.StreamingSettings().spec.hookpoints
    assert [unet.get_submodule(name).in_channels for name in hookpoints] == [1280, 1280, 1280]
    assert len(streaming.StreamingSettings().recipe.times) == 4


@pytest.mark.slow
def test_small_calls_are_timed_in_diffusers_and_without_graphs() -> None:
    table = latency.measure("cpu", quick=True)
    assert [str(row["what"]).split(",")[0] for row in table.rows] == [
        *(f"U-Net call of {n}" for n in (1, 2, 8, 32)),
        *["image"] * 3,
    ]
    assert all(float(str(row[column])) > 0 for row in table.rows for column in ("replayed", "worst", "launched anew"))
    image = table.rows[4]
    assert image["target"] == image["diffusers"]
    assert image["met"] == (float(str(image["worst"])) <= float(str(image["target"])))
    assert "0 graphs were recorded" in table.notes[0]


def test_random_weights_follow_their_seed_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (make_pipeline(SMALL, dtype=torch.bfloat16, seed=seed).unet for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first.conv_in.weight, same.conv_in.weight)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)


def test_planted_activations_are_sparse_sums_of_the_same_directions() -> None:
    settings = saes.SaeBenchmarkSettings(d_in=64, k=3, batch_size=300, n_batches=2)
    data = saes.planted_batches(settings)
    assert data["train"].shape == (2, 300, 64)
    assert torch.equal(data["held_out"], saes.planted_batches(settings)["held_out"])
    assert not torch.equal(data["train"][0], data["train"][1])


def test_a_target_counts_only_at_no_higher_loss() -> None:
    def result(name: str, precision: str, seconds: float, fvu: float) -> saes.Result:
        return saes.Result(name, precision, [[seconds] * 2] * 3, fvu, 100)

    def met(peer: saes.Result) -> object:
        results = [result("product", "bf16", 1, 0), result("ours", "bf16", 1.8, 0.30), peer]
        return next(
            row["met"] for row in saes.tabulate(results, saes.SaeBenchmarkSettings()).rows if row["trainer"] == "ours"
        )

    assert met(result("sae_lens", "fp32", 3.6, 0.31)) is True
    assert met(result("sae_lens", "fp32", 3.6, 0.29)) is False
    assert met(result("sae_lens", "fp32", 2.0, 0.31)) is False
    # On an accelerator the lower bound includes the gradient of the weights, and the notes say so.
    slow = [result("product", "bf16", 1, 0), result("ours", "bf16", 2.1, 0.3)]
    for device in ("cpu", "cuda"):
        table = saes.tabulate(slow, saes.SaeBenchmarkSettings(device=device, peers=()))
        assert table.rows[1]["met"] is False
        assert any("gradient for the weights" in note for note in table.notes) == (device == "cuda")


def test_on_an_accelerator_a_turn_is_timed_as_a_whole_and_the_last_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(saes.QUICK, n_steps=4, turn=2)
    save_file(saes.planted_batches(settings), tmp_path / "data")
    args = argparse.Namespace(data=tmp_path / "data", device="cpu", steps=4, turn=2)
    sent: list[dict[str, list[float]]] = []
    waits: list[float] = []
    monkeypatch.setattr(baselines, "send", sent.append)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n" * 2))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: (waits.append(1), time.sleep(0.05)))
    batches = baselines.Batches(args)
    batches.on_device = True
    assert len(list(batches)) == 4
    (first,) = sent
    assert len(waits) == 2  # before each turn, so that its clock starts on an idle device
    assert first["seconds"] == [first["seconds"][0]] * 2
    assert first["seconds"][0] >= 0.05 / 2  # work the device did after the calls returned counts
