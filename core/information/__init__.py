"""How much words tell a picture, where in it and when in the denoising, with errors."""
