"""Configurations of SAELens and sparsify, and what they mean here.

What these libraries compute is told by the fields of `cfg.json`. Every field is either understood, or known to change
nothing after training, or refused by name: an SAE that is read in part computes other codes without anybody noticing.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from core.sae.autoencoder import Architecture, SaeConfig

log = logging.getLogger(__name__)

SAELENS_ARCHITECTURES: dict[Architecture, str] = {"topk": "topk", "batchtopk": "jumprelu"}
"""Our architectures, with SAELens' names for them: it saves BatchTopK with its threshold as jumprelu."""

_SAELENS_FIXED: dict[str, tuple[Any, str]] = {
    "apply_b_dec_to_input": (True, "Add `b_dec @ W_enc` to its `b_enc`, and save it with true."),
    "normalize_activations": (
        "none",
        "If it is one factor, fold it into the weights in SAELens.",
    ),
    "rescale_acts_by_decoder_norm": (False, "Call its `fold_W_dec_norm()` in SAELens, and save it with false."),
    "reshape_activations": ("none", "It reads the heads of an attention layer, which a U-Net's block does not give."),
}
"""Fields that have to have one value, with the remedy."""
_SAELENS_NEUTRAL = (
    *("architecture", "d_in", "d_sae", "k", "dtype", "device", "metadata"),
    # Where an SAE came from; before version 6 beside the fields that matter.
    *("model_name", "hook_name", "hook_layer", "hook_head_index", "model_from_pretrained_kwargs", "dataset_path"),
    *("dataset_trust_remote_code", "context_size", "prepend_bos", "seqpos_slice", "sae_lens_training_version"),
    *("sae_lens_version", "neuronpedia_id"),
)
_SPARSIFY_NEUTRAL = (
    *("d_in", "k", "num_latents", "expansion_factor", "batch_topk", "reads"),
    *("multi_topk", "normalize_decoder", "normalize_encoder"),  # of the loss, and of the initial weights
)
_SPARSIFY_REFUSED = {
    "signed": "its values may be negative, here they never are",
    "sample_topk": "its k latents are shared by all positions of an image, here each position has its own",
    "input_unit_norm": "it normalises every position, and a code alone does not tell how to undo that",
    "skip_connection": "part of the output bypasses the latents",
    "embed_skip": "part of the output bypasses the latents",
    "transcode": "it is a transcoder, which predicts another layer and does not reconstruct what it reads",
}
"""Fields that have to be absent or false, with the reason."""


class Contents(NamedTuple):
    """Contents of a folder, with our names."""

    cfg: SaeConfig
    weights: dict[str, Tensor]
    """The state dict, in the dtype of the file."""
    metadata: dict[str, Any]


def from_saelens(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Contents:
    """An SAE in the format of SAELens, such as ours.

    Raises:
        ValueError: An architecture or a field that cannot be read; the message names it.
    """
    named = values["architecture"]
    ours = {theirs: mine for mine, theirs in SAELENS_ARCHITECTURES.items()}
    if named not in ours:
        raise ValueError(
            f"it has a {named!r} SAE; only {' and '.join(ours)} can be read. (SAELens saves a trained BatchTopK as "
            f"jumprelu: use its `save_inference_model`.)"
        )
    for name, (only, remedy) in _SAELENS_FIXED.items():
        if values.get(name, only) != only:
            raise ValueError(f"{name} is {values[name]!r}; only {only!r} can be read. {remedy}")
    _refuse_others(values, (*_SAELENS_NEUTRAL, *_SAELENS_FIXED), "Save it again with SAELens 6, if it is older.")
    metadata = values.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata is {metadata!r}, not a JSON object.")
    architecture = ours[named]
    # SAELens keeps no k once there is a threshold.
    k = _whole("k", values["k"] if architecture == "topk" else metadata.get("k") or 0)
    # Its hooks see what a module returns, ours what a block adds.
    reads = metadata.get("reads", "output" if "hook_name" in {**values, **metadata} else "update")
    cfg = SaeConfig(_whole("d_in", values["d_in"]), _whole("d_sae", values["d_sae"]), k, architecture, reads=reads)
    rename: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "W_enc": ("encoder.weight", lambda weight: weight.T.contiguous()),
        "b_enc": ("encoder.bias", Tensor.contiguous),
        # A negative threshold lets every positive value pass, as 0 does.
        "threshold": ("threshold", lambda threshold: threshold.clamp_min(0)),
    }
    renamed = {}
    for name, value in weights.items():
        mine, change = rename.get(name, (name, Tensor.contiguous))
        renamed[mine] = change(value)
    return Contents(cfg, renamed, dict(metadata))


def from_sparsify(values: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Contents:
    """An SAE in the format of EleutherAI's sparsify or of SAeUron, which descends from it.

    SAeUron's `batch_topk` has no threshold: its code activates the N k largest values of the N positions in a call.

    Raises:
        ValueError: A field that cannot be read; the message names it.
    """
    if values.get("activation", "topk") != "topk":
        raise ValueError(f"it is not a plain TopK autoencoder: activation is {values['activation']!r}.")
    for name, reason in _SPARSIFY_REFUSED.items():
        if values.get(name):
            raise ValueError(f"it is not a plain TopK autoencoder: {name} is {values[name]!r} ({reason}).")
    _refuse_others(values, (*_SPARSIFY_NEUTRAL, "activation", *_SPARSIFY_REFUSED), "Train it without.")
    d_in = _whole("d_in", values["d_in"])
    d_sae = _whole("num_latents", values.get("num_latents") or 0)
    d_sae = d_sae or d_in * _whole("expansion_factor", values["expansion_factor"])
    architecture: Architecture = "topk"
    if values.get("batch_topk"):
        architecture = "batchtopk"
        log.info(
            "batch_topk: the latents of all positions that are encoded together compete. For k at each position, as "
            "SAeUron's own scripts encode images, set batch_topk to false in its cfg.json."
        )
    cfg = SaeConfig(
        *(d_in, d_sae, _whole("k", values["k"]), architecture), has_threshold=False, reads=values.get("reads", "output")
    )
    return Contents(cfg, dict(weights), {})


def shapes_of(cfg: SaeConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of an SAE's state dict, by name."""
    wide = (cfg.d_sae, cfg.d_in)
    shapes = {"W_dec": wide, "b_dec": wide[1:], "encoder.weight": wide, "encoder.bias": wide[:1]}
    return {**shapes, "threshold": wide[:1]} if cfg.uses_threshold else shapes


def _refuse_others(values: Mapping[str, Any], known: tuple[str, ...], remedy: str) -> None:
    """Raise a `ValueError` for a field that is not known, unless it is off."""
    for name, value in values.items():
        if name not in known and value not in (None, False, 0, "", "none", [], {}):
            raise ValueError(
                f"{name} is {value!r}, a field that is not known here and may change what the SAE computes. {remedy}"
            )


def _whole(name: str, value: Any) -> int:
    """A whole number of a JSON file; 4.0 is one, as some libraries write it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError(f"{name} is {value!r}, not a whole number.")
    return int(value)
