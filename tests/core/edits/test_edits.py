from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from core.activations.hooks import ActivationKey, record
from core.concepts.io import TableInfo
from core.concepts.table import ConceptTable
from core.concepts.trace import CodeTracer, SaeSite
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import Generation
from core.edits import (
    ConceptEdit,
    Editor,
    GlobalEdit,
    RemoveEdit,
    ReplaceEdit,
    SpatialEdit,
    Target,
    concepts_at,
)
from core.edits.base import EditContext, SelectedLatents, window_of
from core.edits.regions import RegionMask
from core.sae.autoencoder import SaeConfig, SaeId, SparseAutoencoder
from core.spec import STAGES

MIDDLE, UP = "mid_block.attentions.0", "up_blocks.1.attentions.0"
COND, UNCOND = SaeSite(MIDDLE, "cond"), SaeSite(MIDDLE, "uncond")
PROMPT, STEPS = "a cat on the grass", 5
QUARTER = torch.zeros(8, 8, dtype=torch.bool)
QUARTER[:4, :4] = True
EFFECT = torch.zeros(64)
EFFECT[[2, 5, 9, 30]] = torch.tensor([0.5, -0.25, 0.125, 0.004])  # the last is below a hundredth of the first


@pytest.fixture(autouse=True)
def left_as_found(model: Diffuser) -> Iterator[None]:
    """Whatever a test does, the model is free and unhooked after it."""
    yield
    assert not model._lock.is_held
    assert sum(len(module._forward_hooks) for module in model.unet.modules()) == 0


def table_of(site: SaeSite, sae: SparseAutoencoder, labels: dict[int, str]) -> ConceptTable:
    n = sae.cfg.d_sae
    frame = pd.DataFrame(
        {
            "latent": range(n),
            "label": [labels.get(i, "") for i in range(n)],
            "kind": ["object" if i in labels else "unlabelled" for i in range(n)],
            "held_out_iou": np.float32(0.1),
            "style_auroc": np.float32(0.5),
            "mean": np.linspace(0.1, 0.3, n, dtype=np.float32),
            "p99": np.linspace(0.2, 0.4, n, dtype=np.float32),
            "threshold": np.float32(0),
        }
    )
    words: tuple[str, ...] = ()
    if site.branch == "cond":
        frame["word_effects"], words = list(EFFECT[:, None].numpy()), ("night",)
    info = TableInfo("", ("cat", "whale"), words={"whale": ["Orca"]}, effect_words=words)
    return ConceptTable(SaeId(*site, "all"), frame, info, sae.W_dec.detach(), lambda _: pytest.fail("no files"))


def make_editor(model: Diffuser) -> Editor:
    """SAEs of random weights; the label cat is of three latents in one half and one in the other."""
    generator = torch.Generator().manual_seed(0)
    saes = {
        site: SparseAutoencoder(SaeConfig(32, 64, 8), generator=generator).requires_grad_(False)
        for site in (COND, UNCOND)
    }
    for sae in saes.values():  # the updates of a random model are much alike: these are active here, and not there
        sae.encoder.weight[[3, 5, 7]] *= 3
    labels = {COND: {3: "cat", 7: "cat", 11: "cat", 20: "whale"}, UNCOND: {5: "cat"}}
    return Editor(model, saes, lambda site: table_of(site, saes[site], labels[site]))


@pytest.fixture(scope="module")
def editor(model: Diffuser) -> Editor:
    return make_editor(model)


def draw(model: Diffuser, editor: Editor | None = None, *edits: ConceptEdit, steps: int = STEPS) -> Generation:
    contexts = [] if editor is None else [editor.editing(edits, steps)]
    return model.generate(PROMPT, num_inference_steps=steps, previews=False, contexts=contexts)


def updates(
    model: Diffuser, editor: Editor, edits: Sequence[ConceptEdit], step: int = 0
) -> tuple[dict[ActivationKey, Tensor], dict[ActivationKey, Tensor]]:
    """The updates of a batch of two at a step, before and after the edits, which saw the same ones."""
    before, after = record(model, [MIDDLE], steps=[step]), record(model, [MIDDLE], steps=[step])
    contexts = [before, editor.editing(edits, STEPS), after]
    for _ in model.sample(
        [PROMPT, "a ship"], seeds=[0, 1], num_inference_steps=STEPS, last_step=step, contexts=contexts
    ):
        pass
    return dict(before), dict(after)


