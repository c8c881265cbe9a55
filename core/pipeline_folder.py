"""The files of a pipeline's folder: which are read, whether they are whole, and of which kind of model they are.

Imports no torch and reads no weights, only the headers of their files.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core.components import check_autoencoder, check_components, latent_side
from core.errors import ModelError

WEIGHTS = ("unet", "vae", "text_encoder")
"""Components of a StableDiffusionPipeline whose weights are used here."""
INDEX = "model_index.json"
"""Names the components of a pipeline and their classes."""

_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""Classes of components that can be used."""
_SAVE = "`pipeline.save_pretrained(folder, safe_serialization=True)`"
_FAMILY = "What is needed is a StableDiffusionPipeline, such as Stable Diffusion 1 or 2"
_FILE = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<before>[\w-]+?))?(?:-(?P<shard>\d{5})-of-(?P<n>\d{5}))?"
    r"(?:\.(?P<after>\w+))?\.safetensors"
)
_HALF = ("fp16", "bf16")
_POINTER = b"version https://git-lfs.github.com/spec/"
_SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx")
_MAX_HEADER = 10**8
"""Bytes; the safetensors library reads no longer header."""


def check_model_name(name: str | Path) -> None:
    """Refuse the name of a single file, or an address, where a folder or `owner/name` is needed.

    Raises:
        ModelError: It is one; the message says how to make a folder of it.
    """
    text = str(name)
    if re.match(r"https?://", text):
        match = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", text)
        wanted = f"{match[1]!r}" if match else "`owner/name`"
        raise ModelError(f"{text!r} is an address; a model on the Hub is named {wanted}, or {wanted} with `@revision`.")
    if text.endswith(_SINGLE) or Path(text).expanduser().is_file():
        there = "" if Path(text).expanduser().is_file() else " (and there is no such file)"
        pickle = "" if text.endswith((".safetensors", ".gguf", ".onnx")) else ", a pickle that is never loaded here"
        raise ModelError(
            f"{text} is a single-file checkpoint{pickle}{there}; a model is a folder with {INDEX} and a folder for "
            f"each component. Convert it once with diffusers: {_converted(text)}, and load that folder."
        )


def choose_variants(files: Iterable[str], *, prefer_half: bool) -> dict[str, str | None]:
    """The variant of weights to read of each component, as diffusers names them: `fp16`, ..., or None for plain files.

    A component without any weights is left out. Variants may differ between components.

    Args:
        files: Paths in the repository or folder, such as `unet/diffusion_pytorch_model.fp16.safetensors`.
        prefer_half: Whether half precision is read where there are both; otherwise only if there is nothing else.
    """
    order = ("fp16", "bf16", None) if prefer_half else (None, "bf16", "fp16")

    def rank(variant: str | None) -> tuple[int, str]:
        if variant in order:
            return order.index(variant) + (variant in _HALF and not prefer_half), ""
        return (len(order), variant or "") if prefer_half else (1, variant or "")  # another model, such as non_ema

    return {part: min(variants, key=rank) for part, variants in _variants(files).items()}


def is_of_variant(file: str, variants: dict[str, str | None]) -> bool:
    """Whether a file holds weights of one of the chosen variants."""
    part, variant = _parsed(file)
    return bool(part) and part in variants and variants[part] == variant


def check_configs(folder: Path, otherwise: str | None = None) -> None:
    """Check what a folder's JSON files say: that it is a pipeline of a kind that can be used, with parts that fit.

    Args:
        folder: The pipeline's folder; it may lack the weights.
        otherwise: What is said of a folder without an index.

    Raises:
        ModelError: It is none; the message says what was found, what is needed and how to get there.
    """
    index = folder / INDEX
    if not index.is_file():
        single = next((path for path in sorted(folder.glob("*")) if path.suffix in _SINGLE), None)
        hint = f" If {single.name} is a whole model, convert it once: {_converted(str(single))}." if single else ""
        said = otherwise or f"{folder} is not a StableDiffusionPipeline folder."
        raise ModelError(f"{said} (There is no {index}.){hint}")
    components = _read_json(index)
    kind = components.get("_class_name", "pipeline without a class")
    if _names(components, "transformer") or _names(components, "prior"):
        raise ModelError(f"{folder} is a {kind}: it does not draw with a U-Net alone. {_FAMILY}.")
    if _names(components, "text_encoder_2") or _names(components, "tokenizer_2"):
        raise ModelError(f"{folder} is a {kind}, which has two text encoders, as Stable Diffusion XL. {_FAMILY}.")
    for part in ("tokenizer", "scheduler", *WEIGHTS):
        found = _names(components, part)
        if not found or not (folder / part).is_dir():
            raise ModelError(
                f"{folder} has no {part!r}, which a StableDiffusionPipeline needs. Save the whole pipeline with "
                f"{_SAVE}."
            )
        if part == "vae":
            check_autoencoder(found)
        if part in _CLASSES and found not in _CLASSES[part]:
            needed = " or ".join(_CLASSES[part])
            raise ModelError(f"{folder} is a {kind} whose {part!r} is a {found}; {needed} is needed. {_FAMILY}.")
    configs = {part: _read_json(folder / part / "config.json") for part in WEIGHTS}
    _read_json(folder / "scheduler" / "scheduler_config.json")
    _check_tokenizer(folder / "tokenizer")
    check_components(configs["unet"], configs["vae"], configs["text_encoder"])
    latent_side(configs["unet"].get("sample_size"))


