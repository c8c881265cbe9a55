"""The embedded model's networks and their training loop."""
