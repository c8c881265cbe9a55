"""What the commands share: recipes, checkpoints, folders and reports."""
