import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import core
from core.activations.hooks import ActivationKey, record
from core.concepts.trace import SaeSite
from core.diffusion.diffuser import Diffuser
from core.edits import Editor, load_editor
from training.evaluate import run
from training.evaluate.common.judges import Judges
from training.evaluate.common.masks import Resampled
from training.evaluate.interventions import bench as interventions
from training.evaluate.interventions.arms import (
    Arm,
    Request,
    Unedited,
    context,
    draw_arm,
    labelled_objects,
    make_requests,
)
from training.evaluate.interventions.bench import QUICK, InterventionBench
from training.evaluate.interventions.evaluation import EVALUATION
from training.evaluate.interventions.outcomes import Judge, JudgeOutputs, cleared, elsewhere, succeeded
from training.picturebook.world.world import LABELS

CAT, SEA, GRASS = LABELS.index("cat"), LABELS.index("sea"), LABELS.index("grass")
N_STEPS = 2
TINY = replace(
    QUICK,
    n_objects=2,
    n_targets=1,
    num_inference_steps=N_STEPS,
    width=2,
    stride=1,
    n_reference=4,
    n_bootstrap=20,
)


@pytest.fixture(scope="module")
def picturebook() -> Diffuser:
    return core.load_model("picturebook", device="cpu")


@pytest.fixture(scope="module")
def editor(picturebook: Diffuser) -> Editor:
    return load_editor(picturebook)


def move(target: str = "top-left", seed: int = 0) -> Request:
    return Request("moving", "cat", target, seed)


def label_map(box: tuple[slice, slice]) -> Tensor:
    labels = torch.full((128, 128), SEA)
    labels[64:] = GRASS
    labels[box] = CAT
    return labels


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests_of_one_object_are_grouped_and_their_words_are_known(picturebook: Diffuser, editor: Editor) -> None:
    objects = labelled_objects(editor, 10)
    assert len(set(objects)) == 10
    requests = make_requests("moving", objects, range(2)) + make_requests("styling", objects, range(1))
    assert len(requests) == 10 * 4 * 2 + 10 * 5
    assert [one.object_name for one in requests[:8]] == [objects[0]] * 8
    assert {one.seed for one in requests[:8]} == {one.seed for one in requests if one.object_name == objects[0]} | {
        requests[1].seed
    }
    for one in requests:
        picturebook.check_prompt(one.prompt)
        picturebook.check_prompt(one.prompt_with_target)
    assert move("bottom-right").prompt_with_target == "a cat right below on the street"
    with pytest.raises(ValueError, match="99 were asked for"):
        labelled_objects(editor, 99)


# --- judging ----------------------------------------------------------------------------------------------------------


def test_a_move_succeeds_where_the_centre_is() -> None:
    inside, across, absent = (
        label_map(box)
        for box in (
            (slice(10, 50), slice(10, 50)),
            (slice(10, 50), slice(30, 120)),
            (slice(0, 10), slice(0, 10)),
        )
    )
    assert [succeeded(move(), labels, "plain") for labels in (inside, across, absent)] == [True, False, False]
    assert succeeded(move("top-right"), across, "plain")
    style = Request("styling", "cat", "night", 0)
    assert [succeeded(style, absent, seen) for seen in ("night", "plain")] == [True, False]
    gone = Request("removing", "cat", "", 0)
    assert [succeeded(gone, labels, "plain") for labels in (inside, across, absent)] == [False, False, True]


def test_elsewhere_is_neither_the_region_nor_where_the_object_was() -> None:
    labels = label_map((slice(100, 120), slice(100, 120)))
    where = elsewhere(move(), labels)
    assert where.sum() == 128 * 128 - 64 * 64 - 20 * 20
    assert not where[:64, :64].any()
    assert elsewhere(Request("styling", "cat", "night", 0), labels).all()
    gone = Request("removing", "cat", "", 0)
    assert elsewhere(gone, labels).sum() == 128 * 128 - 20 * 20
    new = torch.where(labels == CAT, SEA, labels)
    new[100:105, 100:120] = CAT + 1  # another object, over a quarter of it
    assert cleared(gone, new, labels) == pytest.approx(0.75)
    assert cleared(gone, labels, labels) == 0


