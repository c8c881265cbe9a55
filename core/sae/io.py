"""Reading and writing an SAE: `cfg.json` and safetensors in the format of SAELens v6; sparsify's format is read too.

TopK is saved as SAELens' `topk`, BatchTopK as `jumprelu` with a threshold. What SAELens has no field for is under
`metadata`. `dtype` is float32 even if the weights are stored in float16: SAELens fails without the field, and computes
different codes in float16. `FORMAT.md` beside this file describes the format.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import ArtifactError
from core.files import write_atomically
from core.sae.autoencoder import SaeConfig, SparseAutoencoder

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
"""Weights in the format of SAELens, which is also ours."""
SPARSIFY_WEIGHTS = "sae.safetensors"
"""Weights in the format of sparsify."""

_SAELENS_ARCHITECTURES = {"topk": "topk", "batchtopk": "jumprelu"}


class _Read(NamedTuple):
    """Contents of a folder, with our names."""

    cfg: SaeConfig
    weights: dict[str, Tensor]
    """The state dict, in the dtype of the file."""
    metadata: dict[str, Any]


def save_sae(
    sae: SparseAutoencoder,
    folder: Path,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the two files of an SAE, so that a reader finds both complete or none.

    Args:
        sae: The SAE.
        folder: Its folder, created if need be.
        metadata: JSON values that are added to the SAE's own metadata.
        dtype: Type of the weights on disk.

    Raises:
        ArtifactError: A weight is not finite in `dtype`.
    """
    weights = {
        "W_enc": sae.encoder.weight.T,
        "b_enc": sae.encoder.bias,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if sae.threshold is not None:
        weights["threshold"] = sae.threshold
    # Copies, because safetensors accepts no views and no tensors that share memory.
    stored = {
        name: value.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    if bad := [name for name, value in stored.items() if not value.isfinite().all()]:
        raise ArtifactError(f"The SAE for {folder} was not saved: {', '.join(bad)} is not finite in {dtype}.")
    cfg = {
        "architecture": _SAELENS_ARCHITECTURES[sae.cfg.architecture],
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**sae.metadata, **(metadata or {}), "k": sae.cfg.k},
    }
    if sae.cfg.architecture == "topk":
        cfg |= {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": False}
    folder.mkdir(parents=True, exist_ok=True)
    # The weights are put in place first, as the last context is left first.
    with write_atomically(folder / CONFIG) as config, write_atomically(folder / WEIGHTS) as weights_file:
        save_file(stored, weights_file)
        config.write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
        # A folder without a config is not an SAE, so a kill from here on cannot leave a mixture of old and new.
        (folder / CONFIG).unlink(missing_ok=True)


def read_sae(folder: str | Path, *, device: torch.device | str = "cpu") -> SparseAutoencoder:
    """Load the SAE from a folder written by SAELens (v6), sparsify or `save_sae`; its weights are converted to float32.

    Raises:
        ArtifactError: A file is missing or truncated, or has another architecture or shape.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    reader = _read_saelens if "architecture" in values else _read_sparsify
    try:
        read = reader(folder, values)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / CONFIG}: {error} is missing or invalid.") from error
    except ArtifactError:
        raise
    except ValueError as error:
        raise ArtifactError(f"{folder / CONFIG}: {error}") from error
    with torch.device("meta"):
        sae = SparseAutoencoder(read.cfg, metadata=read.metadata)
    expected = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in read.weights.items()}
    for name, shape in expected.items():
        if found.get(name) != shape:
            there = f"is {list(found[name])}" if name in found else "is not there"
            raise ArtifactError(
                f"{folder}: {name} {there}; {CONFIG} asks for {list(shape)}. One of the two is damaged."
            )
    sae.load_state_dict({name: read.weights[name].float() for name in expected}, assign=True)
    return sae.requires_grad_(False).eval().to(device)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ArtifactError: The file does not exist or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}). Save or download it again.") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} is not a JSON object. Save or download it again.")
    return values


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file."""
    try:
        weights: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist.") from error
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged or truncated ({error}). Save or download it again.") from error
    return weights


def _read_saelens(folder: Path, values: dict[str, Any]) -> _Read:
    """Read a folder in the format of SAELens, such as ours."""
    architecture = values["architecture"]
    ours = {theirs: mine for mine, theirs in _SAELENS_ARCHITECTURES.items()}
    if architecture not in ours:
        raise ArtifactError(f"{folder} has a {architecture!r} SAE; only {' and '.join(ours)} can be read.")
    for name, only in (
        ("apply_b_dec_to_input", True),
        ("normalize_activations", "none"),
        ("rescale_acts_by_decoder_norm", False),
        ("reshape_activations", "none"),
    ):
        if values.get(name, only) != only:
            raise ArtifactError(f"{folder / CONFIG}: {name} is {values[name]!r}; only {only!r} can be read.")
    metadata = dict(values.get("metadata") or {})
    k = values["k"] if architecture == "topk" else metadata["k"]
    cfg = SaeConfig(values["d_in"], values["d_sae"], k, ours[architecture])  # type: ignore[arg-type]
    weights = _load(folder / WEIGHTS)
    rename: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "W_enc": ("encoder.weight", lambda weight: weight.T.contiguous()),
        "b_enc": ("encoder.bias", Tensor.contiguous),
    }
    renamed = {}
    for name, value in weights.items():
        mine, change = rename.get(name, (name, Tensor.contiguous))
        renamed[mine] = change(value)
    return _Read(cfg, renamed, metadata)


def _read_sparsify(folder: Path, values: dict[str, Any]) -> _Read:
    """Read a folder in the format of EleutherAI's sparsify; unknown keys are ignored."""
    if values.get("activation", "topk") != "topk" or values.get("skip_connection") or values.get("transcode"):
        raise ArtifactError(f"{folder} is not a plain TopK autoencoder, the only kind of sparsify that can be read.")
    d_sae = values.get("num_latents") or values["d_in"] * values["expansion_factor"]
    return _Read(SaeConfig(values["d_in"], d_sae, values["k"]), _load(folder / SPARSIFY_WEIGHTS), {})
