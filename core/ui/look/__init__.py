"""Presentation: colours, charts, the image viewer, the prompt's words, exports."""
