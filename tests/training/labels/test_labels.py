import argparse
from collections.abc import Sequence
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
from core.artifacts import MANIFEST
from core.concepts.gallery import LIST, Gallery, GalleryImage, write_gallery
from core.concepts.io import COUNTS, EXAMPLES, TABLE, LabelledLatent, read_counts, read_examples
from core.concepts.table import activation_map
from core.diffusion.diffuser import Diffuser
from core.sae.autoencoder import SaeConfig, SaeId, SparseAutoencoder
from core.sae.collection import write_index
from core.sae.io import save_sae
from core.segmentation.open_vocabulary import BACKGROUND_TAGS
from core.segmentation.semantic import Segmentation
from core.spec import BUILT_IN
from training.common.checkpoint import Checkpoint, save_checkpoint
from training.labels import command
from training.labels.command import PromptsFrom, label_collection
from training.labels.examples import ExampleKeeper, select_gallery
from training.labels.labeller import LabelConfig, Labeller, LabelRun, pairings
from training.labels.naming import (
    ImageAttributes,
    LabelVocabulary,
    aurocs,
    benjamini_hochberg,
    choose,
    name_latents,
    overlaps,
    p_values,
)
from training.labels.sampling import sample_and_encode
from training.labels.tally import N_LEVELS, Entries, FiringStatistics, Shape, StepCodes
from training.pipeline.recipe import PicturebookLabels
from training.prompts.sources import FilePrompts

# --- counting ---------------------------------------------------------------------------------------------------------


def entries(rows: Sequence[tuple[int, float, int, int]]) -> Entries:
    """Of (latent, value, image, position)."""
    latents, values, images, positions = zip(*rows, strict=True)
    return Entries(*(torch.tensor(x) for x in (latents, values, images, positions)))


def by_hand() -> FiringStatistics:
    """Two images of 2 x 2, one a split; classes 0 and 1, and a cell of neither."""
    tally = FiringStatistics(Shape(d_sae=3, n_classes=2, n_permutations=1, n_steps=1, height=2, width=2))
    labels = torch.tensor([[[0, 0, 1, -1]], [[1, 1, 1, 1]]]).repeat(1, 2, 1)
    # Latent 0 is strong in class 0 and weak in class 1; latent 1 fires in one cell; latent 2 never.
    rows = [(0, 4.0, 0, 0), (0, 4.0, 0, 1), (0, 1.0, 0, 2), (0, 4.0, 1, 0), (0, 1.0, 1, 2), (1, 2.0, 1, 3)]
    tally.add([StepCodes(0, 0.25, entries(rows))], labels, torch.tensor([0, 1]))
    return tally


def test_iou_precision_and_recall_are_those_counted_by_hand() -> None:
    tally = by_hand()
    found = overlaps(tally)
    # At all: 3 cells of the first image, 2 of them in class 0, 1 in class 1.
    assert found.iou[0, 0, 0].tolist() == pytest.approx([2 / 3, 1 / 3])
    choice = choose(found)
    assert (choice.classes[0], choice.iou[0]) == (0, 1)  # from above the weak value on, exactly class 0
    assert choice.held_out[0] == pytest.approx(1 / 2)
    assert 1 < float(tally.threshold(choice.levels)[0]) <= 4
    assert choice.iou[2] == 0
    named = name_latents(
        tally, ImageAttributes(np.array([0, 1]), np.zeros((2, 2)), np.zeros((2, 0), bool)), names_of("ab")
    )
    assert named[0].scores.precision == pytest.approx(1)
    assert named[0].scores.recall == pytest.approx(1 / 2)
    assert named[0].scores.mean == pytest.approx(14 / 5)
    assert named[0].scores.firing_rate == pytest.approx(5 / 8)
    assert named[0].scores.typical_t == pytest.approx(0.25)
    assert named[0].scores.runner_ups[0].label == "b"
    assert named[2].scores == named[2].scores._replace(best_class="", threshold=0, mean=0, spread=0, p_value=1)


