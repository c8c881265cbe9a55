"""The examples that the page answers at once: pictures, film strips and attributions, made once and stored."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import core
from core.information.stored import GIVEN, save_example

log = logging.getLogger(__name__)

REL_ERROR = 0.1
"""The page's default, so that a stored result is found where a fresh one would be made."""


class Ask(NamedTuple):
    """What to draw."""

    name: str
    """Stem of the files."""
    prompt: str
    """Words of the captions' vocabulary."""
    seed: int
    """Seed of the noise."""


EXAMPLES = (
    Ask("penguin", "a penguin and a tree on the snow", 1),
    Ask("balloon", "a balloon above a house", 1),
    Ask("strawberry", "a strawberry and a cake in the kitchen", 1),
    Ask("butterfly", "a butterfly and a sunflower on the grass", 3),
    Ask("cat", "a watercolour picture of a cat on the grass", 2),
    Ask("mushroom", "a pixel picture of a mushroom in the forest", 4),
    Ask("whale", "a night picture of a whale in the sea", 1),
    Ask("crab", "a crab left of a castle on the beach", 1),
)


def build(
    model: core.Diffuser,
    out_dir: Path,
    examples: Sequence[Ask] = EXAMPLES,
    rel_error: float = REL_ERROR,
    num_inference_steps: int | None = None,
) -> None:
    """Draw and measure every example, by default with the model's own steps, and store them in `out_dir`."""
    for old in out_dir.glob("*"):
        if old.suffix in (".webp", ".safetensors", ".json"):
            old.unlink()
    for ask in examples:
        generation = model.generate(ask.prompt, seed=ask.seed, num_inference_steps=num_inference_steps)
        attributions = {
            given: core.attribute(
                model,
                generation.image,
                ask.prompt,
                seed=ask.seed,
                given=given,
                rel_error=rel_error,
                num_inference_steps=generation.num_inference_steps,
            )
            for given in GIVEN
        }
        settings = {
            "prompt": ask.prompt,
            "seed": ask.seed,
            "steps": generation.num_inference_steps,
            "guidance": generation.guidance_scale,
        }
        previews = [preview.image for preview in generation.previews if preview.image is not None]
        save_example(out_dir, ask.name, generation.image, previews, settings, attributions)
        told = ", ".join(
            f"{w} {b:.1f}" for w, b in zip(attributions["rest"].words, attributions["rest"].bits, strict=True)
        )
        log.info("%s: %s bits", ask.prompt, told)
