import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from core.errors import ImageError, ModelError
from core.segmentation.semantic import Segmentation, SemanticSegmenter, load_segmenter
from training.picturebook.models.judges import make_scenes, mean_iou, overlap, segment_logits
from training.picturebook.world.world import LABELS
from training.pipeline.run import PACKAGE

NAMES = {0: "cat", 1: "dog", 2: "sea"}


def a_segformer() -> Any:
    torch.manual_seed(0)
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8,
            num_labels=3, id2label=NAMES,
        )
    )  # fmt: skip


def an_upernet() -> Any:
    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=8, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=3,
            id2label=NAMES,
        )
    )  # fmt: skip


def images(n: int, size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]


class Fixed(torch.nn.Module):
    """A model that always gives the same logits, and keeps what it was given."""

    config = SimpleNamespace(id2label=NAMES)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, pixels: Tensor) -> SimpleNamespace:
        self.pixels = pixels
        return SimpleNamespace(logits=self.logits)


def test_masks_and_scores_by_hand() -> None:
    p = torch.tensor([[[0.7, 0.1], [0.5, 0.2]], [[0.2, 0.3], [0.4, 0.7]], [[0.1, 0.6], [0.1, 0.1]]])
    model = Fixed(p.log()[None])
    image = Image.fromarray(np.array([[[0, 255, 51], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], dtype=np.uint8))
    masks, scores = found = SemanticSegmenter(model).segment([image])
    torch.testing.assert_close(model.pixels[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    assert masks[0].int().tolist() == [[[1, 0], [1, 0]], [[0, 0], [0, 1]], [[0, 1], [0, 0]]]
    torch.testing.assert_close(scores, torch.tensor([[0.6, 0.7, 0.6]]))
    assert found.label_map().tolist() == [[[0, 2], [0, 1]]]


def test_a_class_that_is_not_there_scores_nothing() -> None:
    logits = torch.tensor([5.0, 0.0, -5.0])[None, :, None, None].expand(1, 3, 2, 2)
    masks, scores = SemanticSegmenter(Fixed(logits)).segment(images(1, (8, 6)))
    assert masks.shape == (1, 3, 6, 8)  # coarse logits are brought to the image's size, square or not
    assert masks.sum((2, 3)).tolist() == [[48, 0, 0]]
    assert scores[0, 1:].tolist() == [0, 0]


def test_label_maps_of_masks_that_overlap_or_leave_gaps() -> None:
    masks = torch.tensor([[[[1, 1, 0]], [[0, 1, 0]], [[0, 0, 0]]]]).bool()
    assert Segmentation(masks, torch.tensor([[0.5, 0.9, 0.0]])).label_map().tolist() == [[[0, 1, -1]]]
    assert Segmentation(masks, torch.tensor([[0.9, 0.5, 0.0]])).label_map().tolist() == [[[0, 0, -1]]]


@pytest.mark.parametrize("make", [a_segformer, an_upernet])
def test_the_folder_names_the_architecture(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path)
    segmenter = load_segmenter(tmp_path, device="cpu")
    assert type(segmenter._model) is type(model)
    assert segmenter.class_names() == ("cat", "dog", "sea")
    batch = images(3)
    found = segmenter.segment(batch)
    assert found.masks.shape == (3, 3, 64, 64)
    assert bool((found.masks.sum(1) == 1).all())
    alone = segmenter.segment(batch[1:2])
    torch.testing.assert_close(found.scores[1:2], alone.scores)
    assert (found.masks[1:2] == alone.masks).double().mean() > 0.999


@pytest.mark.parametrize("which", ["segmenter", "second_segmenter"])
def test_the_embedded_segmenters_see_what_training_measured(which: Any) -> None:
    if not (PACKAGE / which).exists():
        pytest.skip("not embedded yet")
    segmenter = load_segmenter(which=which)
    assert segmenter.class_names() == LABELS
    batch = make_scenes(3, 16, "test")
    values = ((batch["pixels"] + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
    labels = segmenter.segment([Image.fromarray(value) for value in values]).label_map()
    with torch.no_grad():
        expected = segment_logits(segmenter._model, batch["pixels"], 128).argmax(1)
    assert (labels == expected).double().mean() > 0.999
    assert mean_iou(overlap(labels, batch["labels"])) > 0.2  # one of 38 labels everywhere: 0.003


def test_a_folder_without_a_segmenter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no segmenter in .*missing: it has no config\.json"):
        load_segmenter(tmp_path / "missing")
    torch.manual_seed(0)
    other = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    other.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ModelError, match=r"(?s)classifier could not be loaded.*semantic segmentation model"):
        load_segmenter(tmp_path / "classifier")
    a_segformer().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cut could not be loaded"):
        load_segmenter(tmp_path / "cut")
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps({**config, "depths": [1, 1, 1, 2]}))
    with pytest.raises(ModelError, match=r"is incomplete: it lacks 'segformer\."):
        load_segmenter(tmp_path / "cut")


def test_images_of_several_sizes_are_refused() -> None:
    segmenter = SemanticSegmenter(a_segformer())
    with pytest.raises(ImageError, match="one size are needed; their sizes: 64 x 32 and 64 x 64"):
        segmenter.segment([*images(1), *images(1, (64, 32))])
    with pytest.raises(ImageError, match="their sizes: none"):
        segmenter.segment([])