def codes(editor: Editor, site: SaeSite, update: Tensor) -> Tensor:
    """[B, P, d_sae] dense, from an encoding of everything."""
    sae = editor.saes[site]
    code = sae.encode(update.flatten(2).transpose(1, 2).reshape(-1, 32))
    return torch.zeros(len(code.values), 64).scatter_(1, code.indices, code.values).view(len(update), -1, 64)


def flat(update: Tensor) -> Tensor:
    return update.flatten(2).transpose(1, 2)


# --- identities -------------------------------------------------------------------------------------------------------


def test_strength_zero_changes_nothing_to_the_bit(model: Diffuser, editor: Editor) -> None:
    plain = draw(model)
    nothing = [
        SpatialEdit(label="cat", region="left", strength=0),
        GlobalEdit(label="whale", strength=0),
        RemoveEdit(label="cat", strength=0),
        ReplaceEdit(label="cat", strength=0),
    ]
    assert torch.equal(draw(model, editor, *nothing).latents, plain.latents)
    assert torch.equal(draw(model, editor).latents, plain.latents)
    edited = draw(model, editor, SpatialEdit(label="cat", region="left", strength=5))
    assert not torch.allclose(edited.latents, plain.latents, atol=1e-3)
    assert torch.equal(draw(model).latents, plain.latents)  # it leaves no trace


def test_an_edit_is_removed_when_a_run_fails_or_is_closed(model: Diffuser, editor: Editor) -> None:
    plain = draw(model)
    change = GlobalEdit(label="cat", strength=5, steps=(0, 2))
    run = model.generate_iter(
        PROMPT, num_inference_steps=STEPS, contexts=[editor.editing([change], STEPS)], previews=False
    )
    next(run)
    run.close()
    with pytest.raises(ValueError, match="were made for 5 steps; this run has 4"):
        model.generate(PROMPT, num_inference_steps=4, contexts=[editor.editing([change], STEPS)])
    assert torch.equal(draw(model).latents, plain.latents)


def test_leaving_out_one_of_several_edits_leaves_no_trace(model: Diffuser, editor: Editor) -> None:
    first, second = GlobalEdit(label="cat", strength=2), SpatialEdit(label="whale", region="left")
    alone, other = draw(model, editor, first), draw(model, editor, second)
    both = draw(model, editor, first, second)
    assert torch.equal(draw(model, editor, first).latents, alone.latents)
    assert not torch.allclose(both.latents, alone.latents, atol=1e-3)
    assert not torch.allclose(both.latents, other.latents, atol=1e-3)
    silent = replace(second, strength=0)
    assert torch.equal(draw(model, editor, first, silent).latents, alone.latents)


def test_hooks_are_gone_after_an_edit_that_fails_while_the_sampler_runs(model: Diffuser, editor: Editor) -> None:
    @dataclass(frozen=True, eq=False, kw_only=True)
    class Failing(GlobalEdit):
        def change(self, z: Tensor, context: Any) -> Tensor:  # noqa: ARG002
            raise ValueError("in the middle")

    plain = draw(model)
    calls = model.n_unet_calls
    with pytest.raises(ValueError, match="in the middle"):
        draw(model, editor, Failing(label="cat", steps=(2, 3)))
    assert model.n_unet_calls == calls + 3
    assert sum(len(module._forward_hooks) for module in model.unet.modules()) == 0
    assert torch.equal(draw(model).latents, plain.latents)


def test_selecting_by_label_number_or_target_is_the_same_edit(model: Diffuser, editor: Editor) -> None:
    settings: dict[str, Any] = {"region": "top-left", "strength": 3, "stage": "early"}
    here: dict[str, Any] = {"hookpoints": [MIDDLE], "branches": ["cond"]}
    by_label = draw(model, editor, SpatialEdit(label="cat", **here, **settings))
    by_number = draw(model, editor, SpatialEdit(concepts=[3, 7, 11], **here, **settings))
    by_site = draw(model, editor, SpatialEdit(concepts=[Target(COND, n) for n in (3, 7, 11)], **settings))
    assert torch.equal(by_label.latents, by_number.latents)
    assert torch.equal(by_label.latents, by_site.latents)


