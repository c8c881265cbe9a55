"""Judges of images, trained on painted scenes: two segmenters of objects and backgrounds, and a style classifier.

The second segmenter has another architecture: labels come from one and scores from the other, so that no result depends
on the biases of a single network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

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
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from training.picturebook.models.autoencoder import to_pixels
from training.picturebook.models.loop import Batch
from training.picturebook.world.backgrounds import SIZE
from training.picturebook.world.captions import Split
from training.picturebook.world.scenes import Scene, crowd, make_scene, paint
from training.picturebook.world.world import LABELS, STYLES

Segmenter: TypeAlias = SegformerForSemanticSegmentation | UperNetForSemanticSegmentation


@dataclass(frozen=True)
class JudgeConfig:
    """Shapes of the three judges."""

    hidden_sizes: tuple[int, ...] = (32, 64, 128, 192)
    """Channels of the segmenter, a transformer, at 32, 16, 8 and 4 cells."""
    depths: tuple[int, ...] = (1, 2, 2, 2)
    """Its layers at each resolution."""
    decoder_size: int = 96
    """Channels of its decoder."""
    second_sizes: tuple[int, ...] = (24, 48, 96, 160)
    """Channels of the second segmenter, a convolutional network, at 32, 16, 8 and 4 cells."""
    second_depths: tuple[int, ...] = (1, 1, 2, 1)
    """Its layers at each resolution."""
    second_decoder_size: int = 48
    """Channels of its feature pyramid."""
    style_sizes: tuple[int, ...] = (24, 48, 96)
    """Channels of the style classifier at 32, 16 and 8 cells."""


_LABELS = {
    "num_labels": len(LABELS),
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: i for i, label in enumerate(LABELS)},
}


def build_segmenter(config: JudgeConfig) -> SegformerForSemanticSegmentation:
    """An untrained segmenter: images [B, 3, 128, 128] in -1..1 to logits [B, labels, 32, 32]."""
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=list(config.hidden_sizes),
            depths=list(config.depths),
            num_attention_heads=[1, 2, 4, 4],
            decoder_hidden_size=config.decoder_size,
            # Scenes never repeat: there is nothing to overfit.
            classifier_dropout_prob=0.0,
            # Its fused form has the slower backward pass on a CPU.
            attn_implementation="eager",
            **_LABELS,
        )
    )


def build_second_segmenter(config: JudgeConfig) -> UperNetForSemanticSegmentation:
    """An untrained segmenter: images [B, 3, 128, 128] in -1..1 to logits [B, labels, 128, 128]."""
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=ResNetConfig(
                embedding_size=config.second_sizes[0],
                hidden_sizes=list(config.second_sizes),
                depths=list(config.second_depths),
                layer_type="basic",
                out_features=[f"stage{i + 1}" for i in range(len(config.second_sizes))],
            ),
            hidden_size=config.second_decoder_size,
            pool_scales=[1, 2],
            use_auxiliary_head=False,
            **_LABELS,
        )
    )


def build_style_classifier(config: JudgeConfig) -> ResNetForImageClassification:
    """An untrained classifier: images [B, 3, 128, 128] in -1..1 to logits [B, styles]."""
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
    batch = _paint([make_scene(number * n + i, split) for i in range(n)])
    return {"pixels": to_pixels(batch.pop("images")), **batch, "labels": batch["labels"].long()}


def make_training_scenes(number: int, n: int) -> Batch:
    """Batch `number` of `n` training scenes: with more objects than captions name, and half of them to be blurred."""
    generator = torch.Generator().manual_seed(number)
    softness = (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1).clamp(min=0)
    return {**_paint([crowd(make_scene(number * n + i), n=i % 5) for i in range(n)]), "softness": softness}


def _paint(scenes: list[Scene]) -> Batch:
    """Images [B, H, W, 3] and label maps [B, H, W] in bytes, which processes hand over quickly, and styles [B]."""
    paintings = [paint(scene) for scene in scenes]
    return {
        "images": torch.from_numpy(np.stack([painting.image for painting in paintings])),
        "labels": torch.from_numpy(np.stack([painting.labels for painting in paintings])),
        "styles": torch.tensor([STYLES.index(scene.story.style) for scene in scenes]),
    }


def soften(pixels: Tensor, softness: Tensor) -> Tensor:
    """Images [B, 3, H, W], each blurred by so much [B, 1, 1, 1], from 0 to 1: judged images have gone through an
    autoencoder.
    """
    padded = F.pad(pixels, (2, 2, 2, 2), mode="reflect")
    blurred = F.avg_pool2d(F.avg_pool2d(padded, 3, stride=1), 3, stride=1)
    return torch.lerp(pixels, blurred, softness)


class JudgesLoss(nn.Module):
    """Sum of the three judges' cross-entropies; they share their scenes and nothing else."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.segmenter = build_segmenter(config)
        self.second_segmenter = build_second_segmenter(config)
        self.style_classifier = build_style_classifier(config)

    def forward(self, images: Tensor, labels: Tensor, styles: Tensor, softness: Tensor) -> Tensor:
        """Loss of images [B, H, W, 3] and label maps [B, H, W] in bytes, styles [B], and softness [B, 1, 1, 1]."""
        pixels = soften(to_pixels(images), softness)
        centres = labels[:, 2::4, 2::4].long()
        loss = F.cross_entropy(self.style_classifier(pixels).logits.float(), styles)
        for segmenter in (self.segmenter, self.second_segmenter):
            loss = loss + F.cross_entropy(segment_logits(segmenter, pixels, centres.shape[-1]).float(), centres)
        return loss


