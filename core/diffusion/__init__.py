"""The diffusion model: loading it, its noise schedule and sampler, its text and images."""
