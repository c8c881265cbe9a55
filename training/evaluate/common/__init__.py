"""What the evaluations share: judges, masks, proportions with intervals, cached results."""
