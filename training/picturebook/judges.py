"""Judges of pictures: a segmenter of things and places, and a classifier of styles, trained on painted scenes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from training.loop import Batch
from training.picturebook.autoencoder import to_pixels
from training.picturebook.backgrounds import SIZE
from training.picturebook.captions import Split
from training.picturebook.scenes import make_scene, paint
from training.picturebook.world import LABELS, STYLES


@dataclass(frozen=True)
class JudgeConfig:
    """Shapes of the two judges."""

    hidden_sizes: tuple[int, ...] = (32, 64, 112, 160)
    """Channels of the segmenter at 32, 16, 8 and 4 cells."""
    depths: tuple[int, ...] = (1, 1, 1, 1)
    """Its layers at each."""
    decoder_size: int = 96
    """Channels in which it joins the four."""
    style_sizes: tuple[int, ...] = (24, 48, 96)
    """Channels of the style classifier at 32, 16 and 8 cells."""


def build_segmenter(config: JudgeConfig) -> SegformerForSemanticSegmentation:
    """An untrained segmenter: pictures [B, 3, 128, 128] in -1..1 to logits [B, labels, 32, 32]."""
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=list(config.hidden_sizes),
            depths=list(config.depths),
            num_attention_heads=[1, 2, 4, 4],
            decoder_hidden_size=config.decoder_size,
            num_labels=len(LABELS),
            id2label=dict(enumerate(LABELS)),
            label2id={label: i for i, label in enumerate(LABELS)},
        )
    )


def build_style_classifier(config: JudgeConfig) -> ResNetForImageClassification:
    """An untrained classifier: pictures [B, 3, 128, 128] in -1..1 to logits [B, styles]."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=config.style_sizes[0],
            hidden_sizes=list(config.style_sizes),
            depths=[1] * len(config.style_sizes),
            layer_type="basic",
            num_labels=len(STYLES),
            id2label=dict(enumerate(STYLES)),
            label2id={style: i for i, style in enumerate(STYLES)},
        )
    )


def make_scenes(number: int, n: int, split: Split = "train") -> Batch:
    """Batch `number` of `n` scenes: pixels, label maps and styles."""
    scenes = [make_scene(number * n + i, split) for i in range(n)]
    paintings = [paint(scene) for scene in scenes]
    return {
        "pixels": to_pixels(np.stack([painting.image for painting in paintings])),
        "labels": torch.from_numpy(np.stack([painting.labels for painting in paintings])).long(),
        "styles": torch.tensor([STYLES.index(scene.story.style) for scene in scenes]),
    }


class JudgesLoss(nn.Module):
    """Cross-entropies of the segmenter and of the style classifier, which share their scenes and nothing else."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.segmenter = build_segmenter(config)
        self.style_classifier = build_style_classifier(config)

    def forward(self, pixels: Tensor, labels: Tensor, styles: Tensor) -> Tensor:
        """Loss of pictures [B, 3, H, W], label maps [B, H, W] and styles [B]."""
        logits = segment_logits(self.segmenter, pixels, labels.shape[-1] // 2)
        halves = labels[:, ::2, ::2]
        segmentation = F.cross_entropy(logits.float(), halves)
        style = F.cross_entropy(self.style_classifier(pixels).logits.float(), styles)
        return segmentation + style


def segment_logits(segmenter: SegformerForSemanticSegmentation, pixels: Tensor, size: int) -> Tensor:
    """Logits [B, labels, size, size] of pictures [B, 3, H, W]."""
    logits: Tensor = segmenter(pixels).logits
    return F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)


class JudgesTask:
    """Training of the two judges."""

    name = "judges"

    def __init__(self, config: JudgeConfig, n_held_out: int) -> None:
        self.n_held_out = n_held_out
        self.model: nn.Module = JudgesLoss(config)

    def batch_maker(self, n: int) -> Callable[[int], Batch]:
        """Batches of scenes."""
        return partial(make_scenes, n=n)

    def show(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Mean IoU and style accuracy on held-out scenes; a sheet of scenes with what the segmenter sees."""
        assert isinstance(model, JudgesLoss)
        device = next(model.parameters()).device
        counts, correct, shown = torch.zeros(len(LABELS), 3, dtype=torch.double), 0, []
        for number in range(self.n_held_out // 32):
            batch = {key: value.to(device) for key, value in make_scenes(number, 32, "test").items()}
            seen = segment_logits(model.segmenter, batch["pixels"], SIZE).argmax(1)
            counts += overlap(seen, batch["labels"]).cpu()
            correct += int((model.style_classifier(batch["pixels"]).logits.argmax(-1) == batch["styles"]).sum())
            if number < 8:
                shown.append((batch["pixels"][:2].cpu(), seen[:2].cpu()))
        _sheet(torch.cat([p for p, _ in shown]), torch.cat([s for _, s in shown])).save(path, quality=90)
        return {"mean_iou": mean_iou(counts), "style_accuracy": correct / self.n_held_out}


def overlap(seen: Tensor, true: Tensor) -> Tensor:
    """Pixels of each label in both maps, in the first, and in the second, [labels, 3]."""
    n = len(LABELS)
    joint = torch.bincount((true * n + seen).flatten(), minlength=n * n).view(n, n).double()
    return torch.stack([joint.diagonal(), joint.sum(0), joint.sum(1)], dim=1)


def mean_iou(counts: Tensor) -> float:
    """Mean over labels of intersection over union from `overlap`'s counts, over the labels that occur."""
    union = counts[:, 1] + counts[:, 2] - counts[:, 0]
    return float((counts[:, 0] / union)[union > 0].mean())


def _sheet(pixels: Tensor, seen: Tensor) -> Image.Image:
    """Scenes above their label maps, one colour a label."""
    colours = (np.random.default_rng(0).uniform(40, 255, (len(LABELS), 3))).astype(np.uint8)
    top = ((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).movedim(1, -1).numpy()
    rows = [np.concatenate(list(part), axis=1) for part in (top, colours[seen.numpy()])]
    return Image.fromarray(np.concatenate(rows, axis=0))
