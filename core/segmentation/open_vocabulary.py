"""Open-vocabulary segmentation of real images, for any named classes, with models of transformers.

`grounded`: Grounding DINO detects boxes of the classes, and SAM (or SAM 2, whose processor needs torchvision) turns
each box into a mask. `clipseg`: CLIPSeg, one small model that scores every pixel for every class.
"""

import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core.diffusion.text import distinct_words
from core.errors import ModelError
from core.segmentation.semantic import Segmentation, common_size

OpenKind = Literal["grounded", "clipseg"]
"""Which models are used."""
OPEN_KINDS: tuple[OpenKind, ...] = get_args(OpenKind)

DETECTOR, CLIPSEG = "IDEA-Research/grounding-dino-tiny", "CIDAS/clipseg-rd64-refined"
SAM, SAM2 = "facebook/sam-vit-base", "facebook/sam2.1-hiera-tiny"

BACKGROUND_TAGS = (
    "sky", "cloud", "sea", "lake", "river", "beach", "grass", "forest", "mountain", "snow", "desert", "street", "road",
    "field", "garden", "wall", "floor", "water",
)  # fmt: skip
"""The tags that are backgrounds; all others are objects."""
TAGS = (
    "person", "face", "hand", "hair", "dress", "hat", "shoe", "cat", "dog", "bird", "horse", "cow", "fish", "bear",
    "elephant", "butterfly", "bee", "tree", "flower", "leaf", "fruit", "apple", "banana", "bread", "cake", "cup",
    "bottle", "plate", "table", "chair", "sofa", "bed", "lamp", "window", "door", "house", "building", "tower",
    "bridge", "boat", "car", "bus", "train", "bicycle", "aeroplane", "phone", "computer", "book", "clock", "ball",
    "toy", "guitar", "statue", "painting", "text", "sun", "moon", "star", "fire", "rock", *BACKGROUND_TAGS,
)  # fmt: skip
"""Classes to look for in every image, in addition to the words of the prompts."""

_FUNCTION_WORDS = frozenset(
    """a about above across after against all along also among an and any are around as at be been before behind
    being below beneath beside between beyond both but by can did do does down during each every few for from had
    has have he her hers him his how i if in inside into is it its just like many me more most much my near no not
    of off on one only onto or other our out outside over own past per she so some such than that the their them
    then there these they this those through to too toward towards two under until up upon us very was we were
    what when where which while who whom whose why will with within without would you your""".split()  # noqa: SIM905
)
_MOST_BOXES = 8
"""The most boxes of a class in an image."""
_SAME_BOX = 0.7
"""Intersection over union above which two boxes of a class are one object; the better one is kept."""


def classes_of(prompts: Iterable[str], tags: Sequence[str] = TAGS, n_words: int = 64) -> tuple[str, ...]:
    """The tags, and the `n_words` most frequent words of the prompts, without function words and numbers.

    Other words than nouns are kept: one that names nothing visible just gets empty masks.
    """
    known = {tag.casefold() for tag in tags}
    counts = Counter(word for prompt in prompts for word in distinct_words(prompt))
    content = [word for word, _ in counts.most_common() if word.isalpha() and len(word) > 1]
    words = [word for word in content if word not in _FUNCTION_WORDS and word not in known]
    return (*dict.fromkeys(tags), *words[:n_words])


