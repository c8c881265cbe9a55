"""Held-out scenes of picturebook's world, and how their words are measured."""

from training.picturebook.world.scenes import Scene, make_scene

NO_TARGET = 1e9
"""Relative error large enough that attribution stops as soon as it checks: every scene gets the same samples."""


def held_out_scenes(n: int) -> list[Scene]:
    """Scenes whose combinations of nouns, background and style never occur in training."""
    return [make_scene(seed, "test") for seed in range(n)]
