"""Hooks into the U-Net while the sampler runs: record and edit residual updates, record cross-attention maps."""

from core.activations.hooks import ActivationKey, edit, record

__all__ = ["ActivationKey", "edit", "record"]
