"""Labels for SAE latents, from what they fire on."""
