"""Stored examples equal a fresh run with the same settings."""

from pathlib import Path

import numpy as np
import pytest

import core
from core.information.stored import GIVEN
from core.spec import BUILT_IN
from core.ui.examples import PageExample, load_examples
from training.pipeline.examples import EXAMPLES, ExampleRequest, build

EMBEDDED = Path(BUILT_IN["picturebook"].source)
STORED = load_examples(EMBEDDED.parent / "examples")


def check_image(model: core.Diffuser, example: PageExample) -> None:
    """Images may differ by rounding on another processor."""
    fresh = model.generate(
        example.prompt, seed=example.seed, num_inference_steps=example.steps, guidance_scale=example.guidance
    )
    difference = np.abs(np.asarray(fresh.image, int) - np.asarray(example.scene.image, int))
    assert difference.mean() < 0.5


def check_bits(model: core.Diffuser, example: PageExample, given: str) -> None:
    """So may bits, by far less than their error."""
    stored = example.attribution(given)
    again = core.attribute(
        model,
        example.scene.image,
        example.prompt,
        seed=example.seed,
        given=stored.given,
        rel_error=stored.settings["rel_error"],
        max_evals=stored.n_evals,
        num_inference_steps=example.steps,
        # Results that were stored before there was interleaving lack it.
        sampler=core.Sampler(**{"interleaved": 1, **stored.settings["sampler"]}),
    )
    assert again.words == stored.words
    assert again.n_replicates == stored.n_replicates
    assert again.bits == pytest.approx(stored.bits, rel=1e-2, abs=1e-2)
    assert np.abs(again.maps - stored.maps).max() < 1e-2 * stored.maps.max()
    assert again.timeline.bits == pytest.approx(stored.timeline.bits, rel=1e-2, abs=1e-2 * stored.timeline.bits.max())


def test_what_is_built_equals_a_fresh_run(model: core.Diffuser, tmp_path: Path) -> None:
    build(model, tmp_path, [ExampleRequest("cat", "cat", 5)], rel_error=0.5, num_inference_steps=3)
    (example,) = load_examples(tmp_path)
    assert len(example.scene.frames) == 3
    check_image(model, example)
    for given in GIVEN:
        check_bits(model, example, given)


@pytest.mark.skipif(not STORED, reason="the embedded examples are not built yet")
def test_the_embedded_examples_are_those_of_the_embedded_model() -> None:
    assert [(e.name, e.prompt, e.seed) for e in STORED] == [tuple(ask) for ask in EXAMPLES]
    check_image(core.load_model("picturebook", device="cpu"), STORED[0])


@pytest.mark.slow
@pytest.mark.skipif(not STORED, reason="the embedded examples are not built yet")
def test_the_bits_of_the_embedded_examples_are_those_of_the_embedded_model() -> None:
    check_bits(core.load_model("picturebook", device="cpu"), STORED[0], "rest")
