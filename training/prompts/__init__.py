"""Prompts for generated images: from the grammar, a text file or a dataset."""
