"""Where a model's files are: embedded in this package, in a local folder, or on the Hub at a revision.

Weights are read from safetensors alone; a folder that has only pickles is refused, because unpickling runs code.
"""

import difflib
import json
import re
from pathlib import Path

from core.errors import ModelError
from core.spec import BUILT_IN, ModelSpec

WEIGHTS = ("unet", "vae", "text_encoder")
"""Components of a StableDiffusionPipeline folder that have weights we use."""

_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")


def find_model(name: str | Path) -> ModelSpec:
    """The spec behind a built-in name, a local folder, or `owner/name[@revision]` on the Hub.

    A local folder is checked here, so that what is missing is said before anything slow happens.
    """
    text = str(name)
    if text in BUILT_IN:
        spec = BUILT_IN[text]
        if not _HUB_ID.fullmatch(spec.source):
            remedy = f"Make it with `python -m training {text}`, or load another: a folder or a Hub id."
            _check_folder(Path(spec.source), f"The embedded model {text!r} is not there yet. {remedy}")
        return spec
    folder = Path(text).expanduser()
    if folder.is_dir():
        _check_folder(folder, f"{folder} is no StableDiffusionPipeline folder.")
        return ModelSpec(name=folder.resolve().name, source=str(folder))
    hub_id, _, revision = text.partition("@")
    if _HUB_ID.fullmatch(hub_id) and not text.startswith((".", "~")):
        return ModelSpec(name=hub_id, source=hub_id, revision=revision or None)
    near = difflib.get_close_matches(text, BUILT_IN, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ModelError(
        f"There is no model {text!r}: it is neither built in ({', '.join(BUILT_IN)}), nor a folder, "
        f"nor a Hub id `owner/name[@revision]`.{hint}"
    )


def is_local(spec: ModelSpec) -> bool:
    """Whether the model's files are on this disk."""
    return Path(spec.source).expanduser().is_dir()


def _check_folder(folder: Path, otherwise: str) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"{otherwise} (There is no {index}.)")
    try:
        components = json.loads(index.read_text())
    except ValueError as error:
        raise ModelError(f"{index} is not JSON ({error}). Save the pipeline again.") from error
    for component in ("tokenizer", "scheduler", *WEIGHTS):
        if component not in components or not (folder / component).is_dir():
            raise ModelError(
                f"{folder} has no {component!r}, which a StableDiffusionPipeline needs. Save the whole pipeline "
                f"with `pipeline.save_pretrained(folder)`."
            )
    for component in WEIGHTS:
        files = [path.name for path in (folder / component).iterdir()]
        if not any(name.endswith(".safetensors") for name in files):
            pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
            found = f"only {pickles[0]}, a pickle, which could run code on loading" if pickles else "no weights"
            raise ModelError(
                f"{folder / component} has {found}. Save the pipeline as safetensors with "
                f"`pipeline.save_pretrained(folder, safe_serialization=True)`."
            )
