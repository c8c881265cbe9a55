"""Publishing to the Hugging Face Hub: collections, their cards, and the Space."""
