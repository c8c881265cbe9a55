"""The share of prompts that is held out from training."""

HELD_OUT = 10
"""One in so many prompts, or combinations of words, is kept from training and used for evaluation."""
