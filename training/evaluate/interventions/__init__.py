"""Evaluations of edits: success rates, collateral change and out-of-distribution rates."""
