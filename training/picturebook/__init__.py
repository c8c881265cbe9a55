"""What makes the embedded model: drawings, scenes with captions, autoencoder, denoiser, segmenter and judges."""