def test_the_edits_of_a_run_are_bound_together(
    model: Diffuser, editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.edits.kinds.load_editor", lambda _: editor)
    encoded: list[int] = []

    def counted(self: SparseAutoencoder, x: Tensor) -> Any:
        encoded.append(len(x))
        return encode(self, x)

    encode = SparseAutoencoder.encode
    monkeypatch.setattr(SparseAutoencoder, "encode", counted)
    edits = [GlobalEdit(label="cat", strength=2, steps=(1, 2)), ReplaceEdit(label="cat", strength=0.5, steps=(2, 2))]
    together = model.generate(PROMPT, num_inference_steps=STEPS, previews=False, edits=edits)
    assert len(encoded) == 3  # one encoding a step and site: cond at 1, cond and uncond at 2
    assert torch.equal(together.latents, draw(model, editor, *edits).latents)


def test_any_edit_that_can_be_bound_will_do(model: Diffuser) -> None:
    bound: list[tuple[Any, ...]] = []

    class Recorder:
        def __init__(self) -> None:
            self.updates = record(model, [MIDDLE], steps=[1])

        def bind(self, *given: Any) -> Any:
            bound.append(given)
            return self.updates

    first, second = Recorder(), Recorder()
    model.generate(PROMPT, num_inference_steps=2, previews=False, edits=[first, second])
    assert bound == [(model, (first, second), 2)]
    assert len(first.updates) == 2
    assert not second.updates
    with pytest.raises(TypeError, match="cannot be combined"):
        model.generate(PROMPT, num_inference_steps=2, edits=[GlobalEdit(label="cat"), first])


# --- the formulas -----------------------------------------------------------------------------------------------------


def test_raising_inside_and_silencing_outside(model: Diffuser, editor: Editor) -> None:
    change = SpatialEdit(label="cat", region="top-left", strength=3, stage="early", branches=["cond", "uncond"])
    before, after = updates(model, editor, [change])
    for site, numbers in ((COND, [3, 7, 11]), (UNCOND, [5])):
        key = ActivationKey(*site, 0)
        z = codes(editor, site, before[key])[..., numbers]
        mean = torch.linspace(0.1, 0.3, 64)[numbers]
        expected = torch.where(QUARTER.flatten()[:, None], 3 * mean.expand_as(z), -z)
        assert (z > 0).any()
        difference = flat(after[key] - before[key])
        torch.testing.assert_close(difference, expected @ editor.saes[site].W_dec[numbers], atol=1e-5, rtol=1e-5)


def test_strength_is_the_share_of_the_way_to_zero(model: Diffuser, editor: Editor) -> None:
    for change, left in (
        (SpatialEdit(label="cat", region="right", strength=0.25), 0.75),
        (ReplaceEdit(label="cat", strength=0.25, region="left", steps=(0, 0)), 0.75),
        (ReplaceEdit(label="cat", strength=9, region="left", steps=(0, 0)), 0),
    ):
        before, after = updates(model, editor, [change])
        key, numbers = ActivationKey(*COND, 0), [3, 7, 11]
        z = codes(editor, COND, before[key])[..., numbers].view(2, 8, 8, 3)[:, :, :4].reshape(2, 32, 3)
        moved = flat((after[key] - before[key])[..., :4])
        expected = (left - 1) * z @ editor.saes[COND].W_dec[numbers]
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)


def test_an_object_is_patched_with_its_surroundings(model: Diffuser, editor: Editor) -> None:
    key, numbers = ActivationKey(*COND, 0), [3, 7, 11]
    for strength in (1.0, 2.5):
        change = RemoveEdit(label="cat", strength=strength, region="left", steps=(0, 0))
        before, after = updates(model, editor, [change])
        there = (codes(editor, COND, before[key])[..., numbers] > 0).any(-1).view(2, 8, 8)
        assert 0 < there.sum() < there.numel()
        expected = before[key].clone()
        for row, y, x in there.nonzero().tolist():
            old = before[key][row]
            surroundings = old[:, y][:, ~there[row, y]] if not there[row, y].all() else old[:, ~there[row]]
            if x < 4 and surroundings.numel():
                expected[row, :, y, x] += strength * (surroundings.mean(1) - old[:, y, x])
        torch.testing.assert_close(after[key], expected, atol=1e-5, rtol=1e-5)


