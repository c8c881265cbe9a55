"""Hooks into the U-Net while the sampler runs: residual updates recorded and edited, cross-attention maps."""
