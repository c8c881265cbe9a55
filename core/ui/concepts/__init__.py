"""The Concepts tab."""