def test_the_edge_of_an_object_is_removed_too_and_one_without_surroundings_stays() -> None:
    inside, x = torch.ones(32 * 32, 1), torch.randn(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    z = torch.zeros(2, 32, 32, 1)
    z[0, 10, 20] = 1.0
    z[1] = 1.0
    latents = SelectedLatents(*(torch.zeros(1) for _ in range(2)), False, *(torch.zeros(1) for _ in range(3)))
    context = EditContext(ActivationKey(*COND, 0), (32, 32), latents, inside)
    new = RemoveEdit(label="cat", strength=1.0).apply(x, z.flatten(1, 2), context)
    assert new.x is not None
    assert new.z is None
    changed = (new.x != x).any(-1)
    assert changed[0].nonzero().tolist() == [[y, x] for y in range(8, 13) for x in range(18, 23)]
    assert not changed[1].any()


def test_removing_a_style_subtracts_the_effect_of_its_word(model: Diffuser, editor: Editor) -> None:
    key = ActivationKey(*COND, 0)
    before, after = updates(model, editor, [RemoveEdit(label="night", steps=(0, 0))])
    expected = -1.5 * EFFECT[[2, 5, 9]] @ editor.saes[COND].W_dec[[2, 5, 9]]
    torch.testing.assert_close(
        flat(after[key] - before[key]), expected.expand_as(flat(after[key])), atol=1e-5, rtol=1e-5
    )


def test_a_target_value_is_clipped_to_the_range_in_data(model: Diffuser, editor: Editor) -> None:
    key, whole = ActivationKey(*COND, 0), (0, STEPS - 1)
    for to, value in ((0.5, 0.5 * torch.linspace(0.1, 0.3, 64)[20]), (50, torch.linspace(0.2, 0.4, 64)[20])):
        before, after = updates(model, editor, [ReplaceEdit(label="orca", to=to, steps=whole)])
        z = codes(editor, COND, before[key])[..., [20]]
        expected = (value - z) @ editor.saes[COND].W_dec[[20]]
        torch.testing.assert_close(flat(after[key] - before[key]), expected, atol=1e-5, rtol=1e-5)


def test_a_style_edit_adds_the_effect_of_its_word(model: Diffuser, editor: Editor) -> None:
    key = ActivationKey(*COND, 0)
    style = GlobalEdit(label=" Night", strength=3, steps=(0, 0))
    assert editor.concepts(style) == {COND: (2, 5, 9)}
    before, after = updates(model, editor, [style])
    expected = 3 * EFFECT[[2, 5, 9]] @ editor.saes[COND].W_dec[[2, 5, 9]]
    torch.testing.assert_close(
        flat(after[key] - before[key]), expected.expand_as(flat(after[key])), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="No concept has the label 'night'"):  # only style edits use word effects
        editor.concepts(SpatialEdit(label="night", region="left"))


def test_several_edits_each_act_on_what_the_one_before_left(model: Diffuser, editor: Editor) -> None:
    key = ActivationKey(*COND, 1)
    edits = [
        GlobalEdit(label="cat", strength=2, steps=(1, 2)),
        ReplaceEdit(label="cat", strength=0.5, steps=(0, 1), region="top-left"),
        GlobalEdit(label="whale", strength=1, steps=(2, 3)),
    ]
    before, after = updates(model, editor, edits, step=1)
    numbers = [3, 7, 11]
    z = codes(editor, COND, before[key])[..., numbers]
    new = z + 2 * torch.linspace(0.1, 0.3, 64)[numbers]
    new = torch.where(QUARTER.flatten()[:, None], new / 2, new)
    expected = (new - z) @ editor.saes[COND].W_dec[numbers]
    torch.testing.assert_close(flat(after[key] - before[key]), expected, atol=1e-5, rtol=1e-5)


def test_patches_come_from_another_run(model: Diffuser, editor: Editor) -> None:
    with record(model, [MIDDLE], branches=["cond"], steps=[0]) as other:
        for _ in model.sample(["a moon"] * 2, seeds=[3, 4], num_inference_steps=STEPS, last_step=0):
            pass
    key = ActivationKey(*COND, 0)
    exchange = ReplaceEdit(concepts=[Target(COND, 3)], patches=other, steps=(0, 0), region="top-left")
    before, after = updates(model, editor, [exchange])
    there = (codes(editor, COND, before[key])[..., 3] > 0) & QUARTER.flatten()
    assert 0 < there.sum() < there.numel()
    torch.testing.assert_close(flat(after[key])[there], flat(other[key])[there])
    assert torch.equal(after[key].flatten(2).transpose(1, 2)[~there], flat(before[key])[~there])
    late = ReplaceEdit(concepts=[Target(COND, 3)], patches=other, steps=(1, 1))
    with pytest.raises(ValueError, match="have no update for"):
        draw(model, editor, late)


def test_each_image_of_a_batch_has_its_own_edits(model: Diffuser, editor: Editor) -> None:
    change = SpatialEdit(label="cat", region="left", strength=5)
    settings: dict[str, Any] = {"seeds": [0, 1, 2], "num_inference_steps": STEPS}
    *_, plain = model.sample([PROMPT] * 3, **settings)
    *_, alike = model.sample([PROMPT] * 3, **settings, contexts=[editor.editing([change], STEPS)])
    *_, one = model.sample([PROMPT] * 3, **settings, contexts=[editor.editing_each([[], [change], []], STEPS)])
    assert torch.equal(one.x[[0, 2]], plain.x[[0, 2]])
    torch.testing.assert_close(one.x[1], alike.x[1])
    assert not torch.allclose(one.x[1], plain.x[1], atol=1e-3)


# --- windows ----------------------------------------------------------------------------------------------------------


def test_steps_are_right_run_after_run(model: Diffuser, editor: Editor) -> None:
    key_of = {step: ActivationKey(*COND, step) for step in range(STEPS)}
    change = GlobalEdit(label="cat", strength=2, steps=(1, 2))
    for n in (1, 3, 2):  # a counter in a hook would be off from the second run on
        before, after = record(model, [MIDDLE]), record(model, [MIDDLE])
        given_up = model.sample([PROMPT], seeds=[0], num_inference_steps=STEPS)
        next(given_up)
        given_up.close()
        contexts = [before, editor.editing([change], STEPS), after]
        for _ in model.sample([PROMPT] * n, seeds=range(n), num_inference_steps=STEPS, contexts=contexts):
            pass
        changed = [step for step, key in key_of.items() if not torch.equal(before[key], after[key])]
        assert changed == [1, 2]
        assert torch.equal(before[ActivationKey(*UNCOND, 1)], after[ActivationKey(*UNCOND, 1)])


def test_stages_are_windows() -> None:
    stages = {name: window_of(GlobalEdit(label="cat", stage=name), 25, STAGES) for name in ("early", "middle", "late")}
    assert [step for window in stages.values() for step in window] == list(range(25))
    assert stages["early"] == range(0, 10)
    assert window_of(GlobalEdit(label="cat", steps=(3, 3)), 25, STAGES) == range(3, 4)
    with pytest.raises(ValueError, match="With 2 steps the middle stage has none"):
        window_of(GlobalEdit(label="cat"), 2, STAGES)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (GlobalEdit(label="cot"), "No concept has the label 'cot' there. The nearest: cat, whale"),
        (GlobalEdit(), "either a label or concepts"),
        (GlobalEdit(label="cat", concepts=[3]), "either a label or concepts"),
        (GlobalEdit(concepts=[64]), "There is no concept 64"),
        (GlobalEdit(concepts=[3], branches=["cond", "uncond"]), "name one hookpoint and one branch"),
        (GlobalEdit(concepts=[Target(SaeSite(UP, "cond"), 3)]), "There is no SAE"),
        (
            GlobalEdit(label="cat", hookpoints=[UP]),
            r"no SAE for all times at up\S+ \(cond\). There are: mid",
        ),
        (GlobalEdit(label="cat", hookpoints=[]), "list of hookpoints is empty"),
        (GlobalEdit(concepts=[3.7]), "float"),  # type: ignore[list-item]
        (GlobalEdit(label="cat", steps=(0.5, 2)), "two whole numbers"),  # type: ignore[arg-type]
        (GlobalEdit(label="cat", steps=(1,)), "two whole numbers"),  # type: ignore[arg-type]
        (GlobalEdit(label="cat", branches=[]), "some of cond, uncond, not none"),
        (GlobalEdit(label="cat", branches=["text"]), "some of cond, uncond, not text"),
        (GlobalEdit(label="cat", steps=(2, 5)), "Steps 2 to 5 are not a window .* steps 0 to 4"),
        (GlobalEdit(label="cat", steps=(3, 2)), "not a window"),
        (GlobalEdit(label="cat", steps=(-1, 2)), "not a window"),
        (GlobalEdit(label="cat", steps=(0, 2), stage="early"), "either a stage or steps"),
        (GlobalEdit(label="cat", stage="soon"), "one of early, middle, late"),
        (GlobalEdit(label="cat", stage="late to early"), "one of early, middle, late"),
        (GlobalEdit(label="cat", strength=float("nan")), "finite"),
        (GlobalEdit(label="cat", strength=float("inf")), "finite"),
        (GlobalEdit(label="cat", strength=-1), "at least 0"),
        (ReplaceEdit(label="cat", to=float("nan")), "finite"),
        (SpatialEdit(label="cat", region="middle"), "A region is one of top-left"),
        (SpatialEdit(label="cat", region=np.zeros((128, 128))), "region is empty"),
        (SpatialEdit(label="cat", region=np.ones((64, 128))), "128 x 128, not 64 x 128"),
        (SpatialEdit(label="cat", region=np.ones((128, 128, 3))), "not 128 x 128 x 3"),
    ],
)
def test_invalid_edits_are_refused_before_any_work(
    model: Diffuser, editor: Editor, change: ConceptEdit, message: str
) -> None:
    calls = model.n_unet_calls
    with pytest.raises(ValueError, match=message):
        editor.editing([change], STEPS)
    assert model.n_unet_calls == calls