def test_pairings_give_every_image_the_masks_of_another_of_its_split() -> None:
    tally = by_hand()
    assert tally.hits[:, 0, 0, 1].sum(0).tolist() == [0, 3]  # the second pairing's masks are of class 1 alone
    assert tally.cells.tolist() == [[2, 1], [2, 1]]  # but the classes' areas are the images' own
    splits = torch.arange(10) % 2
    order = pairings(splits, 50, np.random.default_rng(0))
    assert (order[0] == torch.arange(10)).all()
    assert (order[1:] != torch.arange(10)).all()
    assert (splits[order] == splits).all()
    assert all(sorted(row) == list(range(10)) for row in order.tolist())
    assert len({tuple(row) for row in order.tolist()}) > 40


def names_of(classes: Sequence[str], styles: Sequence[str] = (), backgrounds: Sequence[str] = ()) -> LabelVocabulary:
    return LabelVocabulary(tuple(classes), frozenset(backgrounds), tuple(styles))


def random_batch(rng: np.random.Generator, n: int, scale: float) -> tuple[list[StepCodes], Tensor, Tensor]:
    codes_by_step = []
    for step in range(2):
        cells = rng.choice(5 * n * 16, 60 * n, replace=False)
        rows = (cells // (n * 16), np.exp(rng.normal(size=len(cells))) * scale, cells // 16 % n, cells % 16)
        parts = [torch.from_numpy(row) for row in rows]
        codes_by_step.append(StepCodes(step, 1.0 - step, Entries(parts[0], parts[1].float(), parts[2], parts[3])))
    labels = torch.from_numpy(rng.integers(-1, 3, size=(3, n, 16)))
    return codes_by_step, labels, torch.arange(n) % 2


def tallied(batches: Sequence[tuple[list[StepCodes], Tensor, Tensor]]) -> FiringStatistics:
    tally = FiringStatistics(Shape(5, 3, 2, 2, 4, 4))
    for batch in batches:
        tally.add(*batch)
    return tally


def test_statistics_merge_in_any_order() -> None:
    rng = np.random.default_rng(0)
    batches = [random_batch(rng, 6, scale) for scale in (1.0, 30.0, 0.1, 3.0)]
    whole = tallied(batches)
    for first, second in ((batches[:1], batches[1:]), (batches[:3], batches[3:])):
        merged = tallied(first)
        merged.merge(FiringStatistics.of(tallied(second).tensors()))
        for name, value in whole.tensors().items():
            torch.testing.assert_close(merged.tensors()[name], value, msg=name)
    turned = tallied(batches[::-1])
    assert torch.equal(turned.hits, whole.hits)
    assert int((whole.area.sum((1, 2)) > 0).sum()) == N_LEVELS  # the scales differ so much that no level is empty


def test_levels_are_half_octaves_below_the_largest_value() -> None:
    rng = np.random.default_rng(1)
    batches = [random_batch(rng, 6, scale) for scale in (1.0, 4.0)]
    tally = tallied(batches)
    values = torch.cat(
        [m.entries.values[m.entries.latents == 2] for codes_by_step, *_ in batches for m in codes_by_step]
    )
    for level in range(N_LEVELS):
        least = float(tally.threshold(torch.full((5,), level))[2])
        assert int((values >= least).sum()) == int(tally.area[level:, 2].sum())
    assert least <= float(values.max()) < least * 2**0.5


def test_quantile_spread_and_position_share() -> None:
    rng = np.random.default_rng(2)
    values = np.exp(rng.normal(size=20_000)).astype(np.float32)
    tally = FiringStatistics(Shape(4, 1, 0, 1, 8, 8))
    n = 400
    labels, splits = torch.zeros((1, n, 64), dtype=torch.int64), torch.arange(n) % 2
    rows = [(0, float(v), i % n, i // n) for i, v in enumerate(values)]
    # Latent 1: the same map in every image. Latent 2: one cell, anywhere. Latent 3: everywhere alike, in every other.
    rows += [(1, 1.0 + cell, image, cell) for image in range(n) for cell in range(8)]
    rows += [(2, 1.0, image, int(rng.integers(64))) for image in range(n)]
    rows += [(3, 2.0, image, cell) for image in range(0, n, 2) for cell in range(64)]
    tally.add([StepCodes(0, 1.0, entries(rows))], labels, splits)
    assert float(tally.quantile(0.99)[0]) == pytest.approx(np.quantile(values, 0.99), rel=0.03)
    share = tally.position_share().tolist()
    assert share[1] == pytest.approx(1)
    assert share[2] < 0.05
    assert share[3] == pytest.approx(0, abs=1e-9)
    two_steps = FiringStatistics(Shape(1, 1, 0, 2, 8, 8))
    codes_by_step = [
        StepCodes(
            step, 1.0 - step, entries([(0, 1.0 + cell, p, cell + 40 * step) for p in range(n) for cell in range(8)])
        )
        for step in range(2)
    ]
    two_steps.add(codes_by_step, labels, splits)
    assert float(two_steps.position_share()[0]) == pytest.approx(1)  # at each step; over both together it is a half
    spread = (tally.spread_sum / tally.value_sum).sqrt()
    assert float(spread[2]) == 0
    assert float(spread[3]) == pytest.approx((2 * (1 - 1 / 64) / 12) ** 0.5)  # of 8 x 8 cells: near the square's 0.41
    torch.testing.assert_close(tally.means[:2, 3], torch.tensor([2.0, 0.0]))


# --- deciding ---------------------------------------------------------------------------------------------------------


def test_benjamini_hochberg_by_hand() -> None:
    p = np.array([0.001, 0.9, 0.024, 0.04, 0.03])
    # Sorted: .001 <= .01, .024 > .02, .03 <= .03, .04 <= .04, .9: so four stand, .024 among them.
    assert benjamini_hochberg(p).tolist() == [True, False, True, True, True]
    assert not benjamini_hochberg(np.array([0.06, 0.5])).any()


def test_auroc_counts_ties_as_half() -> None:
    means = np.array([[3.0, 0], [2, 0], [2, 0], [1, 0]])
    result = aurocs(means, np.array([[True, False], [True, False], [False, False], [False, False]]))
    assert result.auroc.tolist() == [[3.5 / 4, 0.5], [0.5, 0.5]]
    rng = np.random.default_rng(0)
    p = aurocs(rng.normal(size=(200, 2000)), rng.random((200, 1)) < 0.3).p_value
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.02)


def test_p_values_are_uniform_under_the_null_and_small_otherwise() -> None:
    rng = np.random.default_rng(0)
    level, width = rng.uniform(0.1, 0.5, 1000), rng.uniform(0.001, 0.05, 1000)
    draws = level + width * rng.normal(size=(21, 1000))
    draws[0, :50] += 6 * width[:50]
    p = p_values(draws[0], draws[1:], np.ones(1000, bool))
    assert np.mean(p[50:] < 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.median(p[:50]) < 0.001
    # The level itself says nothing: latents of a high one are not favoured.
    assert abs(np.corrcoef(p[50:], level[50:])[0, 1]) < 0.1


N, SIDE, OBJECTS, RANDOM = 400, 8, 6, 120


def planted() -> list[LabelledLatent]:
    """Images with sky above and ground below and objects at home in one position each, and latents of every kind."""
    rng = np.random.default_rng(3)
    labels = np.zeros((N, SIDE, SIDE), dtype=np.int64)
    labels[:, SIDE // 2 :] = 1
    night = rng.random(N) < 0.3
    homes = [(row, column) for row in (0, 5) for column in (0, 3, 5)]

    def blob(home: tuple[int, int]) -> tuple[slice, slice]:
        y, x = (int(np.clip(at + rng.integers(-1, 2), 0, SIDE - 3)) for at in home)
        return slice(y, y + 3), slice(x, x + 3)

    for image in labels:
        for object_name in rng.choice(OBJECTS, 2, replace=False):
            image[blob(homes[object_name])] = 2 + object_name
    codes = np.zeros((N, OBJECTS + 4 + RANDOM, SIDE, SIDE), dtype=np.float32)
    for object_name in range(OBJECTS):
        seen = (labels == 2 + object_name) & (rng.random(labels.shape) < 0.8)
        noise = (rng.random(labels.shape) < 0.2) * 0.1
        codes[:, object_name] = seen * rng.uniform(1, 2, labels.shape) + noise
    codes[:, OBJECTS] = (labels == 1) * rng.uniform(1, 2, labels.shape)
    codes[:, OBJECTS + 1] = night[:, None, None] * rng.uniform(1, 2, labels.shape)
    codes[:, OBJECTS + 2, :2, :3] = 1
    # What fires where an object is at home, but in any images; the latent before these is dead.
    for i in range(RANDOM):
        for image in np.flatnonzero(rng.random(N) < rng.uniform(0.05, 0.6)):
            codes[image, OBJECTS + 4 + i][blob(homes[i % OBJECTS])] = rng.uniform(0.5, 2)
    tally = FiringStatistics(Shape(codes.shape[1], 2 + OBJECTS, 20, 1, SIDE, SIDE))
    flat = torch.from_numpy(labels).flatten(1)
    for number in range(N // 40):
        rows = slice(number * 40, (number + 1) * 40)
        part = torch.from_numpy(codes[rows]).flatten(2)
        image, latent, position = part.nonzero(as_tuple=True)
        step_codes = StepCodes(0, 1.0, Entries(latent, part[image, latent, position], image, position))
        splits = torch.arange(40) % 2
        order = pairings(splits, 20, np.random.default_rng([0, number]))
        tally.add([step_codes], flat[rows][order], splits)
    areas = np.stack([(labels == c).mean((1, 2)) for c in range(2 + OBJECTS)], axis=1)
    facts = ImageAttributes(np.arange(N) % 2, areas, np.stack([night, rng.random(N) < 0.3], axis=1))
    classes = ["sky", "ground", *(f"thing {i}" for i in range(OBJECTS))]
    return name_latents(tally, facts, names_of(classes, ["night", "sepia"], ["sky", "ground"]))


@pytest.fixture(scope="module")
def named() -> list[LabelledLatent]:
    return planted()


def test_a_planted_dictionary_is_recovered(named: list[LabelledLatent]) -> None:
    for object_name in range(OBJECTS):
        assert named[object_name][:2] == (f"thing {object_name}", "object")
        scores = named[object_name].scores
        assert scores.held_out_iou == pytest.approx(0.8, abs=0.1)
        assert scores.precision > 0.95  # the weak values elsewhere are under the threshold that was chosen
        assert 0.1 < scores.threshold <= 1
        assert scores.p_value < 0.001
    assert named[OBJECTS + 1][:2] == ("night", "style")
    assert named[OBJECTS + 1].scores.style_auroc == pytest.approx(1)
    assert named[OBJECTS + 2][:2] == ("", "context-free")
    assert named[OBJECTS + 3][:2] == ("", "unlabelled")


def test_position_alone_gives_no_label(named: list[LabelledLatent]) -> None:
    """Random latents fire where an object is at home, so their IoU with it is not small; but it is chance's."""
    random = named[OBJECTS + 4 :]
    excess = np.array([one.scores.held_out_iou - one.scores.chance_iou for one in random])
    assert np.mean([one.scores.chance_iou for one in random]) > 0.1
    assert abs(excess.mean()) < 0.01
    p = np.array([one.scores.p_value for one in random])
    assert np.mean(p < 0.1) == pytest.approx(0.1, abs=0.08)
    assert sum(one.kind != "unlabelled" for one in random) <= 2
    # A threshold on the IoU in place of chance would have named most of them.
    assert np.mean([one.scores.held_out_iou > 0.05 for one in random]) > 0.5


# --- the gallery ------------------------------------------------------------------------------------------------------


def test_the_gallery_covers_every_latent_before_it_shows_any_twice() -> None:
    means = torch.zeros(50, 12)
    for latent in range(12):
        means[latent * 4 : latent * 4 + 4, latent] = torch.tensor([1.0, 4, 3, 2])
    means[49] = 0.1  # a little of everything
    chosen = select_gallery([means[:, :7], means[:, 7:]], 13)
    assert len(set(chosen)) == 13
    assert chosen == sorted(chosen)
    assert all((means[chosen][:, latent] > 0.5).any() for latent in range(12))
    assert len(select_gallery([means], 80)) == 50


def test_the_strongest_images_are_kept_with_their_maps() -> None:
    keeper = ExampleKeeper(3, 2, 2)
    values = [0.5, 3.0, 1.0, 9.0, 2.0, 8.0, 4.0, 5.0, 6.0, 7.0]
    for first in (0, 5):
        rows = [(1, value, row, 3) for row, value in enumerate(values[first : first + 5])]
        weak = [(1, value / 2, row, 0) for row, value in enumerate(values[first : first + 5])]
        keeper.add(range(first, first + 5), [StepCodes(0, 1.0, entries(weak)), StepCodes(1, 0.0, entries(rows))])
    examples = keeper.examples()
    assert examples.images[1].tolist() == [3, 5, 9, 8, 7, 6, 1, 4]
    assert examples.peaks[1].tolist() == [9, 8, 7, 6, 5, 4, 3, 2]
    assert examples.maps[1].tolist() == [[[128, 0], [0, 255]]] * 8
    assert (examples.images[[0, 2]] == -1).all()


def test_prompts_can_start_after_those_of_the_training(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(9)))
    prompts = FilePrompts(path, lambda _: None)
    assert PromptsFrom(prompts, 4).prompt(2) == prompts.prompt(6) == "prompt 6"


def test_a_gallery_gives_back_what_was_put_in(tmp_path: Path) -> None:
    colours = [(i, 255 - i, 128) for i in range(70)]
    entries = [GalleryImage(f"image {i}", i) for i in range(70)]
    write_gallery(tmp_path, [Image.new("RGB", (64, 64), colour) for colour in colours], entries, 32)
    write_gallery(tmp_path, [Image.new("RGB", (64, 64), colour) for colour in colours], entries, 16)
    gallery = Gallery(lambda name: tmp_path / name)
    assert len(gallery) == 70
    assert gallery.entries[69] == ("image 69", 69)
    for i in (0, 9, 63, 64, 69):
        image = gallery.image(i)
        assert image.size == (16, 16)
        assert np.abs(np.asarray(image, dtype=int)[8, 8] - colours[i]).max() < 8
    with pytest.raises(IndexError, match="0 to 69"):
        gallery.image(70)


# --- the whole --------------------------------------------------------------------------------------------------------

MIDDLE, UP = "mid_block.attentions.0", "up_blocks.1.attentions.0"
IDS = (SaeId(MIDDLE, "cond", "all"), SaeId(UP, "uncond", 0.5))
CONFIG = LabelConfig(images=15, batch=4, permutations=3, shared_steps=2, gallery=6, gallery_side=32, styles=("blue",))


class Prompt:
    """Prompts of the small model's words."""

    WORDS = ("cat", "dog", "whale", "blue ship")

    def __init__(self, dies_at: int = 10**9) -> None:
        self.dies_at, self.asked = dies_at, list[int]()

    def prompt(self, number: int) -> str:
        self.asked.append(number)
        if number >= self.dies_at:
            raise KeyboardInterrupt
        return f"a {self.WORDS[number % 4]}"


class Halves:
    """Says that the brighter half of a image is an object and a quarter of the rest a background."""

    def class_names(self) -> tuple[str, ...]:
        return ("object", "sea")

    def segment(self, images: Sequence[Image.Image]) -> Segmentation:
        values = torch.stack([torch.from_numpy(np.array(image.convert("L"))) for image in images]).float()
        middle = values.flatten(1).median(1).values[:, None, None]
        low = values.flatten(1).quantile(0.25, 1)[:, None, None]
        return Segmentation(torch.stack([values > middle, values < low], 1), torch.ones(len(images), 2))


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    root = tmp_path / "saes"
    for sae_id, d_in in zip(IDS, (32, 16), strict=True):
        sae = SparseAutoencoder(SaeConfig(d_in, 24, 3), generator=torch.Generator().manual_seed(0))
        save_sae(sae, root / sae_id.path)
    write_index(root, IDS)
    return root


def made(root: Path) -> dict[str, Any]:
    """What a run wrote, by file."""
    contents: dict[str, Any] = {LIST: (root / LIST).read_text()}
    for sae_id in IDS:
        table = core.load_concepts(root, *sae_id)
        contents[f"{sae_id.path}/{TABLE}"] = table.frame
        contents[f"{sae_id.path}/{COUNTS}"] = read_counts(root / sae_id.path / COUNTS)
        contents[f"{sae_id.path}/{EXAMPLES}"] = read_examples(root / sae_id.path / EXAMPLES)
    return contents


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a[LIST] == b[LIST]
    for name, value in a.items():
        if name.endswith(TABLE):
            for column in value.columns:
                assert value[column].map(repr).equals(b[name][column].map(repr)), (name, column)
        elif name != LIST:
            assert all(torch.equal(x, y) for x, y in zip(value, b[name], strict=True)), name


def label(collection: Path, model: Diffuser, run: LabelRun, prompts: Any = None, config: LabelConfig = CONFIG) -> None:
    label_collection(config, collection, model, Halves(), prompts or Prompt(), run)


def clear(root: Path) -> None:
    for sae_id in IDS:
        for name in (TABLE, COUNTS, EXAMPLES):
            (root / sae_id.path / name).unlink()


def test_a_killed_run_resumes_and_several_processes_add_up(
    model: Diffuser, collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "spec", replace(model.spec, num_inference_steps=3))
    (collection / MANIFEST).write_text('{"path": "of the tables that were here before"}')
    label(collection, model, LabelRun(tmp_path / "whole"))
    assert not (collection / MANIFEST).exists()
    whole = made(collection)
    assert whole[f"{IDS[0].path}/{COUNTS}"].n_cells == 8 * 2 * 64  # half of 16 images, at two steps
    assert whole[f"{IDS[1].path}/{COUNTS}"].n_cells == 8 * 256
    effect = core.load_concepts(collection, *IDS[0]).effect("blue")
    assert effect is not None
    assert np.abs(effect).max() > 1e-4
    assert core.load_concepts(collection, *IDS[1]).effect("blue") is None  # the half that reads no word
    clear(collection)
    with pytest.raises(KeyboardInterrupt):
        label(collection, model, LabelRun(tmp_path / "killed", checkpoint_interval_s=0), Prompt(dies_at=9))
    assert not (collection / IDS[0].path / TABLE).exists()
    prompts = Prompt()
    label(collection, model, LabelRun(tmp_path / "killed"), prompts)
    assert prompts.asked[0] == 8  # two batches had been counted
    assert_same(whole, made(collection))
    clear(collection)
    main, other = (LabelRun(tmp_path / "shared", rank=rank, world=2) for rank in (0, 1))

    def wait_for_everyone() -> None:
        assert not (collection / IDS[0].path / TABLE).exists()
        label(collection, model, other)
        assert not (collection / IDS[0].path / TABLE).exists()  # the main process alone writes

    label_collection(CONFIG, collection, model, Halves(), Prompt(), main, wait_for_everyone=wait_for_everyone)
    assert_same(whole, made(collection))
    clear(collection)
    with pytest.raises(ValueError, match=r"counts of process 1 are not in .*apart. Processes on several machines need"):
        label(collection, model, LabelRun(tmp_path / "apart", rank=0, world=2))


def updates_of(model: Diffuser, sae_id: SaeId, step: int, prompts: list[str], seeds: list[int]) -> Tensor:
    with record(model, [sae_id.hookpoint], steps=[step]) as recording:
        for _ in model.sample(prompts, seeds=seeds):
            pass
    return recording[ActivationKey(sae_id.hookpoint, sae_id.branch, step)]


def test_the_codes_that_are_counted_are_those_of_the_updates(
    model: Diffuser, collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "spec", replace(model.spec, num_inference_steps=3))
    saes = {sae_id: core.load_sae(collection, *sae_id) for sae_id in IDS}
    prompts, seeds = ["a cat", "a dog"], [5, 6]
    batch = sample_and_encode(model, saes, {IDS[0]: [0, 2], IDS[1]: [1]}, prompts, seeds)
    assert batch.sizes == {MIDDLE: (8, 8), UP: (16, 16)}
    assert [(step_codes.step, step_codes.t) for step_codes in batch.codes_by_step[IDS[0]]] == [(0, 1.0), (1, 0.0)]
    for sae_id, step_codes, step in (
        (IDS[0], batch.codes_by_step[IDS[0]][1], 2),
        (IDS[1], batch.codes_by_step[IDS[1]][0], 1),
    ):
        update = updates_of(model, sae_id, step, prompts, seeds)
        dense = torch.zeros(2, 24, update.shape[2] * update.shape[3])
        latents, values, images, positions = step_codes.entries
        dense[images, latents, positions] = values
        for image in range(2):
            code = saes[sae_id].encode(update[image].flatten(1).T)
            for latent in (0, 7, 23):
                seen = activation_map(code, latent, *update.shape[2:])
                torch.testing.assert_close(dense[image, latent], seen.flatten(), rtol=1e-4, atol=1e-5)
    whole = model.generate("a dog", seed=6, previews=False).image
    assert np.abs(np.asarray(batch.images[1], dtype=int) - np.asarray(whole, dtype=int)).max() <= 2


def test_pictures_that_do_not_fit_together_are_counted_alike(
    model_folder: Path, collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = core.load_model(model_folder, device="cpu")
    monkeypatch.setattr(model, "spec", replace(model.spec, num_inference_steps=3))
    saes = {sae_id: core.load_sae(collection, *sae_id) for sae_id in IDS}
    asked: Any = (saes, {IDS[0]: [0, 2], IDS[1]: [1]}, ["a cat", "a dog", "a ship", "a tree", "a sun"], range(5))
    together = sample_and_encode(model, *asked)
    plain = model.predictor.call

    def predict(x: Tensor, *args: Any) -> Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(x, *args)

    monkeypatch.setattr(model.predictor, "call", predict)
    apart = sample_and_encode(model, *asked)
    assert apart.sizes == together.sizes
    for new, old in zip(apart.images, together.images, strict=True):
        assert np.abs(np.asarray(new, dtype=int) - np.asarray(old, dtype=int)).max() <= 2
    for sae_id in IDS:
        for new, old in zip(apart.codes_by_step[sae_id], together.codes_by_step[sae_id], strict=True):
            assert (new.step, new.t) == (old.step, old.t)
            assert set(new.entries.images.tolist()) == set(range(5))
            for of_new, of_old in zip(new.entries, old.entries, strict=True):
                torch.testing.assert_close(of_new, of_old, rtol=1e-3, atol=1e-4)


def test_an_open_vocabulary_segmenter_gets_the_words_of_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command, "load_open_segmenter", lambda *given, **_: asked.append(given) or Halves())
    monkeypatch.setattr(command, "load_segmenter", lambda *given, **_: asked.append(given) or Halves())
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = ["--segmenter", "clipseg", "--tags", "cat", "sky", "--prompt-words", "1", "--images", "3"]
    command.choose_segmenter(parser.parse_args(words), Prompt())
    command.choose_segmenter(parser.parse_args(["--segmenter", "some/folder"]), Prompt())
    assert asked == [("clipseg", ("cat", "sky", "dog")), ("some/folder",)]


def test_words_that_are_not_given_are_those_of_the_models_recipe() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    own = command.label_config(parser.parse_args([]), BUILT_IN["picturebook"])
    assert {"kitchen", "street", "lake"} <= set(own.backgrounds)  # of the recipe, of both, and of the tags
    assert "watercolour" in own.styles
    assert "hound" in own.words["dog"]
    assert own.backgrounds == (*PicturebookLabels().backgrounds, *BACKGROUND_TAGS)
    assert {name: tuple(words) for name, words in own.words.items()} == PicturebookLabels().words
    other = command.label_config(parser.parse_args(["--styles", "photo"]), BUILT_IN["sd-v1-4"])
    assert (other.backgrounds, other.styles, dict(other.words)) == (BACKGROUND_TAGS, ("photo",), {})


def test_mistakes_are_reported_before_anything_is_generated(model: Diffuser, collection: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even and at least 4"):
        LabelConfig(batch=5)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="There is no SAE in"):
        label(tmp_path / "none", model, LabelRun(tmp_path))
    with pytest.raises(ValueError, match=r"5 processes cannot share 4 batches\. Start at most 4"):
        label(collection, model, LabelRun(tmp_path / "run", rank=4, world=5))
    recipe = Labeller(CONFIG, collection, model, Halves(), Prompt()).recipe({"model": "another"})
    save_checkpoint(tmp_path / "run" / "0-of-1", Checkpoint(1, {**recipe, "rank": 0}, {"state": {}}))
    with pytest.raises(ValueError, match="model was another, now None"):
        label(collection, model, LabelRun(tmp_path / "run"))
