from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from PIL import Image

from core.diffusion.diffuser import Diffuser
from core.sae.autoencoder import SaeConfig, SaeId, SparseAutoencoder
from core.sae.io import save_sae
from core.segmentation.semantic import Segmentation
from training.evaluate import run
from training.evaluate.sae import concepts
from training.evaluate.sae.concepts import EVALUATION, ConceptSettings, Cooccurrence
from training.labels.tally import Entries

PROMPTS = ["a cat on the grass", "a dog in the sea", "a whale in the sea", "a house on the moon"]


def entries(*cells: tuple[int, int, int]) -> Entries:
    """(latent, image, position) of active cells."""
    latents, images, positions = torch.tensor(cells).T
    return Entries(latents, torch.ones(len(cells)), images, positions)


def test_cohesion_is_the_share_of_pairs_of_different_images_that_agree() -> None:
    met = Cooccurrence.empty(2, 3)
    classes = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 2]])
    # Latent 0: classes 0, 0, 1 and none in one image, 0 and 2 in the other.
    met.add(entries((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 0), (0, 1, 3), (1, 0, 0)), classes)
    assert met.cells.tolist() == [[3, 1, 1], [1, 0, 0]]
    # Of the 3 x 2 pairs two agree.
    assert float(met.cohesion[0]) == pytest.approx(2 / 6)
    assert not bool(met.enough.any())  # too few cells
    with patch.object(concepts, "MIN_CELLS", 1):
        assert met.enough.tolist() == [True, False]  # one image alone says nothing about others


def test_similarity_is_one_for_the_same_classes_and_zero_for_others() -> None:
    met = Cooccurrence.empty(4, 3)
    met.cells += torch.tensor([[40, 0, 0], [80, 0, 0], [0, 50, 0], [1, 0, 0]])
    torch.testing.assert_close(met.similarity, torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).double())


class Halves:
    """Left halves of images are cats, right halves the sea."""

    def class_names(self) -> tuple[str, ...]:
        return ("cat", "sea")

    def segment(self, images: list[Image.Image]) -> Segmentation:
        masks = torch.zeros(len(images), 2, 128, 128, dtype=torch.bool)
        masks[:, 0, :, :64] = masks[:, 1, :, 64:] = True
        return Segmentation(masks, masks.float().amax((2, 3)))


def table_of(d_sae: int) -> Any:
    rows = [("cat", "object", 0.1, 0.8, 0.2), ("", "unlabelled", 0.2, 0.1, 0.1), ("sea", "background", 0.3, 0.6, 0.4)]
    rows += [("", "unlabelled", 0.0, 0.0, 0.0)] * (d_sae - 3)
    names = ["label", "kind", "firing_rate", "held_out_iou", "chance_iou"]
    frame = pd.DataFrame(rows, columns=names)
    frame["threshold"] = pd.Series([0.0] * d_sae, dtype="float32")
    return SimpleNamespace(frame=frame)


def test_labels_are_counted_and_purity_is_compared_with_chance(model: Diffuser, tmp_path: Path) -> None:
    sae_id = SaeId("mid_block.attentions.0", "cond", "all")
    torch.manual_seed(0)
    sae = SparseAutoencoder(SaeConfig(d_in=32, d_sae=64, k=3))
    save_sae(sae, tmp_path / "saes" / sae_id.path, {}, torch.float32)
    options = run.EvalOptions((), True, tmp_path / "out", (tmp_path / "saes",))
    tiny = replace(EVALUATION, quick=ConceptSettings(n_images=4, times=(1.0, 0.0), batch_size=4))
    with (
        patch.object(run, "open_prompts", lambda *_, **__: SimpleNamespace(prompt=lambda n: PROMPTS[n])),
        patch("core.load_concepts", lambda *_: table_of(64)),
        patch.object(concepts, "load_segmenter", lambda _: Halves()),
    ):
        named, purity = run.evaluate(tiny, model, options)
        before = model.n_unet_calls
        assert [table.markdown() for table in run.evaluate(tiny, model, options)] == [
            table.markdown() for table in (named, purity)
        ]
        assert model.n_unet_calls == before
        with pytest.raises(SystemExit, match="no SAE for all times"):
            run.evaluate(tiny, model, options._replace(saes=(tmp_path / "none",)))
        both = run.evaluate(tiny, model, options._replace(saes=options.saes * 2))
        assert [table.title for table in both] == [f"{table.title}: saes" for table in (named, purity)] * 2
    (row,) = named.rows
    assert row["k"] == "3"
    assert (row["that fire"], row["labelled"], row["different labels"]) == ("3", "67 %", "2")
    assert (row["object"], row["background"], row["unlabelled"], row["held-out IoU"]) == ("1", "1", "1", "0.70")
    assert [row["figure"] for row in purity.rows] == ["cohesion", "similarity"]
    # Masks that are the same in every image cannot tell images apart.
    for row in purity.rows:
        assert row["t = 1.00"] == row["chance, 1.00"] != "too few"


def test_concepts_that_follow_the_masks_are_purer_than_chance() -> None:
    classes = torch.randint(0, 3, (6, 64), generator=torch.Generator().manual_seed(0))
    planted = [(int(classes[b, p]), b, p) for b in range(6) for p in range(64)]
    met, chance = Cooccurrence.empty(3, 3), Cooccurrence.empty(3, 3)
    met.add(entries(*planted), classes)
    chance.add(entries(*planted), classes.roll(1, 0))
    assert met.cohesion.tolist() == [1, 1, 1]
    assert all(0.25 < value < 0.45 for value in chance.cohesion.tolist())
    torch.testing.assert_close(met.similarity, torch.eye(3).double())
    assert float(chance.similarity.min()) > 0.9
