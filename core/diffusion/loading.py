"""Loading a model: its files, precision and device."""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.artifacts import WEIGHTS, find_model, is_local
from core.diffusion.diffuser import Diffuser
from core.errors import ModelError
from core.hardware.memory import DEFAULT_LIMIT, GIB
from core.spec import BUILT_IN, ModelSpec

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

log = logging.getLogger(__name__)

WORKING_BYTES = 3 * GIB
"""GPU memory that must be free beyond the weights, or parts of the model are offloaded: for activations, and in a
measurement for a U-Net in float32 (1.6 GiB more on SD v1.4, with one latent at a time if need be)."""

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that a model can compute in."""
_INDEX = "model_index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HALF = re.compile(r"\.fp16(-\d+-of-\d+)?\.safetensors$")
_PLAIN = re.compile(r"/[^.]+\.safetensors$")


def load_model(
    name: str | Path | ModelSpec = "picturebook",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    hookpoints: Sequence[str] | None = None,
    offload: bool | None = None,
    text_device: str | torch.device | None = None,
    memory_gib: float = DEFAULT_LIMIT / GIB,
) -> Diffuser:
    """Load a model: built in, a folder of a StableDiffusionPipeline, or a repository on the Hub.

    Args:
        name: Name of a built-in model, path of a folder, `owner/name@revision`, or a `ModelSpec`.
        device: Where it computes; defaults to CUDA where there is one.
        dtype: What it computes in, such as `"bfloat16"`; by default float16 for a large model on CUDA, else float32.
            Measurements depend on differences of predictions, which half precision rounds: they are corrected by some
            predictions in float32 (`core.information.precision`).
        hookpoints: The cross-attention blocks to record and edit; by default the spec's, or those nearest the
            bottleneck.
        offload: Keep each part of the model in main memory until it computes (needs accelerate); by default if a GPU
            has too little memory free for all parts.
        text_device: Device of the text encoder, which is then in float32; by default with the rest.
        memory_gib: Limit of GPU memory for weights and activations, in GiB. It limits, with the free memory and the
            measured memory per latent, how many latents go through the U-Net at once.

    Raises:
        ModelError: There is no such model, it cannot be loaded, or it lacks one of the hookpoints.
    """
    spec = name if isinstance(name, ModelSpec) else find_model(name)
    if hookpoints:
        spec = replace(spec, hookpoints=tuple(hookpoints))
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    computes_in = _dtype(dtype) or (torch.float16 if target.type == "cuda" and spec.half else torch.float32)
    if not memory_gib > 0:
        raise ModelError(f"memory_gib has to be positive, not {memory_gib}.")
    limit = int(memory_gib * GIB)
    pipeline = read_pipeline(spec, computes_in)
    modules = [getattr(pipeline, component) for component in WEIGHTS]
    if needs_offload(modules, target) if offload is None else offload:
        _offload(pipeline, spec, target)
        return Diffuser(pipeline, spec, device=target, memory_limit=limit)
    for module in modules:
        if text_device is not None and module is pipeline.text_encoder:
            torch.nn.Module.to(module, torch.device(text_device), torch.float32)
        else:
            torch.nn.Module.to(module, target)
    return Diffuser(pipeline, spec, memory_limit=limit)


def needs_offload(modules: Sequence[torch.nn.Module], device: torch.device) -> bool:
    """Whether a GPU has too little memory free for these modules and their activations."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    weights = sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())
    return free < weights + WORKING_BYTES


def _offload(pipeline: "StableDiffusionPipeline", spec: ModelSpec, device: torch.device) -> None:
    try:
        pipeline.enable_model_cpu_offload(device=device)
    except ImportError as error:
        raise ModelError(
            f"{device} has too little memory free for all of {spec.name!r} at once. With accelerate (`pip install "
            f"accelerate`) its parts take turns; or load it on another device."
        ) from error
    log.info("%s: little memory is free on %s, so the model's parts take turns there; slower", spec.name, device)


