"""The Attribution tab."""
