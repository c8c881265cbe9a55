"""Reading and writing an SAE: `cfg.json` and safetensors in the format of SAELens v6; sparsify's format is read too.

TopK is saved as SAELens' `topk`, BatchTopK as `jumprelu` with a threshold. What SAELens has no field for is under
`metadata`. `dtype` is float32 even if the weights are stored in float16: SAELens fails without the field, and computes
different codes in float16. `FORMAT.md` beside this file describes the format.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import ArtifactError
from core.files import write_atomically
from core.sae.autoencoder import Reads, SparseAutoencoder
from core.sae.formats import SAELENS_ARCHITECTURES, from_saelens, from_sparsify, shapes_of

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
"""Weights in the format of SAELens, which is also ours."""
SPARSIFY_WEIGHTS = "sae.safetensors"
"""Weights in the format of sparsify."""


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
        ArtifactError: A weight is not finite in `dtype`, or it is a BatchTopK without threshold.
        OSError: The files could not be written, for example to a full disk.
    """
    if sae.cfg.architecture == "batchtopk" and sae.threshold is None:
        raise ArtifactError(
            f"The SAE for {folder} was not saved: SAELens' format has no BatchTopK without a threshold."
        )
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
    reads = {} if sae.cfg.reads == "update" else {"reads": sae.cfg.reads}
    cfg = {
        "architecture": SAELENS_ARCHITECTURES[sae.cfg.architecture],
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**sae.metadata, **(metadata or {}), "k": sae.cfg.k, **reads},
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


def read_sae(
    folder: str | Path, *, device: torch.device | str = "cpu", reads: Reads | None = None
) -> SparseAutoencoder:
    """Load the SAE from a folder written by SAELens (v6), sparsify or `save_sae`; its weights are converted to float32.

    Args:
        folder: Has `cfg.json` and the weights.
        device: The device to load it to.
        reads: What it reads at its hookpoint; None: what its files say, or else the block's output where another
            library wrote them.

    Raises:
        ArtifactError: A file is missing or truncated, or has another architecture or shape, a field or tensor that is
            not known, or weights that are not finite.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    is_saelens = "architecture" in values
    weights = _load(folder / (WEIGHTS if is_saelens else SPARSIFY_WEIGHTS))
    try:
        read = (from_saelens if is_saelens else from_sparsify)(values, weights)
    except KeyError as error:
        raise ArtifactError(f"{folder / CONFIG}: {error} is missing.") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{folder / CONFIG}: {error}") from error
    cfg = replace(read.cfg, reads=reads) if reads else read.cfg
    state = _checked(folder, shapes_of(cfg), read.weights)
    with torch.device("meta"):
        sae = SparseAutoencoder(cfg, metadata=read.metadata)
    sae.load_state_dict(state, assign=True)
    return sae.requires_grad_(False).eval().to(device)


def _checked(folder: Path, expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float32, if they are those that are expected, and numbers."""
    for name, shape in expected.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            there = f"is {list(weights[name].shape)}" if name in weights else "is not there"
            raise ArtifactError(
                f"{folder}: {name} {there}; {CONFIG} asks for {list(shape)}. One of the two is damaged."
            )
    if others := sorted(set(weights) - set(expected)):
        raise ArtifactError(
            f"{folder} has a tensor {others[0]!r}, which is not known here and may change what the SAE computes: it is "
            f"of another kind than {CONFIG} says, or of a later version of its library."
        )
    checked = {}
    for name in expected:
        stored = weights[name]
        if not stored.is_floating_point():
            raise ArtifactError(f"{folder}: {name} is {stored.dtype}; weights are floating-point numbers.")
        checked[name] = stored.float()
        if not checked[name].isfinite().all():
            raise ArtifactError(
                f"{folder}: {name} has values that are not finite, stored as {stored.dtype}: they overflowed when they "
                f"were saved, or the file is damaged. Save it again in float32, or download it again."
            )
    return checked


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ArtifactError: The file does not exist or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist.") from error
    except (OSError, ValueError, RecursionError) as error:
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