def test_images_far_from_all_others_are_out_of_distribution() -> None:
    judge = Judge.__new__(Judge)
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    judge._look = lambda _: JudgeOutputs(torch.zeros(0), (), torch.zeros(0), features)  # type: ignore[method-assign]
    judge.fit([None] * 2)  # type: ignore[list-item]
    new = torch.stack([features.mean(0), features[3] + 0.01, features.mean(0) + 30])
    assert judge._out_of_distribution(new) == [False, False, True]


# --- arms -------------------------------------------------------------------------------------------------------------


def update_of(
    model: Diffuser, requests: list[Request], contexts: list[Any], step: int = 0
) -> dict[ActivationKey, Tensor]:
    with record(model, steps=[step]) as updates:
        prompts, seeds = [one.prompt for one in requests], [one.seed for one in requests]
        list(model.sample(prompts, seeds=seeds, num_inference_steps=N_STEPS, last_step=step, contexts=contexts))
    return dict(updates)


def test_tinaz_et_al_by_hand(picturebook: Diffuser, editor: Editor) -> None:
    requests = [move("top-right", 3), Request("styling", "cat", "night", 4), Request("removing", "dog", "", 5)]
    site = SaeSite(picturebook.spec.default_hookpoint, "cond")
    key, sae = ActivationKey(*site, 0), editor.saes[site]
    before = record(picturebook, steps=[0])
    after = record(picturebook, steps=[0])
    update_of(
        picturebook,
        requests,
        [before, context(editor, Arm("Tinaz et al. 2025", (0, 1), 2.0), requests, N_STEPS), after],
    )
    old, new = (part[key].flatten(2).transpose(1, 2) for part in (before, after))
    for row, label in enumerate(("cat", "night", "dog")):
        numbers = torch.tensor(editor.table(site).numbers(label))
        code = sae.encode(old[row])
        z = torch.zeros(64, sae.cfg.d_sae).scatter_(1, code.indices, code.values)
        norms, directions = z.norm(dim=1, keepdim=True), sae.W_dec[numbers]
        if label == "night":
            expected = 2.0 * norms / norms.sum() * directions.sum(0)
        else:
            inside = torch.full((8, 8), float(label == "dog"))
            inside[:4, 4:] = 1
            inside = inside.flatten()[:, None]
            expected = inside * 2.0 * norms * directions.sum(0) - (1 - inside) * (z[:, numbers] @ directions)
        torch.testing.assert_close(new[row] - old[row], expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_switched_from_a_step_on(picturebook: Diffuser, editor: Editor) -> None:
    requests = [Request("styling", "cat", "night", 4), Request("styling", "boat", "sepia", 5)]
    settings: dict[str, Any] = {"seeds": [4, 5], "num_inference_steps": N_STEPS}
    states = {}
    for first in (0, 1):
        arm = Arm("prompt switched", (first, N_STEPS - 1))
        prompts = [one.prompt for one in requests]
        states[first] = list(
            picturebook.sample(prompts, **settings, contexts=[context(editor, arm, requests, N_STEPS)])
        )
    with_target = list(picturebook.sample([one.prompt_with_target for one in requests], **settings))
    plain = list(picturebook.sample([one.prompt for one in requests], **settings))
    assert torch.equal(states[0][-1].x, with_target[-1].x)
    assert torch.equal(states[1][0].x, plain[0].x)
    assert not torch.allclose(states[1][1].x, plain[1].x, atol=1e-3)
    assert not picturebook.unet._forward_pre_hooks


# --- the whole --------------------------------------------------------------------------------------------------------


def fake_images(
    editor: Editor,  # noqa: ARG001
    arm: Arm,
    requests: Sequence[Request],
    unedited: Unedited,
) -> Iterator[Image.Image]:
    assert arm.steps is None or arm.steps[1] < unedited.n_steps
    rng = np.random.default_rng(int(100 * abs(arm.strength or 0)))
    for _ in requests:
        yield Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))


