"""What is where in a picture: masks and scores of named classes, from a segmenter behind an interface of two methods.

The segmenters of `picturebook` are embedded. Any folder with a semantic segmentation model of transformers and its
class names works alike, as long as it takes RGB in -1..1. For real pictures and classes of one's own:
`core.segmentation.open_vocabulary`.
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
    """Masks of a batch of pictures, on the segmenter's device."""

    masks: Tensor
    """[N, K, H, W] bool, at the pictures' size; masks of different classes may overlap."""
    scores: Tensor
    """[N, K] confidence in each class's mask from 0 to 1; 0 where its mask is empty."""

    def label_map(self) -> Tensor:
        """[N, H, W] index of each pixel's class, of the better score where masks overlap; -1 where there is none."""
        best = torch.full_like(self.masks[:, 0], -1.0, dtype=self.scores.dtype)
        labels = torch.full_like(self.masks[:, 0], -1, dtype=torch.int64)
        for which, score in enumerate(self.scores.T):  # one by one: there may be a hundred classes in large pictures
            better = self.masks[:, which] & (score[:, None, None] > best)
            best = torch.where(better, score[:, None, None], best)
            labels = labels.masked_fill(better, which)
        return labels


class Segmenter(Protocol):
    """Finds classes in pictures. What it finds in one does not depend on which others are in the batch."""

    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes, in the order of the masks."""
        ...

    def segment(self, images: Sequence[Image.Image]) -> Segmentation:
        """Masks and scores of pictures that all have one size."""
        ...


class SemanticSegmenter:
    """A semantic segmentation model of transformers: every pixel belongs to one class.

    A class's score is its mean probability over its mask.
    """

    def __init__(self, model: Any) -> None:
        """Wrap a model whose `config.id2label` names its classes: pixels [N, 3, H, W] in -1..1 to `logits`."""
        self._model = model.eval().requires_grad_(False)
        names = model.config.id2label
        self._names = tuple(str(names[i]) for i in range(len(names)))

    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes, in the order of the masks."""
        return self._names

    @torch.no_grad()
    def segment(self, images: Sequence[Image.Image]) -> Segmentation:
        """Masks and scores of pictures that all have one size.

        Raises:
            ImageError: No pictures, or pictures of several sizes.
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
    """Load an embedded segmenter, or the folder of a transformers model, whatever its architecture.

    Args:
        source: `picturebook`, or a folder.
        which: Of the embedded ones. They are of different architectures: what one has labelled the other can judge.
        device: Defaults to CUDA where there is one.

    Raises:
        ModelError: No such folder, or one without a whole semantic segmentation model in safetensors.
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
    if found["missing_keys"]:  # transformers would make them up
        raise ModelError(
            f"{folder} is no whole segmenter; it lacks {sorted(found['missing_keys'])[0]!r} and perhaps more."
        )
    place = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    return SemanticSegmenter(model.to(place))


def common_size(images: Sequence[Image.Image]) -> tuple[int, int]:
    """Width and height of some pictures.

    Raises:
        ImageError: There are none, or they have several.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        told = " and ".join(f"{width} x {height}" for width, height in sorted(sizes)) or "none"
        raise ImageError(f"Pictures of one size are needed; their sizes: {told}.")
    return sizes.pop()


def _to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as [N, 3, H, W] in -1..1."""
    common_size(images)
    values = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(values).permute(0, 3, 1, 2).float() / 127.5 - 1
