from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from core.activations.attention import record_attention, word_maps
from core.activations.hooks import ActivationKey, record
from core.diffusion.diffuser import Diffuser
from core.sae.autoencoder import SaeConfig, SaeId, SparseAutoencoder
from core.sae.io import save_sae
from core.segmentation.grids import cell_counts, class_masks, majority
from core.segmentation.semantic import Segmentation
from training.evaluate import run
from training.evaluate.common.masks import (
    Truth,
    best_threshold,
    grid_iou,
    pixel_iou,
    resampled,
    score_masks,
    truth_of,
)
from training.evaluate.layout import evaluation as layout
from training.evaluate.layout.evaluation import EVALUATION, LayoutBench, LayoutSettings
from training.evaluate.layout.images import LayoutImages, joined, objects_in, watch
from training.evaluate.layout.methods import Baseline, baselines, prior
from training.evaluate.layout.probe import PENALTIES, fit_probe
from training.picturebook.world.captions import Caption, Story
from training.picturebook.world.world import LABELS, OBJECT_INDEX

CAT, DOG, SEA = LABELS.index("cat"), LABELS.index("dog"), LABELS.index("sea")
MIDDLE = "mid_block.attentions.0"
TINY = LayoutSettings(n_images=6, n_fit=6, n_steps_each=2, num_inference_steps=3, batch_size=4, n_bootstrap=30)


def caption(*nouns: str, relation: Any = None) -> Caption:
    story = Story(nouns, relation, "sea", "plain")
    return Caption(story, nouns, "and", "sea", False, False, False, "")


# --- grids ------------------------------------------------------------------------------------------------------------


def test_cells_are_counted_and_go_to_their_majority() -> None:
    labels = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, -1], [-1, -1, 2, 2], [-1, 1, 2, 0], [1, 1, 0, 0], [1, 1, 2, 0]]])
    counts = cell_counts(labels, 3, 3, 2)
    assert counts.shape == (1, 4, 3, 2)
    assert counts[0, :, 0, 0].tolist() == [3, 0, 1, 0]
    assert counts[0, :, 0, 1].tolist() == [0, 3, 0, 1]
    assert counts[0, :, 1, 0].tolist() == [0, 1, 0, 3]
    assert majority(counts).tolist() == [[[0, 1], [-1, 2], [1, 0]]]
    with pytest.raises(ValueError, match="6 x 4 pixels do not divide into 4 x 4 cells"):
        cell_counts(labels, 3, 4, 4)


def boxes() -> tuple[Tensor, Truth]:
    """Two images of 8 x 8 pixels on 4 x 4 cells: class 0 in 6 x 4 pixels, and in 5, of which 4 fill a cell."""
    labels = torch.full((2, 8, 8), 2)
    labels[0, :6, :4] = 0
    labels[1, :2, :2] = labels[1, 2, 0] = 0
    return labels, truth_of(cell_counts(labels, 3, 4, 4), torch.tensor([[0, -1, 1], [0, -1, -1]]))


def test_intersection_over_union_by_hand() -> None:
    _, truth = boxes()
    assert truth.masks[:, 0].sum((1, 2)).tolist() == [6, 1]
    assert truth.there.tolist() == [[True, False, False], [True, False, False]]  # class 1 is nowhere
    masks = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    masks[0, 0, :2] = True  # 8 cells, 4 of the 6
    masks[1, 0, 0, 0] = True
    masks[:, 1] = True
    on_grid = grid_iou(masks, truth)
    assert on_grid[:, 0].tolist() == [4 / 10, 1]
    assert on_grid[:, 1:].isnan().all()
    in_pixels = pixel_iou(masks, truth)
    assert in_pixels[:, 0].tolist() == pytest.approx([16 / 40, 4 / 5])
    assert in_pixels[:, 1:].isnan().all()


def test_pixels_are_those_of_the_enlarged_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 3, (5, 12, 18), generator=generator)
    targets = torch.tensor([[0, 1], [1, 2], [2, -1], [0, 2], [1, 0]])
    truth = truth_of(cell_counts(labels, 3, 4, 6), targets)
    masks = torch.rand(5, 2, 4, 6, generator=generator) < 0.5
    large = masks.repeat_interleave(3, 2).repeat_interleave(3, 3)
    true = class_masks(labels, targets)
    by_hand = (large & true).sum((2, 3)).double() / (large | true).sum((2, 3))
    there = truth.there
    assert int(there.sum()) > 5
    torch.testing.assert_close(pixel_iou(masks, truth)[there], by_hand[there])