@pytest.mark.slow
def test_every_table_and_nothing_is_measured_twice(
    picturebook: Diffuser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interventions, "draw_arm", fake_images)
    options = run.EvalOptions((), True, tmp_path)
    tiny = replace(EVALUATION, quick=replace(TINY, num_inference_steps=3, stride=2))
    tables = run.evaluate(tiny, picturebook, options)
    assert [table.name for table in tables] == [part.__name__ for part in EVALUATION.parts]
    windows, switching, sweep, moving, styling, removing = tables
    assert len(moving.rows) == len(styling.rows) == 2 + 3 * (1 + 1)
    assert len(removing.rows) == 2 + 4 * (1 + 1)
    assert removing.rows[-1]["stage"] == "early to late"
    assert len(sweep.rows) == 3 + (3 + 3 + 4) * (1 + 1)
    assert [row["steps"] for row in windows.rows] == ["0 to 1"]
    assert [row["from step"] for row in switching.rows] == [0, 2]
    unedited = moving.rows[0]
    assert unedited["change elsewhere, low"] == "0.000 (0.000 to 0.000)"
    assert str(unedited["layout IoU elsewhere"]).startswith("1.000")
    json.dumps([table.details for table in tables])
    n_calls = picturebook.n_unet_calls
    assert [table.rows for table in run.evaluate(tiny, picturebook, options)] == [table.rows for table in tables]
    assert picturebook.n_unet_calls == n_calls


@pytest.mark.parametrize("steps", [(0, 0), (1, 1)])
def test_images_of_an_arm_are_those_of_its_requests(
    picturebook: Diffuser, editor: Editor, steps: tuple[int, int]
) -> None:
    requests = [move("top-left", 3), Request("styling", "cat", "night", 3)]
    arm, unedited = Arm("edit", steps, 40.0), Unedited(picturebook, N_STEPS, 2)
    unedited.add(requests)
    before = picturebook.n_unet_calls
    together = list(draw_arm(editor, arm, requests, unedited))
    assert picturebook.n_unet_calls - before == N_STEPS - steps[0]
    edits = [arm.edit(one) for one in requests]
    for one, change, image in zip(requests, edits, together, strict=True):
        alone = picturebook.generate(
            one.prompt, seed=one.seed, num_inference_steps=N_STEPS, previews=False, edits=[change]
        ).image
        assert np.abs(np.asarray(alone, np.int16) - np.asarray(image, np.int16)).max() <= 2
    assert np.abs(np.asarray(together[0], np.int16) - np.asarray(together[1], np.int16)).max() > 9


def test_strengths_are_chosen_on_other_images_the_smallest_of_ties(editor: Editor) -> None:
    settings = replace(TINY, num_inference_steps=3, betas=(1.0, 2.0), strengths=(1.0, 2.0))
    bench = InterventionBench(editor, Judges({}, None), run.PACKAGE, settings)  # type: ignore[arg-type]
    values = {
        ("Tinaz et al. 2025", "late", 1.0): 0.5,
        ("Tinaz et al. 2025", "late", 2.0): 0.5,
        ("edit", "early", 2.0): 0.9,
    }

    def mean(kind: str, split: str, arm: Arm, name: str) -> Resampled:  # noqa: ARG001
        assert split == "sweep"
        return Resampled(values.get((arm.method, arm.stage, arm.strength or 0), 0.1), np.zeros(2))

    bench.mean = mean  # type: ignore[method-assign]
    assert bench.chosen("moving", "Tinaz et al. 2025", "late").strength == 1.0
    values["Tinaz et al. 2025", "late", 2.0] = 0.6
    assert bench.chosen("moving", "Tinaz et al. 2025", "late").strength == 2.0
    assert bench.chosen("moving", "Tinaz et al. 2025", "early").strength == 1.0
    late = bench.chosen("moving", "edit", "late")
    assert (late.strength, late.stage, late.steps) == (2.0, "late", bench.stages["moving"]["late"])
    seeds = {split: {one.seed for one in bench.requests("moving", split)} for split in ("sweep", "test")}
    assert not seeds["sweep"] & seeds["test"]