def weights_of(folder: Path) -> list[str]:
    """The weights files of the components, as paths from the folder; Git LFS pointers only if there is nothing else.

    Raises:
        ModelError: A component has none.
    """
    files: list[str] = []
    for part in WEIGHTS:
        names = sorted(path.name for path in (folder / part).iterdir())
        own = [f"{part}/{name}" for name in names if _FILE.fullmatch(name)]
        if not own:
            pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
            found = f"only {pickles[0]}, a pickle, which could run code when it is loaded" if pickles else "no weights"
            raise ModelError(f"{folder / part} has {found}. Save the pipeline as safetensors with {_SAVE}.")
        files += [file for file in own if not _is_pointer(folder / file)] or own
    return files


def check_weights(folder: Path, files: Iterable[str]) -> None:
    """Check that weights files are whole: no Git LFS pointers, nothing cut short, all shards.

    Raises:
        ModelError: One is not.
    """
    for file in files:
        _check_safetensors(folder / file)
        match = _FILE.fullmatch(file.rpartition("/")[2])
        if match and match["shard"]:
            first, _, last = file.rpartition(match["shard"] + "-of-")
            every = [f"{first}{i:05d}-of-{last}" for i in range(1, int(match["n"]) + 1)]
            missing = [name for name in every if not (folder / name).exists()]
            if missing:
                raise ModelError(
                    f"{folder} lacks {missing[0]}, one of {int(match['n'])} parts of its weights. {_AGAIN}"
                )


_AGAIN = "Download or copy it again, as with `hf download owner/name --local-dir folder`."


def _parsed(file: str) -> tuple[str, str | None]:
    part, _, name = file.rpartition("/")
    match = _FILE.fullmatch(name)
    return (part, match["before"] or match["after"]) if match and part in WEIGHTS else ("", None)


def _variants(files: Iterable[str]) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for part, variant in map(_parsed, files):
        if part:
            found.setdefault(part, set()).add(variant)
    return found


def _names(components: dict[str, Any], part: str) -> str:
    """The class of a component; empty where the index names none."""
    pair = components.get(part)
    return str(pair[1]) if isinstance(pair, list) and len(pair) == 2 and pair[1] else ""


def _converted(path: str) -> str:
    return f"`StableDiffusionPipeline.from_single_file({path!r}).save_pretrained(folder, safe_serialization=True)`"


def _check_tokenizer(folder: Path) -> None:
    names = ("tokenizer.json", "vocab.json", "merges.txt")
    there = [name for name in names if (folder / name).is_file()]
    for name in there:
        _refuse_pointer(folder / name)
    if "tokenizer.json" not in there and there != ["vocab.json", "merges.txt"]:
        raise ModelError(
            f"{folder} has neither tokenizer.json nor vocab.json with merges.txt. Save the tokenizer again with "
            f"`pipeline.tokenizer.save_pretrained(folder)`."
        )
    for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _read_json(folder / name)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"There is no {path}. Save the pipeline again with {_SAVE}.")
    _refuse_pointer(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}); it may be cut short. {_AGAIN}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is not a JSON object. Save the pipeline again.")
    return values


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _refuse_pointer(path: Path) -> None:
    if _is_pointer(path):
        size = re.search(r"^size (\d+)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        real = f" of {int(size[1]) / 1e6:.0f} MB" if size else ""
        raise ModelError(
            f"{path} is a Git LFS pointer in place of a file{real}: the repository was cloned without its large files. "
            f"Run `git lfs pull` in it, or `hf download owner/name --local-dir folder`."
        )


def _check_safetensors(path: Path) -> None:
    """The header is read: its length, then JSON that says where each tensor ends."""
    _refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        n_header = int.from_bytes(start, "little")
        text = file.read(n_header) if len(start) == 8 and n_header <= min(size, _MAX_HEADER) else b""
    try:
        header = json.loads(text.decode("utf-8"))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        wanted = 8 + n_header + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path} is damaged, cut short or no safetensors file: it has {size} bytes, and its header cannot be read. "
            f"{_AGAIN}"
        ) from error
    if wanted != size:
        state = "cut short" if size < wanted else "damaged"
        raise ModelError(f"{path} is {state}: it has {size} bytes and its header names {wanted}. {_AGAIN}")
