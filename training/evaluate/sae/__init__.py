"""Evaluations of sparse autoencoders and of their labels."""
