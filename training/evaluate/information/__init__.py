"""Evaluations of attribution, PID, caption ranking, counterfactuals and likelihood."""
