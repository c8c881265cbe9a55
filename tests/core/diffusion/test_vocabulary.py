import pytest
import torch
from transformers import CLIPTokenizer

from core.diffusion.diffuser import Diffuser
from core.diffusion.vocabulary import Vocabulary
from core.errors import EmptyPromptError, ModelError, PromptError, PromptTooLongError, UnknownWordError


def test_known_words_are_whole_words(model: Diffuser) -> None:
    known = model.vocabulary.known_words
    assert {"a", "cat", "whale", "watercolour"} <= set(known)
    assert not {"c", "t", "hale", "ca"} & set(known)
    assert model.unknown_words("A cat, the WHALE.") == {}


def test_an_unknown_word_offers_the_nearest_but_never_a_letter(model: Diffuser) -> None:
    unknown = model.unknown_words("a whales on teh zzzz, t")
    assert list(unknown) == ["whales", "teh", "zzzz", "t"]
    assert unknown["whales"][0] == "whale"
    assert unknown["teh"][0] == "the"
    assert unknown["zzzz"] == []
    assert not {"a", "i", "of", "in"} & {word for near in unknown.values() for word in near}


def test_punctuation_that_the_model_does_not_know_is_reported(model: Diffuser) -> None:
    with pytest.raises(UnknownWordError, match=r"':' \(leave it out\)") as caught:
        model.check_prompt("a cat: a whals")
    assert caught.value.suggestions == {":": [], "whals": ["whale"]}


def test_punctuation_at_the_end_changes_nothing(model: Diffuser) -> None:
    model.check_prompt("a cat!")
    assert model.vocabulary.unknown_words('"a cat"') == {'"': []}
    assert torch.equal(model.text_embeddings(["a cat!"]), model.text_embeddings(["a cat"]))


def test_each_bad_prompt_has_its_error(model: Diffuser) -> None:
    for empty in ("", "  ", ",.,"):
        with pytest.raises(EmptyPromptError, match="empty"):
            model.check_prompt(empty)
    with pytest.raises(PromptTooLongError, match=r"30 words.*at most 22 words.*Leave out at least 8") as caught:
        model.check_prompt("cat " * 30)
    assert (caught.value.n_tokens, caught.value.limit) == (30, 22)
    model.check_prompt("cat " * 22)
    assert issubclass(UnknownWordError, PromptError)
    assert issubclass(PromptError, ValueError)


def test_a_vocabulary_with_every_byte_knows_every_word() -> None:
    letters = [chr(0x100 + i) for i in range(256)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {token: i for i, token in enumerate(tokens)}
    vocabulary = Vocabulary(CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77))
    assert vocabulary.unknown_words("a floccinaucinihilipilification") == {}
    assert vocabulary.known_words == ()
    assert (vocabulary.window, vocabulary.limit) == (75, 300)


def speller(length: int = 77, **settings: str) -> CLIPTokenizer:
    """A tokenizer that spells the letters a to z and the signs of a learned concept."""
    letters = [*"abcdefghijklmnopqrstuvwxyz<>_123"]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length, **settings
    )


def test_a_learned_concept_has_all_its_vectors_where_it_stands() -> None:
    tokenizer = speller()
    tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2", "<one>"])
    vocabulary = Vocabulary(tokenizer, 77)
    prompt = "a <toy> on <one> b"
    from diffusers.loaders import TextualInversionLoaderMixin

    theirs = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    assert theirs == "a <toy> <toy>_1 <toy>_2 on <one> b"
    expected = tokenizer(theirs).input_ids
    (window,) = vocabulary.windows(prompt)
    assert window[: len(expected)] == expected
    spans = vocabulary.token_spans(prompt)
    assert spans[:6] == [(0, 0), (0, 1), *[(2, 7)] * 3, (8, 9)]
    assert len(spans) == 77
    Vocabulary(tokenizer, 8).check_length("<toy> <toy>")
    with pytest.raises(PromptTooLongError, match="9 tokens"):
        Vocabulary(speller_with_toy(), 4).check_length("<toy> <toy> <toy>")


def speller_with_toy() -> CLIPTokenizer:
    tokenizer = speller()
    tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2"])
    return tokenizer


@pytest.mark.parametrize(("stated", "positions", "window"), [(10**30, 77, 75), (100, 77, 75), (40, 77, 38)])
def test_a_window_is_what_both_the_tokenizer_and_the_encoder_allow(stated: int, positions: int, window: int) -> None:
    assert Vocabulary(speller(stated), positions).window == window


def test_a_tokenizer_without_its_marks_is_refused() -> None:
    tokenizer = speller()
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match=r"no pad_token; a CLIP tokenizer is needed.*tokenizer_config\.json"):
        Vocabulary(tokenizer, 77)
