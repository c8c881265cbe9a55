"""The embedded package built end to end: weights, SAEs, labels, card and examples."""