def test_scores_become_masks_that_do_not_overlap_at_the_best_threshold() -> None:
    _, truth = boxes()
    scores = torch.full((2, 3, 4, 4), -torch.inf)
    scores[:, 0] = 0.1 + 0.5 * truth.masks[:, 0]
    scores[0, 2] = 0.3
    at = best_threshold(scores, truth)
    assert 0.1 < at <= 0.6
    masks = score_masks(scores, at)
    torch.testing.assert_close(grid_iou(masks, truth)[:, 0], torch.ones(2, dtype=torch.float64))
    assert not bool((masks.sum(1) > 1).any())
    assert not bool(masks[1, 1:].any())
    assert bool(score_masks(scores, 0.0)[0, 2].any())  # where it is above the others
    assert not bool(score_masks(scores, 0.0)[0, 2][truth.masks[0, 0]].any())


def test_means_are_over_objects_and_intervals_over_images() -> None:
    rng = np.random.default_rng(0)
    ious = rng.uniform(size=(400, 3))
    ious[rng.uniform(size=(400, 3)) < 0.4] = np.nan
    ious[5] = np.nan
    mean = resampled(ious, 500)
    assert mean.value == pytest.approx(np.nanmean(ious))
    error = np.nanstd(ious) / np.sqrt(np.isfinite(ious).sum())
    value, low, high = mean.estimate
    assert low < value < high
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.15)
    # Paired: a constant difference has no uncertainty.
    difference = resampled(ious + 0.1, 500).minus(mean)
    assert difference == pytest.approx((0.1, 0.1, 0.1))
    assert mean.over(mean) == pytest.approx((1, 1, 1))
    assert str(resampled(np.full((4, 3), np.nan), 10).estimate) == "none"


# --- what is fitted ---------------------------------------------------------------------------------------------------


def test_a_probe_finds_classes_that_a_plane_divides() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 50, 4, generator=generator)
    labels = (x @ torch.randn(4, 3, generator=generator)).argmax(2)
    x = x * torch.tensor([0.1, 1, 1, 20]) + 7  # of very different scales, off the origin
    unknown = torch.rand(60, 50, generator=generator) < 0.2
    known = torch.where(unknown, -1, labels)
    probe = fit_probe(x, known, 4)
    right = probe.logits(x).argmax(2) == labels
    assert float(right[unknown].float().mean()) > 0.97
    shuffled = fit_probe(x, known.roll(1, 1), 4)
    assert float((shuffled.logits(x).argmax(2) == labels).float().mean()) < 0.6


def test_a_probe_takes_the_penalty_that_suits_other_images() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, 20, generator=generator)
    noise, plain = torch.randint(3, (40, 6), generator=generator), x[..., :3].argmax(2)
    for labels, wanted in ((noise, PENALTIES[0]), (plain, PENALTIES[-1])):
        free = fit_probe(x, labels, 3).logits(x)
        with patch("training.evaluate.layout.probe.PENALTIES", (wanted,)):
            torch.testing.assert_close(free, fit_probe(x, labels, 3).logits(x), atol=0.1, rtol=0.1)
        with patch("training.evaluate.layout.probe.PENALTIES", (PENALTIES[0] + PENALTIES[-1] - wanted,)):
            assert float((free - fit_probe(x, labels, 3).logits(x)).abs().max()) > 0.3