class GroundedSegmenter:
    """Boxes by Grounding DINO, masks by SAM. The score of a class is that of its best box; masks may overlap."""

    def __init__(
        self, classes: Sequence[str], detector: Any, words: Any, masker: Any, cutter: Any, *, box_score: float = 0.3
    ) -> None:
        """Wrap the models and their processors.

        Args:
            classes: Names of the classes.
            detector: `GroundingDinoForObjectDetection`.
            words: The processor of the detector.
            masker: `SamModel` or `Sam2Model`.
            cutter: The processor of the masker.
            box_score: Minimum score of a box, from 0 to 1.
        """
        self._names, self._box_score = _checked(classes), box_score
        self._detector, self._words = detector.eval().requires_grad_(False), words
        self._masker, self._cutter = masker.eval().requires_grad_(False), cutter
        self._texts = tuple(_texts(self._names, words.tokenizer, detector.config.max_text_len))

    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes, in the order of the masks."""
        return self._names

    @torch.no_grad()
    def segment(self, images: Sequence[Image.Image]) -> Segmentation:
        """Masks and scores of images of one size.

        Raises:
            ImageError: No images, or images of several sizes.
        """
        width, height = common_size(images)
        device = self._detector.device
        masks = torch.zeros(len(images), len(self._names), height, width, dtype=torch.bool, device=device)
        scores = torch.zeros(len(images), len(self._names), device=device)
        for image, of_image, of_classes in zip(images, masks, scores, strict=True):
            found = self._boxes(image.convert("RGB"))
            if not found:
                continue
            cut = self._cut(image.convert("RGB"), torch.stack([box.corners for box in found]))
            for box, mask in zip(found, cut, strict=True):
                of_image[box.which] |= mask
                of_classes[box.which] = max(float(of_classes[box.which]), box.score)
        return Segmentation(masks, scores * masks.any(3).any(2))

    def _boxes(self, image: Image.Image) -> list["_Box"]:
        """Boxes of all classes in an image, in pixels."""
        found = []
        for text in self._texts:
            inputs = self._words(images=image, text=text.words, return_tensors="pt").to(self._detector.device)
            out = self._detector(**inputs)
            tokens = out.logits[0].sigmoid()  # [queries, tokens]
            of_classes = torch.stack([tokens[:, first:last].mean(1) for first, last in text.spans], dim=1)
            best, which = of_classes.max(1)
            size = torch.tensor([*image.size, *image.size], device=best.device)
            for at in range(len(text.spans)):
                rows = ((which == at) & (best >= self._box_score)).nonzero()[:, 0]
                rows = rows[best[rows].argsort(descending=True)]
                corners = _corners(out.pred_boxes[0, rows]) * size
                found += [_Box(text.first + at, float(best[rows[i]]), corners[i]) for i in _apart(corners)]
        return found

    def _cut(self, image: Image.Image, boxes: Tensor) -> Tensor:
        """[n, H, W] bool masks of the objects in boxes [n, 4]."""
        inputs = self._cutter(images=image, input_boxes=[boxes.tolist()], return_tensors="pt")
        sizes = {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs}
        given = {name: value.to(self._masker.device) for name, value in inputs.items() if name not in sizes}
        given = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
        out = self._masker(**given, multimask_output=False)
        (masks,) = self._cutter.post_process_masks(out.pred_masks.cpu(), **sizes)
        whole: Tensor = masks[:, 0].to(self._detector.device)
        return whole


class ClipSegmenter:
    """CLIPSeg: each pixel gets its most probable class, or none if no class is probable enough.

    The score of a class is its mean probability over its mask.
    """

    def __init__(self, classes: Sequence[str], model: Any, processor: Any, *, probability: float = 0.5) -> None:
        """Wrap a `CLIPSegForImageSegmentation` and its processor; `probability` is the minimum for a class."""
        self._names, self._probability = _checked(classes), probability
        self._model, self._processor = model.eval().requires_grad_(False), processor
        tokens = processor.tokenizer(list(self._names), padding=True, return_tensors="pt").to(model.device)
        given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            self._embeddings = model.get_conditional_embeddings(len(self._names), **given)

    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes, in the order of the masks."""
        return self._names

    @torch.no_grad()
    def segment(self, images: Sequence[Image.Image]) -> Segmentation:
        """Masks and scores of images of one size.

        Raises:
            ImageError: No images, or images of several sizes.
        """
        width, height = common_size(images)
        parts = []
        for image in images:
            logits = F.interpolate(self._logits(image)[None], (height, width), mode="bilinear", align_corners=False)
            probabilities = logits.sigmoid()
            best, labels = probabilities.max(1, keepdim=True)
            classes = torch.arange(len(self._names), device=labels.device)[:, None, None]
            masks = (labels == classes) & (best >= self._probability)
            scores = (probabilities * masks).sum((2, 3)) / masks.sum((2, 3)).clamp(min=1)
            parts.append(Segmentation(masks, scores))
        return Segmentation(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _logits(self, image: Image.Image) -> Tensor:
        """[K, h, w] logits of an image, which is encoded once, whatever the number of classes."""
        pixels = self._processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        seen = self._model.clip.vision_model(
            pixels.to(self._model.device), output_hidden_states=True, interpolate_pos_encoding=True
        )
        layers = [seen.hidden_states[i + 1].expand(len(self._names), -1, -1) for i in self._model.extract_layers]
        logits = self._model.decoder(layers, self._embeddings).logits
        whole: Tensor = logits.view(len(self._names), *logits.shape[-2:])
        return whole


def load_open_segmenter(
    kind: OpenKind,
    classes: Sequence[str],
    *,
    detector: str | Path = DETECTOR,
    masker: str | Path | None = None,
    clipseg: str | Path = CLIPSEG,
    device: str | torch.device | None = None,
) -> GroundedSegmenter | ClipSegmenter:
    """Load an open-vocabulary segmenter from the Hub, or from folders.

    Args:
        kind: `grounded` or `clipseg`.
        classes: Names of the classes, for example from `classes_of`.
        detector: For `grounded`: a Grounding DINO.
        masker: For `grounded`: a SAM or SAM 2; by default SAM 2 if torchvision is installed, otherwise SAM.
        clipseg: For `clipseg`: a CLIPSeg.
        device: Defaults to CUDA if available.

    Raises:
        ModelError: No such kind, or a model that cannot be loaded.
    """
    if kind not in OPEN_KINDS:
        raise ModelError(f"There is no open-vocabulary segmenter {kind!r}; there are {' and '.join(OPEN_KINDS)}.")
    device = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "clipseg":
        return ClipSegmenter(classes, *_load(clipseg, "CLIPSegForImageSegmentation", device))
    has_torchvision = importlib.util.find_spec("torchvision") is not None
    cutting = masker if masker is not None else SAM2 if has_torchvision else SAM
    found = _load(detector, "GroundingDinoForObjectDetection", device)
    return GroundedSegmenter(classes, *found, *_load(cutting, "AutoModelForMaskGeneration", device))


class _Text(NamedTuple):
    """Some of the classes as a text for Grounding DINO."""

    words: str
    """The class names in lower case, each followed by a dot."""
    first: int
    """Index of the first class in it."""
    spans: tuple[tuple[int, int], ...]
    """Token range [start, end) of each class."""


class _Box(NamedTuple):
    """A detected box."""

    which: int
    """Index of its class."""
    score: float
    """Score from 0 to 1."""
    corners: Tensor
    """[4] x and y of the upper left and of the lower right corner, in pixels."""


def _texts(names: Sequence[str], tokenizer: Any, most_tokens: int) -> Iterator[_Text]:
    """All classes, in texts of as many as fit into the model's context."""
    lengths = [len(tokenizer(_spoken(name), add_special_tokens=False)["input_ids"]) for name in names]
    first = 0
    while first < len(names):
        spans, at = [], 1  # leaving room for the start and end tokens
        for length in lengths[first:]:
            if at + length + 2 > most_tokens:
                break
            spans.append((at, at + length))
            at += length + 1
        if not spans:
            raise ModelError(f"The class name {names[first]!r} is too long for the detector.")
        together = names[first : first + len(spans)]
        yield _Text(" ".join(f"{_spoken(name)}." for name in together), first, tuple(spans))
        first += len(spans)


def _spoken(name: str) -> str:
    """A name without the marks that end a phrase."""
    return " ".join(name.lower().replace(".", " ").replace("?", " ").split())


def _corners(boxes: Tensor) -> Tensor:
    """[n, 4] corners, clamped to 0..1, of boxes [n, 4] given by centre, width and height."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=1).clamp(0, 1)


def _apart(corners: Tensor) -> list[int]:
    """Non-maximum suppression: indices of the boxes [n, 4], best first, that are not duplicates of a better one."""
    taken: list[int] = []
    for i, box in enumerate(corners):
        others = corners[taken]
        inside = torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])
        both = inside.clamp(min=0).prod(1)
        either = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - both
        if not bool((both > _SAME_BOX * either).any()):
            taken.append(i)
        if len(taken) == _MOST_BOXES:
            break
    return taken


def _checked(classes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(classes)
    if not names or len(set(names)) < len(names) or not all(_spoken(name) for name in names):
        raise ValueError(f"Classes need distinct, non-empty names, not {', '.join(map(repr, names)) or 'none'}.")
    return names


def _load(source: str | Path, kind: str, device: str | torch.device) -> tuple[Any, Any]:
    """A model of a transformers class and its processor, from a folder or `owner/name[@revision]`."""
    transformers = importlib.import_module("transformers")
    folder = Path(source).expanduser()
    name, _, revision = (str(folder), "", "") if folder.is_dir() else str(source).partition("@")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        processor = transformers.AutoProcessor.from_pretrained(name, **options)
        model, found = getattr(transformers, kind).from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"{source} could not be loaded: {error}\nIt has to be a {kind} of transformers with safetensors weights "
            f"and its processor; SAM 2's needs torchvision."
        ) from error
    if found["missing_keys"]:  # transformers would initialise them at random
        raise ModelError(f"{source} is incomplete: it lacks {sorted(found['missing_keys'])[0]!r} and perhaps more.")
    return model.to(device), processor
