"""The Layout tab."""
