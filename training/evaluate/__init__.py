"""Evaluations: how true the claims are, each figure beside a baseline, with its interval."""
