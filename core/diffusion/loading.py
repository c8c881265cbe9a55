"""Loading a model: its files, precision and device."""

import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from core.arguments import as_items
from core.artifacts import HUB_ERRORS, find_model, is_local
from core.diffusion.diffuser import Diffuser
from core.errors import ModelError
from core.hardware.finite import finite_pipeline
from core.hardware.memory import DEFAULT_LIMIT, GIB
from core.hub import hub_answer
from core.pipeline_folder import (
    INDEX,
    WEIGHTS,
    check_configs,
    check_weights,
    choose_variants,
    is_of_variant,
    weights_of,
)
from core.spec import BUILT_IN, ModelSpec

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

log = logging.getLogger(__name__)

WORKING_BYTES = 3 * GIB
"""GPU memory that must be free beyond the weights, or parts of the model are offloaded: for activations, and in a
measurement for a U-Net in float32 (1.6 GiB more on SD v1.4, with one latent at a time if need be)."""

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes that a model can compute in."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def load_model(
    name: str | Path | ModelSpec = "picturebook",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    hookpoints: str | Sequence[str] | None = None,
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
        spec = replace(spec, hookpoints=as_items(hookpoints))
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    computes_in = _dtype(dtype) or (torch.float16 if target.type == "cuda" and spec.half else torch.float32)
    if not memory_gib > 0:
        raise ModelError(f"memory_gib has to be positive, not {memory_gib}.")
    limit = int(memory_gib * GIB)
    pipeline = finite_pipeline(spec.name, computes_in, partial(read_pipeline, spec))
    modules = [getattr(pipeline, component) for component in WEIGHTS]
    if needs_offload(modules, target) if offload is None else offload:
        _offload(pipeline, spec, target)
        return _noted(Diffuser(pipeline, spec, device=target, memory_limit=limit))
    for module in modules:
        if text_device is not None and module is pipeline.text_encoder:
            torch.nn.Module.to(module, torch.device(text_device), torch.float32)
        else:
            torch.nn.Module.to(module, target)
    return _noted(Diffuser(pipeline, spec, memory_limit=limit))


def _noted(model: Diffuser) -> Diffuser:
    """The model, after the log has what of its folder is not used as it is."""
    level = logging.INFO if model.spec.name in BUILT_IN else logging.WARNING
    for note in model.notes:
        log.log(level, "%s: %s", model.spec.name, note)
    return model


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
    folder = Path(spec.source).expanduser() if is_local(spec) else _fetch(spec, half)
    check_configs(folder)
    files = weights_of(folder)
    variants = choose_variants(files, prefer_half=half)
    check_weights(folder, [file for file in files if is_of_variant(file, variants)])
    try:
        with _without_progress_bars():
            parts = {part: _read_part(folder, part, variants[part], dtype) for part in WEIGHTS}
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder,
                **parts,
                local_files_only=True,
                safety_checker=None,
                feature_extractor=None,
                image_encoder=None,
                requires_safety_checker=False,
            )
    except ModelError:
        raise
    except Exception as error:  # whatever the libraries raise at a folder that they cannot read
        raise ModelError(
            f"The model {spec.name!r} could not be loaded from {folder}: {error}\nIt has to be a "
            f"StableDiffusionPipeline with safetensors weights."
        ) from error
    for component in WEIGHTS:
        # A few weights are read in a wider dtype than requested. torch's own `to`, because that of diffusers warns.
        torch.nn.Module.to(getattr(pipeline, component), dtype=dtype)
    return pipeline


def _read_part(folder: Path, part: str, variant: str | None, dtype: torch.dtype) -> torch.nn.Module:
    """A component with its weights; its class is one that `check_configs` allows."""
    import diffusers
    import transformers

    name = json.loads((folder / INDEX).read_text(encoding="utf-8"))[part][-1]
    library, wanted = (transformers, "dtype") if part == "text_encoder" else (diffusers, "torch_dtype")
    module: torch.nn.Module
    module, found = getattr(library, name).from_pretrained(
        folder / part,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **{wanted: dtype},
    )
    missing = sorted(found["missing_keys"])
    if missing:  # the libraries would go on with random numbers in their place
        raise ModelError(
            f"The weights of {folder / part} lack {len(missing)} tensors, such as {missing[0]}: they are not of this "
            f"architecture, or only a part of it (an adapter). Save the whole pipeline again with "
            f"`pipeline.save_pretrained(folder, safe_serialization=True)`."
        )
    return module


def _fetch(spec: ModelSpec, half: bool) -> Path:
    """The cached folder of a repository on the Hub with all needed files, downloading those that are missing.

    Raises:
        ModelError: It cannot be fetched, or is no pipeline that could be used, which is found out before its weights
            are fetched.
    """
    from huggingface_hub import snapshot_download

    def fetch(**options: Any) -> Any:
        return snapshot_download(spec.source, revision=spec.revision, **options)

    def cached() -> Path | None:
        with suppress(OSError, ValueError):
            folder = Path(fetch(allow_patterns=[INDEX], local_files_only=True))
            return folder if set(choose_variants(weights_of(folder), prefer_half=half)) == set(WEIGHTS) else None
        return None

    if _COMMIT.fullmatch(spec.revision or "") and (folder := cached()):
        return folder  # a commit never changes, so the Hub need not be asked
    try:
        listed = fetch(dry_run=True)
        needed = needed_files([file.filename for file in listed], half=half)
        missing = sum(file.file_size or 0 for file in listed if file.will_download and file.filename in needed)
        if missing and INDEX in needed:
            check_configs(Path(fetch(allow_patterns=[name for name in needed if not name.endswith(".safetensors")])))
            log.info("%s: fetching %.1f GB from https://huggingface.co/%s", spec.name, missing / 1e9, spec.source)
        return Path(fetch(allow_patterns=needed))
    except ModelError:
        raise
    except HUB_ERRORS as error:
        if folder := cached():
            return folder
        raise ModelError(_message(spec, error)) from error


def needed_files(files: Sequence[str], *, half: bool) -> list[str]:
    """The files of a repository that are used here: no safety checker, and no weights in other formats."""
    variants = choose_variants(files, prefer_half=half)

    def is_needed(file: str) -> bool:
        part, _, name = file.rpartition("/")
        if part not in ("tokenizer", "scheduler", *WEIGHTS):
            return file == INDEX
        return name.endswith((".json", ".txt")) or is_of_variant(file, variants)

    return [file for file in files if is_needed(file)]


def _message(spec: ModelSpec, error: Exception) -> str:
    size = ""
    if spec.gigabytes:
        size = f" ({spec.gigabytes / 2:.1f} GB in half precision, where it has such files, else {spec.gigabytes:.1f})"
    there = f"https://huggingface.co/{spec.source}" + (f" at revision {spec.revision}" if spec.revision else "")
    embedded = next(iter(BUILT_IN))
    return (
        f"The weights of {spec.name!r} are not on this machine and could not be fetched{size} from {there}: "
        f"{hub_answer(error, spec.source, spec.revision)}\nThe repository has to be a StableDiffusionPipeline with "
        f"safetensors weights. {embedded!r} needs no download."
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
