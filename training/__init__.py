"""What makes the artifacts: the embedded model, sparse autoencoders, label tables. Imports `core`, never the reverse."""
