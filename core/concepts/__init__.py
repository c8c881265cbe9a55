"""Concepts: the tables that name an SAE's latents, what fires where and when in an image, and layout prediction."""
