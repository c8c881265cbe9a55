"""The embedded model's world: objects, backgrounds, styles, scenes and captions."""
