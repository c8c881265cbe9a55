"""Evaluations of layout prediction against baselines."""
