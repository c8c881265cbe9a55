"""How the page looks: colours, charts, the image with its overlays, the prompt's words, exports."""
