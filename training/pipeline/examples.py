"""The page's stored examples: images, film strips and attributions, computed once."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import core
from core.information.stored import GIVEN, save_example

log = logging.getLogger(__name__)

REL_ERROR = 0.1
"""The page's default, so that stored results are found for its default settings."""


class ExampleRequest(NamedTuple):
    """An example to generate."""

    name: str
    """Stem of the files."""
    prompt: str
    """Prompt in the vocabulary of the captions."""
    seed: int
    """Seed of the noise."""


EXAMPLES = (
    ExampleRequest("penguin", "a penguin and a tree on the snow", 1),
    ExampleRequest("balloon", "a balloon above a house", 1),
    ExampleRequest("strawberry", "a strawberry and a cake in the kitchen", 1),
    ExampleRequest("butterfly", "a butterfly and a sunflower on the grass", 3),
    ExampleRequest("cat", "a watercolour picture of a cat on the grass", 2),
    ExampleRequest("mushroom", "a pixel picture of a mushroom in the forest", 4),
    ExampleRequest("whale", "a night picture of a whale in the sea", 1),
    ExampleRequest("crab", "a crab left of a castle on the beach", 1),
)


def build(
    model: core.Diffuser,
    out_dir: Path,
    examples: Sequence[ExampleRequest] = EXAMPLES,
    rel_error: float = REL_ERROR,
    num_inference_steps: int | None = None,
) -> None:
    """Generate and attribute every example and store them in `out_dir`, by default with the model's number of steps."""
    for old in out_dir.glob("*"):
        if old.suffix in (".webp", ".safetensors", ".json"):
            old.unlink()
    for example in examples:
        generation = model.generate(example.prompt, seed=example.seed, num_inference_steps=num_inference_steps)
        attributions = {
            given: core.attribute(
                model,
                generation.image,
                example.prompt,
                seed=example.seed,
                given=given,
                rel_error=rel_error,
                num_inference_steps=generation.num_inference_steps,
            )
            for given in GIVEN
        }
        settings = {
            "prompt": example.prompt,
            "seed": example.seed,
            "steps": generation.num_inference_steps,
            "guidance": generation.guidance_scale,
        }
        previews = [preview.image for preview in generation.previews if preview.image is not None]
        save_example(out_dir, example.name, generation.image, previews, settings, attributions)
        bits = ", ".join(
            f"{w} {b:.1f}" for w, b in zip(attributions["rest"].words, attributions["rest"].bits, strict=True)
        )
        log.info("%s: %s bits", example.prompt, bits)
