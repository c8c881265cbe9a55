"""Prompts of more tokens than the text encoder reads at once, on a small model whose vocabulary spells any text."""

import pytest
import torch
from torch import Tensor

import core
from core.activations.attention import record_attention, word_maps
from core.activations.hooks import ActivationKey
from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.diffusion.predictor import Conditions
from core.diffusion.text_encoder import MASK, TEXT
from core.errors import PromptTooLongError
from core.information.quadrature import Sampler
from training.benchmark.full_size import SMALL, save_pipeline

SHORT = "a cat"
LONG = " ".join(["cat"] + ["strawberries"] * 9)  # 111 tokens, one a letter
ROWS = 77


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Diffuser:
    folder = tmp_path_factory.mktemp("speller")
    save_pipeline(folder, torch.float32, SMALL)
    return load_model(folder, device="cpu")


def noise_of(model: Diffuser, conditions: Conditions) -> Tensor:
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.predict_noise(x.expand(len(conditions), -1, -1, -1), torch.zeros(len(conditions)), conditions)


def test_a_long_prompt_is_read_in_windows_and_none_of_it_is_cut(speller: Diffuser) -> None:
    windows, spans = speller.vocabulary.windows(LONG), speller.vocabulary.token_spans(LONG)
    assert [len(window) for window in windows] == [ROWS, ROWS]
    assert len(spans) == 2 * ROWS
    assert "".join(LONG[start:end] for start, end in spans) == LONG.replace(" ", "")
    marks = {windows[0][0], windows[0][-1]}
    tokens = [token for window in windows for token in window]
    assert all((token in marks) == (span == (0, 0)) for token, span in zip(tokens, spans, strict=True))
    (only,) = speller.vocabulary.windows("")
    assert set(only) == marks
    embedding = speller.text_embeddings([LONG])
    assert embedding.shape[1] == 2 * ROWS
    torch.testing.assert_close(embedding[:, :ROWS], speller.text_embeddings([LONG[: 3 + 6 * 13]])[:, :ROWS])
    changed = noise_of(speller, speller.encode_text([LONG[:-1] + "x"])) - noise_of(speller, speller.encode_text([LONG]))
    assert float(changed.abs().max()) > 1e-5  # its last letter counts


def test_a_short_prompt_beside_a_long_one_is_what_it_is_alone(speller: Diffuser) -> None:
    both, alone = speller.encode_text([SHORT, LONG]), speller.encode_text([SHORT])
    assert both.tensors[TEXT].shape[1] == 2 * ROWS
    assert both.tensors[MASK].sum(1).tolist() == [ROWS, 2 * ROWS]
    assert alone.tensors[TEXT].shape[1] == ROWS
    assert MASK not in alone.tensors
    torch.testing.assert_close(noise_of(speller, both)[:1], noise_of(speller, alone), atol=1e-5, rtol=1e-5)
    unmasked = Conditions({TEXT: both.tensors[TEXT][:1]})  # with padding that counts as text
    assert float((noise_of(speller, unmasked) - noise_of(speller, alone)).abs().max()) > 1e-4
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    *_, pair = speller.sample([SHORT, LONG], seeds=[1, 2], **settings)
    for row, prompt in enumerate((SHORT, LONG)):
        *_, one = speller.sample([prompt], seeds=[1 + row], **settings)
        torch.testing.assert_close(pair.x[row], one.x[0], atol=1e-4, rtol=1e-4)


def test_attention_to_words_beyond_the_first_window(speller: Diffuser) -> None:
    with record_attention(speller, steps=[0]) as maps:
        for _ in speller.sample([SHORT, LONG], seeds=[1, 2], num_inference_steps=2, last_step=0):
            pass
    cond = maps[ActivationKey(speller.hookpoints[0], "cond", 0)]
    assert cond.shape[1] == 2 * ROWS
    torch.testing.assert_close(cond.sum(1), torch.ones_like(cond[:, 0]))
    assert float(cond[0, ROWS:].abs().max()) == 0
    words, of_words = word_maps(speller, LONG, cond[1])
    letters = [row for row, span in enumerate(speller.vocabulary.token_spans(LONG)) if span != (0, 0)]
    assert words == ("cat", "strawberries")
    torch.testing.assert_close(of_words.sum(0), cond[1, letters].sum(0))
    assert word_maps(speller, SHORT, cond[0]).words == ("a", "cat")
    with pytest.raises(ValueError, match=rf"\[\.\.\., {2 * ROWS}, h, w\]"):
        word_maps(speller, LONG, cond[1, :ROWS])


def test_words_of_a_long_prompt_are_attributed(speller: Diffuser) -> None:
    image = speller.generate(LONG, num_inference_steps=2, previews=False)
    found = core.attribute(speller, image, LONG, sampler=Sampler(n_points=8, min_replicates=2), max_evals=48)
    assert found.words == ("cat", "strawberries")
    assert (found.bits > 0).all()
    # Without either word the prompt is of one window: it meets the long one in the same batches.
    torch.testing.assert_close(torch.from_numpy(found.maps.sum((1, 2))), torch.from_numpy(found.bits))


def test_there_is_an_end(speller: Diffuser, model: Diffuser) -> None:
    assert speller.vocabulary.limit == 4 * speller.vocabulary.window == 300
    speller.check_prompt("a" * 300)
    with pytest.raises(PromptTooLongError, match=r"at most 300 tokens\. Leave out at least 1"):
        speller.check_prompt("a" * 301)
    assert model.vocabulary.limit == model.vocabulary.window  # its text encoder was never shown a second window
