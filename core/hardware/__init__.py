"""Memory and launches: how many latents fit in a call, and CUDA graphs of small calls."""