def read_pipeline(spec: ModelSpec, dtype: torch.dtype) -> "StableDiffusionPipeline":
    """Load a pipeline of diffusers into main memory.

    Raises:
        ModelError: It cannot be loaded.
    """
    from diffusers import StableDiffusionPipeline

    half = dtype != torch.float32
    try:
        folder = Path(spec.source).expanduser() if is_local(spec) else _fetch(spec, half)
        with _without_progress_bars():
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder,
                variant=choose_variant(_weights(folder), prefer_half=half),
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_message(spec, error)) from error
    for component in WEIGHTS:
        # A few weights are read in a wider dtype than requested. torch's own `to`, because that of diffusers warns.
        torch.nn.Module.to(getattr(pipeline, component), dtype=dtype)
    return pipeline


def _fetch(spec: ModelSpec, half: bool) -> Path:
    """The cached folder of a repository on the Hub with all needed files, downloading those that are missing."""
    from huggingface_hub import snapshot_download

    def fetch(**options: Any) -> Any:
        return snapshot_download(spec.source, revision=spec.revision, **options)

    def cached() -> Path | None:
        with suppress(OSError):
            folder = Path(fetch(allow_patterns=[_INDEX], local_files_only=True))
            return folder if any(_whole(_weights(folder), pattern) for pattern in (_HALF, _PLAIN)) else None
        return None

    if _COMMIT.fullmatch(spec.revision or "") and (folder := cached()):
        return folder  # a commit never changes, so the Hub need not be asked
    try:
        listed = fetch(dry_run=True)
    except OSError:
        if folder := cached():
            return folder
        raise
    needed = needed_files([file.filename for file in listed], half=half)
    missing = sum(file.file_size or 0 for file in listed if file.will_download and file.filename in needed)
    if missing:
        log.info("%s: fetching %.1f GB from https://huggingface.co/%s", spec.name, missing / 1e9, spec.source)
    return Path(fetch(allow_patterns=needed))


def needed_files(files: Sequence[str], *, half: bool) -> list[str]:
    """The files of a repository that are used here: no safety checker, and no weights in other formats."""
    weights = _HALF if choose_variant(files, prefer_half=half) else _PLAIN

    def is_needed(file: str) -> bool:
        part, _, name = file.rpartition("/")
        if part not in ("tokenizer", "scheduler", *WEIGHTS):
            return file == _INDEX
        return name.endswith((".json", ".txt")) or bool(weights.search(file))

    return [file for file in files if is_needed(file)]


def _weights(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for part in WEIGHTS for path in (folder / part).glob("*.safetensors")]


def choose_variant(files: Sequence[str], *, prefer_half: bool) -> str | None:
    """The variant of weights to load: `fp16`, or None for the plain files.

    Args:
        files: Paths in the repository or folder, such as `unet/diffusion_pytorch_model.fp16.safetensors`.
        prefer_half: Whether to load half precision if there are both; otherwise it is loaded only if there is nothing
            else.
    """
    return "fp16" if _whole(files, _HALF) and (prefer_half or not _whole(files, _PLAIN)) else None


def _whole(files: Sequence[str], pattern: re.Pattern[str]) -> bool:
    """Whether every component has weights whose names match."""
    return all(any(f.startswith(f"{part}/") and pattern.search(f) for f in files) for part in WEIGHTS)


def _message(spec: ModelSpec, error: Exception) -> str:
    if is_local(spec):
        return (
            f"The model {spec.name!r} could not be loaded from {spec.source}: {error}\nIt has to be a "
            f"StableDiffusionPipeline with safetensors weights."
        )
    size = ""
    if spec.gigabytes:
        size = f" ({spec.gigabytes / 2:.1f} GB in half precision, where it has such files, else {spec.gigabytes:.1f})"
    there = f"https://huggingface.co/{spec.source}" + (f" at revision {spec.revision}" if spec.revision else "")
    embedded = next(iter(BUILT_IN))
    return (
        f"The weights of {spec.name!r} are not on this machine and could not be fetched{size} from {there}: {error}\n"
        f"The Hub has to be reachable, and the repository a StableDiffusionPipeline with safetensors weights that is "
        f"open to you (`hf auth login`). {embedded!r} needs no download."
    )


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"A model computes in {', '.join(DTYPES)}, not in {dtype!r}.")
    found: torch.dtype = getattr(torch, dtype)
    return found


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """A context without the progress bars of diffusers and transformers, for files that load in a second.

    Downloads still show the Hub's progress. The warning about `torch_dtype` is silenced, the only name of the argument
    in older versions of diffusers.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)
            yield
    finally:
        for library in shown:
            library.enable_progress_bar()