# --- regions and choices ----------------------------------------------------------------------------------------------


def test_named_regions_and_masks() -> None:
    quarter = np.zeros((128, 128), dtype=np.uint8)
    quarter[:64, :64] = 255
    named = RegionMask("top-left", 128).grid(8, 8)
    for mask in (quarter, torch.from_numpy(quarter), Image.fromarray(quarter)):
        assert torch.equal(RegionMask(mask, 128).grid(8, 8), named)
    assert torch.equal(named.view(8, 8).bool(), QUARTER)
    assert RegionMask("right", 128).grid(2, 2).flatten().tolist() == [0, 1, 0, 1]
    assert RegionMask("bottom", 128).grid(2, 2).flatten().tolist() == [0, 0, 1, 1]
    spot = np.zeros((128, 128))
    spot[3, 5] = 1
    assert RegionMask(spot, 128).grid(8, 8).sum() == pytest.approx(1 / 256)  # smaller than a cell, yet not lost


def test_concepts_by_label_synonym_number_and_site(editor: Editor) -> None:
    assert editor.concepts(GlobalEdit(label="cat", branches=["cond", "uncond"])) == {COND: (3, 7, 11), UNCOND: (5,)}
    assert editor.concepts(GlobalEdit(label=" Orca ", branches=["cond", "uncond"])) == {COND: (20,)}
    assert editor.concepts(GlobalEdit(concepts=[9, 2, 9])) == {COND: (9, 2)}
    assert editor.concepts(GlobalEdit(concepts=[Target(UNCOND, 1), 4])) == {UNCOND: (1,), COND: (4,)}


def test_concepts_by_pointing(model: Diffuser, editor: Editor) -> None:
    tracer = CodeTracer(model, editor.saes)
    for _ in model.sample([PROMPT], seeds=[0], num_inference_steps=2, contexts=[tracer.context]):
        pass
    trace = tracer.trace()
    total = trace.map(COND, 0, 0) * 0
    by_number = [float(sum((trace.map(COND, step, n)[1, 6] for step in (0, 1)), total[1, 6])) for n in range(64)]
    best = sorted(range(64), key=lambda n: -by_number[n])[:2]
    assert concepts_at(trace, 0.8, 0.2, COND, limit=2) == tuple(Target(COND, n) for n in best)
    assert concepts_at(trace, 1.0, 1.0, COND, steps=[1])[0].number == int(trace.code(COND, 1).indices[63, 0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        concepts_at(trace, 1.2, 0, COND)
    with pytest.raises(ValueError, match="Nothing was recorded"):
        concepts_at(trace, 0.5, 0.5, COND, steps=[7])
