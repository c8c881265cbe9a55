"""What makes the artifacts (embedded model, sparse autoencoders, label tables). Imports `core`, never the reverse."""
