"""Training sparse autoencoders on a stream of activations."""
