import math

import pytest
import torch

from core.diffusion.diffuser import Diffuser
from core.edits import Editor, GlobalEdit, ReplaceEdit, SpatialEdit
from core.edits.metrics import CELL, OutOfRangeMeter, frequencies, layout_iou
from core.edits.site import values_of
from tests.core.edits.test_edits import COND, PROMPT, QUARTER, STEPS, UNCOND, make_editor, updates

SKY, GRASS = 0, 1


@pytest.fixture(scope="module")
def editor(model: Diffuser) -> Editor:
    return make_editor(model)


def test_layout_by_hand() -> None:
    old = torch.full((128, 128), SKY)
    old[64:] = GRASS
    where = torch.ones_like(old, dtype=torch.bool)
    assert layout_iou(old, old, where) == 1
    new = old.clone()
    new[32:64] = GRASS
    assert layout_iou(new, old, where) == pytest.approx((32 / 64 + 64 / 96) / 2)
    assert layout_iou(new, old, where & (old == GRASS)) == 1
    old[:2, :2] = 5
    assert layout_iou(new, old, where, min_area=5) == pytest.approx(((32 * 128 - 4) / (64 * 128) + 64 / 96) / 2)
    assert math.isnan(layout_iou(new, old, torch.zeros_like(where)))


def test_frequencies_by_hand() -> None:
    where = torch.ones(128, 128, dtype=torch.bool)
    even = torch.full((3, 128, 128), 0.2)
    assert frequencies(even, where) == pytest.approx((0.2, 0), abs=1e-6)
    stripes = torch.tensor([0.3, -0.3]).repeat(64).expand(3, 128, 128)
    assert CELL % 2 == 0
    assert frequencies(stripes, where) == pytest.approx((0, 0.3), abs=1e-6)
    where[64:] = False
    even[:, 64:] = 9
    assert frequencies(even, where) == pytest.approx((0.2, 0), abs=1e-6)


def test_edited_values_are_measured_against_the_range_in_data(model: Diffuser, editor: Editor) -> None:
    change = SpatialEdit(label="cat", region="top-left", strength=9, steps=(0, 0), branches=["cond", "uncond"])
    _, after = updates(model, editor, [change])
    rows = [[change], [ReplaceEdit(label="cat", steps=(0, 0))], []]
    watch = OutOfRangeMeter(editor, rows, STEPS)
    run = model.sample(
        [PROMPT, "a ship", "a ship"],
        seeds=[0, 1, 1],
        num_inference_steps=STEPS,
        last_step=0,
        contexts=[editor.editing_each(rows, STEPS), watch.context],
    )
    for _ in run:
        pass
    shares = []
    for site, numbers in ((COND, [3, 7, 11]), (UNCOND, [5])):
        key = next(key for key in after if (key.hookpoint, key.branch) == site)
        x = after[key][0].flatten(1).T[QUARTER.flatten()]
        z = values_of(editor.saes[site].encode(x), torch.tensor(numbers), 64)
        shares.append((z / torch.linspace(0.2, 0.4, 64)[numbers])[z > 0])
    expected = torch.cat(shares)
    share, times = watch.out_of_range(0)
    assert share == pytest.approx(float((expected > 1).double().mean()))
    assert times == pytest.approx(float(expected.max()), rel=1e-4)
    assert times > 1
    assert math.isnan(watch.out_of_range(2).share)
    assert watch.out_of_range(2).times == 0
    assert watch.out_of_range(1).times < times


def test_nothing_is_measured_outside_the_steps_of_an_edit(model: Diffuser, editor: Editor) -> None:
    rows = [[GlobalEdit(label="cat", strength=9, steps=(2, 3))]]
    for last, seen in ((1, False), (2, True)):
        watch = OutOfRangeMeter(editor, rows, STEPS)
        contexts = [editor.editing_each(rows, STEPS), watch.context]
        for _ in model.sample([PROMPT], seeds=[0], num_inference_steps=STEPS, last_step=last, contexts=contexts):
            pass
        assert (watch.out_of_range(0).times > 0) == seen