def segment_logits(segmenter: Segmenter, pixels: Tensor, size: int) -> Tensor:
    """Logits [B, labels, size, size] of images [B, 3, H, W]."""
    logits: Tensor = segmenter(pixels).logits
    if logits.shape[-1] == size:
        return logits
    return F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)


class JudgesTask:
    """The training task of the three judges."""

    name = "judges"
    draws_on_device = False
    compiled: Sequence[nn.Module] = ()

    def __init__(self, config: JudgeConfig, n_held_out: int) -> None:
        self.n_held_out = n_held_out
        self.model: nn.Module = JudgesLoss(config)

    def batch_maker(self, n: int) -> Callable[[int], Batch]:
        """Batches of scenes."""
        return partial(make_training_scenes, n=n)

    def show(self, model: nn.Module, path: Path) -> dict[str, float]:
        """Mean IoUs and style accuracy on held-out scenes; a sheet of scenes with both segmentations."""
        assert isinstance(model, JudgesLoss)
        device = next(model.parameters()).device
        segmenters: tuple[Segmenter, ...] = (model.segmenter, model.second_segmenter)
        counts = [torch.zeros(len(LABELS), 3, dtype=torch.double) for _ in segmenters]
        correct, shown = 0, []
        for number in range(self.n_held_out // 32):
            batch = {key: value.to(device) for key, value in make_scenes(number, 32, "test").items()}
            seen = [segment_logits(segmenter, batch["pixels"], SIZE).argmax(1) for segmenter in segmenters]
            for count, labels in zip(counts, seen, strict=True):
                count += overlap(labels, batch["labels"]).cpu()
            correct += int((model.style_classifier(batch["pixels"]).logits.argmax(-1) == batch["styles"]).sum())
            if number < 8:
                shown.append([batch["pixels"][:2].cpu(), *(labels[:2].cpu() for labels in seen)])
        _sheet(*(torch.cat(parts) for parts in zip(*shown, strict=True))).save(path, quality=90)
        first, second = (mean_iou(count) for count in counts)
        return {"mean_iou": first, "second_mean_iou": second, "style_accuracy": correct / self.n_held_out}


def overlap(seen: Tensor, true: Tensor) -> Tensor:
    """Pixels of each label in both maps, in the first, and in the second, [labels, 3]."""
    n = len(LABELS)
    joint = torch.bincount((true * n + seen).flatten(), minlength=n * n).view(n, n).double()
    return torch.stack([joint.diagonal(), joint.sum(0), joint.sum(1)], dim=1)


def mean_iou(counts: Tensor) -> float:
    """Mean over labels of intersection over union from `overlap`'s counts, over the labels that occur."""
    union = counts[:, 1] + counts[:, 2] - counts[:, 0]
    return float((counts[:, 0] / union)[union > 0].mean())


def _sheet(pixels: Tensor, *seen: Tensor) -> Image.Image:
    """Scenes above their label maps, one colour per label."""
    colours = (np.random.default_rng(0).uniform(40, 255, (len(LABELS), 3))).astype(np.uint8)
    top = ((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).movedim(1, -1).numpy()
    rows = [np.concatenate(list(part), axis=1) for part in (top, *(colours[labels.numpy()] for labels in seen))]
    return Image.fromarray(np.concatenate(rows, axis=0))