def images(captions: Sequence[Caption], labels: Tensor, updates: Tensor | None = None) -> LayoutImages:
    """Images whose label maps [N, 8, 8] are the grid itself."""
    counts = cell_counts(labels, len(LABELS), 8, 8)
    targets = torch.full((len(captions), 3), -1)
    for i, one in enumerate(captions):
        for j, noun in enumerate(one.story.nouns):
            if bool((labels[i] == OBJECT_INDEX[noun]).any()):
                targets[i, j] = OBJECT_INDEX[noun]
    maps = majority(counts)
    by_key = {} if updates is None else {ActivationKey(MIDDLE, "cond", 0): updates}
    attention = torch.rand(len(captions), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return LayoutImages(
        tuple(captions), targets, {MIDDLE: truth_of(counts, targets)}, {MIDDLE: maps}, {MIDDLE: maps},
        {(MIDDLE, 0): maps}, by_key, {(MIDDLE, 0): attention},
    )  # fmt: skip


def test_a_prior_is_the_mean_mask_of_what_is_named_elsewhere() -> None:
    captions = [caption("cat"), caption("cat", "dog", relation="left"), caption("dog")]
    labels = torch.full((3, 8, 8), SEA)
    labels[0, :2], labels[1, :, :2], labels[1, 6:, 6:] = CAT, CAT, DOG  # the third names a dog that is not there
    fit = images(captions, labels)
    overall = (fit.truth[MIDDLE].masks[0, 0].float() + fit.truth[MIDDLE].masks[1, :2].sum(0)) / 3
    scores = prior(fit, MIDDLE, lambda one, j: one.story.nouns[j])(
        images([caption("dog", "cat", "pig")], labels[:1]), 0
    )
    cats = fit.truth[MIDDLE].masks[0, 0].float() + fit.truth[MIDDLE].masks[1, 0]
    torch.testing.assert_close(scores[0, 0], (fit.truth[MIDDLE].masks[1, 1] + 2 * overall) / 3)
    torch.testing.assert_close(scores[0, 1], (cats + 2 * overall) / 4)
    torch.testing.assert_close(scores[0, 2], overall)  # never met
    assert prior(fit, MIDDLE, lambda *_: "all")(fit, 0)[0, 1:].isinf().all()


def test_homonyms_are_what_is_there_and_small_objects_are_not() -> None:
    labels = torch.full((1, 128, 128), SEA)
    labels[0, :20, :20] = OBJECT_INDEX["club"]
    labels[0, :15, 100:115] = OBJECT_INDEX["bat"]
    labels[0, 100:110, :19] = CAT
    assert objects_in([caption("bat", "cat")], labels).tolist() == [[OBJECT_INDEX["club"], -1, -1]]
    labels[0, 100:110, :20] = CAT
    assert objects_in([caption("cat")], labels).tolist() == [[CAT, -1, -1]]


def channels(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Updates [N, C, h, w] with a channel a class."""
    return torch.stack([3.0 * (labels == c) for c in classes], dim=1)


def identity(d: int, k: int) -> SparseAutoencoder:
    sae = SparseAutoencoder(SaeConfig(d, d, k)).requires_grad_(False)
    sae.encoder.weight.copy_(torch.eye(d))
    sae.W_dec.copy_(torch.eye(d))
    return sae


def table_of(latents: Sequence[str], classes: Sequence[str], d_sae: int | None = None) -> Any:
    """A concept table whose latent i fires in the masks of class latents[i], 0.7 of the time."""
    d_sae = len(latents) if d_sae is None else d_sae
    inside = torch.zeros(d_sae, len(classes))
    for i, name in enumerate(latents):
        if name in classes:
            inside[i, classes.index(name)] = 700
    active = inside.sum(1) + 10
    cells = torch.full((len(classes),), 1000.0)
    frame = pd.DataFrame(
        [(i, name, 0.7, "object", ()) for i, name in enumerate(latents)],
        columns=["latent", "label", "iou", "kind", "runner_ups"],
    )
    counts = SimpleNamespace(
        intersections=inside, active=active, cells=cells, n_cells=torch.tensor(1000.0 * (len(classes) + 1))
    )
    return SimpleNamespace(counts=counts, class_names=tuple(classes), frame=frame)


def by_name(methods: Sequence[Baseline]) -> dict[tuple[str, bool], Baseline]:
    return {(method.name, method.uses_prompt_classes): method for method in methods}


def test_concepts_in_another_order_predict_what_they_know() -> None:
    captions = [caption("cat", "dog"), caption("cat"), caption("dog")]
    labels = torch.full((3, 8, 8), SEA)
    labels[:2, :4, :4] = CAT
    labels[0, 5:, 5:] = DOG
    labels[2, 2:, 2:] = DOG
    seen = labels.clone()
    seen[1, :4, :4] = DOG  # this cat looks like a dog, and a little like a cat
    updates = channels(seen, (SEA, DOG, CAT))
    updates[1, 2, :4, :4] = 1.0
    shown = images(captions, labels, updates)
    table = table_of(["sea", "dog", "cat"], ["dog", "sea", "cat"])
    table.frame.loc[1, "iou"] = 0.9  # a dictionary does not look at the values
    read = {(MIDDLE, "cond"): (identity(3, 2), table)}
    methods = by_name(list(baselines(shown, read, [0])))  # type: ignore[arg-type]
    truth = shown.truth[MIDDLE]

    def ious(name: str, uses_prompt_classes: bool) -> list[float]:
        found = grid_iou(methods[name, uses_prompt_classes].masks(shown, 0), truth)
        return [float(value) for value in found[truth.there]]

    assert ious("concepts, readout", False) == [1, 1, 0, 1]
    assert ious("concepts, dictionary", False) == [1, 1, 0, 1]
    assert ious("concepts, readout", True) == [1, 1, 1, 1]  # no dog was named
    assert ious("concepts, dictionary", True) == [1, 1, 1, 1]
    assert ious("linear probe", False) == [1, 1, 1, 1]
    assert ious("true masks on the grid", True) == [1, 1, 1, 1]
    ignorant = {(MIDDLE, "cond"): (identity(3, 2), table_of(["sea", "", "cat"], ["sea", "cat"]))}
    methods = by_name(list(baselines(shown, ignorant, [0])))  # type: ignore[arg-type]
    assert ious("concepts, readout", False) == [1, 0, 0, 0]  # its table has no dogs


# --- all of it --------------------------------------------------------------------------------------------------------

KNOWN = ("cat", "dog", "whale", "house", "pine", "cake", "sun", "boat")


class Planted:
    """Sees the same in every image: each of `KNOWN` but the sun in a box of its own, on the sea."""

    def __init__(self, shift: int) -> None:
        self.map = torch.full((128, 128), SEA)
        for i, name in enumerate(KNOWN):
            if name != "sun":
                row, column = divmod(i, 4)
                self.map[64 * row : 64 * row + 32, 32 * column : 32 * column + 32] = LABELS.index(name)
        self.map = self.map.roll(shift, 0)

    def class_names(self) -> tuple[str, ...]:
        return LABELS

    def segment(self, images: Sequence[Image.Image]) -> Segmentation:
        masks = self.map == torch.arange(len(LABELS))[:, None, None]
        return Segmentation(masks.expand(len(images), -1, -1, -1), torch.ones(len(images), len(LABELS)))


CAPTIONS = [
    caption("cat", "dog"),
    caption("whale"),
    caption("sun", "cat"),
    caption("house", "cake"),
    caption("dog", "whale", relation="left"),
    caption("cake", "house", "sun"),
]
"""What the small model can take."""


def test_objects_have_the_attention_of_their_words(model: Diffuser) -> None:
    chosen = [CAPTIONS[0], CAPTIONS[1], CAPTIONS[5]]
    parts = list(watch(model, (Planted(0), Planted(16)), chosen, 7, [1], batch_size=2, num_inference_steps=3))
    assert [len(part.captions) for part in parts] == [2, 1]
    shown = joined(parts)
    assert shown.captions == tuple(chosen)
    assert shown.targets.tolist() == [[CAT, DOG, -1], [OBJECT_INDEX["whale"], -1, -1],
                                      [OBJECT_INDEX["cake"], OBJECT_INDEX["house"], -1]]  # fmt: skip
    with record_attention(model, [MIDDLE], branches=["cond"], steps=[1]) as maps, record(model, steps=[1]) as updates:
        for _ in model.sample([chosen[2].text], seeds=[9], num_inference_steps=3):
            pass
    words, of_words = word_maps(model, chosen[2].text, maps[ActivationKey(MIDDLE, "cond", 1)][0])
    of_cake = of_words[words.index("cake")]
    torch.testing.assert_close(shown.attention[MIDDLE, 1][2, 0], of_cake / of_cake.max(), atol=1e-4, rtol=1e-3)
    assert shown.attention[MIDDLE, 1][1, 1:].isneginf().all()
    for key, update in updates.items():
        torch.testing.assert_close(shown.updates[key][2], update[0], atol=1e-4, rtol=1e-3)
    truth = shown.truth["up_blocks.1.attentions.0"]
    assert truth.masks[:, 0].sum((1, 2)).tolist() == [16, 16, 16]
    assert truth.cell_area == 64


@pytest.mark.slow
def test_the_evaluation_runs_and_is_cached(model: Diffuser, tmp_path: Path) -> None:
    named = [noun for one in CAPTIONS for noun in one.story.nouns]
    save_sae(identity(32, 3), tmp_path / "saes" / SaeId(MIDDLE, "cond", "all").path, {}, torch.float32)
    options = run.EvalOptions((), True, tmp_path / "out", (tmp_path / "saes",))
    tiny = replace(EVALUATION, quick=TINY)
    judges = SimpleNamespace(segmenters={"first": Planted(0), "second": Planted(16)})
    with (
        patch.object(layout, "held_out_scenes", lambda _: CAPTIONS * 2),
        patch.object(layout, "caption_of", lambda one: one),
        patch.object(layout, "watch", side_effect=watch) as watched,
        patch("training.evaluate.layout.probe.N_ITERATIONS", 5),
        patch.object(layout, "load_judges", lambda _: judges),
        patch("core.load_concepts", lambda *_: table_of(LABELS[:32], LABELS, 32)),
    ):
        tables = run.evaluate(tiny, model, options)
        before = model.n_unet_calls
        again = run.evaluate(tiny, model, options)
        assert model.n_unet_calls == before
    # Sampled once, and scored on other noise than fitted on.
    assert [(len(call.args[2]), call.args[3]) for call in watched.call_args_list] == [(6, 0), (6, 6)]
    assert [table.name for table in tables] == ["grid", "pixels", "settled", "differences"]
    assert [a.markdown() for a in again] == [b.markdown() for b in tables]
    grid, pixels, settled, differences = tables
    of = {(row["hookpoint"], row["branch"], row["method"], row["prompt's classes"]): row for row in grid.rows}
    assert len(of) == len(grid.rows) == 3 * (6 + 2 * 2) + 4
    for hookpoint in model.hookpoints:
        for step in ("t = 1.00", "t = 0.50", "t = 0.00"):
            assert str(of[hookpoint, None, "true masks on the grid", "yes"][step]).startswith("1.000")
            # Boxes of 4 rows, seen 2 rows lower.
            assert str(of[hookpoint, None, "second segmenter", "no"][step]).startswith("0.333 (0.333 to 0.333)")
            assert str(of[hookpoint, None, "prior of each object", "yes"][step]).startswith("1.000")
            assert str(of[hookpoint, None, "segmented preview", "no"][step]).startswith("1.000")
        attention = of[hookpoint, "cond", "cross-attention", "yes"]
        assert 0 < float(str(attention["t = 1.00"])[:5]) < 1
    n_sun = sum(noun == "sun" for noun in named)
    note = f"6 held-out prompts, {len(named)} objects named in them; {n_sun} of those are not in the final image"
    assert all(any(note in one for one in table.notes) for table in tables)
    assert len(pixels.rows) == len(grid.rows)
    ceiling = next(row for row in settled.rows if row["method"] == "segmented preview")
    assert (ceiling["t = 0.00"], ceiling["settled at"]) == ("1.000 (1.000 to 1.000)", "t = 1.00")
    assert len(differences.rows) == 4 * 2
    for row in differences.rows:
        assert float(str(row["minus prior of each object"]).split()[0]) <= 0
    with pytest.raises(SystemExit, match="no SAE for all times"):
        run.evaluate(tiny, model, options._replace(saes=(tmp_path / "none",)))


def test_the_steps_hold_the_first_the_last_and_the_middle(model: Diffuser) -> None:
    bench = LayoutBench(model, (), (), {}, replace(TINY, n_steps_each=4, num_inference_steps=25))
    assert bench.steps == (0, 8, 12, 16, 24)
    assert LayoutBench(model, (), (), {}, LayoutSettings(num_inference_steps=50)).steps == (0, 12, 24, 37, 49)
