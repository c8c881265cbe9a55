"""Evaluations that check the claims, each figure next to a baseline and with its interval."""
