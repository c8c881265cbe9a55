"""The benchmark `conformance` on a small model, and, when slow tests run, at the size of Stable Diffusion v1.4."""

import sys

import pytest
import torch

from core.diffusion.vocabulary import Vocabulary
from training.benchmark import conformance
from training.benchmark.full_size import END, FULL, N_TOKENS, START, byte_tokenizer

STEPS = [
    "write",
    "load",
    "generate and record an image",
    "encode the updates",
    "segment and label",
    "edited image",
    "layout",
    "attribute",
    "decompose",
    "rank",
    "likelihood",
    "remove a word",
    "training step",
]


def test_the_tokenizer_spells_what_it_is_given_in_ids_that_the_text_encoder_has() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("A cat, Zürich 😀").input_ids
    assert (ids[0], ids[-1]) == (N_TOKENS - 2, N_TOKENS - 1)
    assert len(tokenizer) == N_TOKENS
    assert max(ids) < N_TOKENS
    assert tokenizer.unk_token_id not in ids[:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a cat , zürich 😀"
    assert [tokenizer.convert_ids_to_tokens(i) for i in (ids[0], ids[-1])] == [START, END]
    Vocabulary(tokenizer).check("a cat on the grass")


@pytest.mark.slow
def test_everything_is_done_on_a_small_model() -> None:
    table = conformance.measure("cpu", small=True)
    steps = [str(row["what"]) for row in table.rows]
    assert all(any(expected in step for step in steps) for expected in STEPS)
    assert "4 x 4 x 64, 2 x 2 x 64, 4 x 4 x 64" in table.markdown()
    assert all(float(row["seconds"] or 0) > 0 for row in table.rows)
    evals = {str(row["what"]): row["U-Net evaluations"] for row in table.rows}
    assert evals["generate and record an image"] == 4  # two steps of two branches
    # Two steps: four fixed-point iterations of the inversion, then two images.
    assert evals["remove a word from an image"] == 12
    assert evals["attribute an image to its words"] == 8 + 8  # in both precisions
    assert evals["load the pipeline"] is None
    if sys.platform == "linux":
        assert all(0.1 < float(row["peak GiB"] or 0) < 64 for row in table.rows)
    assert FULL.updates == ((1280, 16, 16), (1280, 8, 8), (1280, 16, 16))


def test_what_is_not_as_published_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "nearest_hookpoints", lambda _: ("mid_block.attentions.0",))
    with pytest.raises(ValueError, match="Unexpected hookpoints nearest the bottleneck"):
        conformance.measure("cpu", small=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_is_done_at_full_size() -> None:
    table = conformance.measure("cuda" if torch.cuda.is_available() else "cpu")
    assert "16 x 16 x 1280, 8 x 8 x 1280, 16 x 16 x 1280" in table.markdown()
    assert "8 x 8 positions" in table.markdown()
