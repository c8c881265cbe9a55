"""Semantic segmentation: masks and scores of named classes, behind an interface of two methods.

The segmenters of `picturebook` come with this package. Any folder with a semantic segmentation model of transformers
and class names in its config works as well, provided that it takes RGB in -1..1. For real images and classes of your
own, see `core.segmentation.open_vocabulary`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core.errors import ImageError, ModelError
from core.spec import BUILT_IN


class Segmentation(NamedTuple):
    """Masks of a batch of images, on the segmenter's device."""

    masks: Tensor
    """[N, K, H, W] bool, at the size of the images; masks of different classes may overlap."""
    scores: Tensor
    """[N, K] confidence in each mask, from 0 to 1; 0 where the mask is empty."""

    def label_map(self) -> Tensor:
        """[N, H, W] class index of each pixel, by score where masks overlap; -1 for none."""
        best = torch.full_like(self.masks[:, 0], -1.0, dtype=self.scores.dtype)
        labels = torch.full_like(self.masks[:, 0], -1, dtype=torch.int64)
        for which, score in enumerate(self.scores.T):  # a loop, for memory: a hundred classes in large images
            better = self.masks[:, which] & (score[:, None, None] > best)
            best = torch.where(better, score[:, None, None], best)
            labels = labels.masked_fill(better, which)
        return labels


class Segmenter(Protocol):
    """Finds classes in images. The result for an image does not depend on the others in the batch."""

    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes, in the order of the masks."""
        ...

    def segment(self, images: Sequence[Image.Image]) -> Segmentation:
        """Masks and scores of images of one size."""
        ...


class SemanticSegmenter:
    """A semantic segmentation model of transformers, which gives every pixel one class.

    The score of a class is its mean probability over its mask.
    """

    def __init__(self, model: Any) -> None:
        """Wrap a model that maps pixels [N, 3, H, W] in -1..1 to `logits`, with class names in `config.id2label`."""
        self._model = model.eval().requires_grad_(False)
        names = model.config.id2label
        self._names = tuple(str(names[i]) for i in range(len(names)))

    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes, in the order of the masks."""
        return self._names

    @torch.no_grad()
    def segment(self, images: Sequence[Image.Image]) -> Segmentation:
        """Masks and scores of images of one size.

        Raises:
            ImageError: No images, or images of several sizes.
        """
        pixels = _to_pixels(images).to(self._model.device, self._model.dtype)
        logits = self._model(pixels).logits.float()
        if logits.shape[-2:] != pixels.shape[-2:]:
            logits = F.interpolate(logits, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
        probabilities = logits.softmax(dim=1)
        classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
        masks = logits.argmax(dim=1, keepdim=True) == classes
        areas = masks.sum((2, 3)).clamp(min=1)
        return Segmentation(masks, (probabilities * masks).sum((2, 3)) / areas)


def load_segmenter(
    source: str | Path = "picturebook",
    *,
    which: Literal["segmenter", "second_segmenter"] = "segmenter",
    device: str | torch.device | None = None,
) -> SemanticSegmenter:
    """Load a built-in model's segmenter, or any semantic segmentation model of transformers from a folder.

    Args:
        source: `picturebook`, or a folder.
        which: One of the two built-in segmenters, whose architectures differ, so that one can judge the other.
        device: Defaults to CUDA if available.

    Raises:
        ModelError: No such folder, or no complete semantic segmentation model with safetensors weights in it.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForSemanticSegmentation

    spec = BUILT_IN.get(str(source))
    assets = None if spec is None else spec.assets
    folder = Path(source).expanduser() if assets is None else assets / which
    if not (folder / "config.json").is_file():
        remedy = "" if assets is None else f" Make it with `python -m training {source}`."
        raise ModelError(f"There is no segmenter in {folder}: it has no config.json.{remedy}")
    try:
        model, found = AutoModelForSemanticSegmentation.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"The segmenter in {folder} could not be loaded: {error}\nIt has to be a semantic segmentation model of "
            f"transformers with safetensors weights."
        ) from error
    if found["missing_keys"]:  # transformers would initialise them at random
        raise ModelError(
            f"The segmenter in {folder} is incomplete: it lacks {sorted(found['missing_keys'])[0]!r} and perhaps more."
        )
    device = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    return SemanticSegmenter(model.to(device))


def common_size(images: Sequence[Image.Image]) -> tuple[int, int]:
    """Width and height that all images have.

    Raises:
        ImageError: There are no images, or their sizes differ.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        found = " and ".join(f"{width} x {height}" for width, height in sorted(sizes)) or "none"
        raise ImageError(f"Images of one size are needed; their sizes: {found}.")
    return sizes.pop()


def _to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images as [N, 3, H, W] in -1..1."""
    common_size(images)
    values = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float() / 127.5 - 1
