"""Benchmarks of speed, each figure next to another implementation or a lower bound measured in the same run."""
