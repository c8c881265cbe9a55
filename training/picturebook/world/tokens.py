"""The tokenizer of the embedded model: CLIP's own class over a vocabulary of whole words."""

from transformers import CLIPTokenizer

from training.picturebook.world.captions import vocabulary

MAX_TOKENS = 24
"""Length of a tokenized caption, start and end marks included."""
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """A `CLIPTokenizer` that keeps every word of the captions in one token.

    CLIP's byte-pair merges build each word from its letters, prefix by prefix. Without them every word would silently
    become the end mark. A merge made for one word can fire inside another ("a n" of "and" in "banana"); merges of words
    that come out in pieces therefore move to the front, until every word is whole.
    """
    words = [*vocabulary(), ","]
    order = list(words)
    for _ in range(len(words) ** 2):
        tokenizer = _tokenizer(order)
        broken = next((word for word in order if len(tokenizer.tokenize(word)) != 1), None)
        if broken is None:
            return tokenizer
        order.remove(broken)
        order.insert(0, broken)
    raise RuntimeError("no order of merges keeps every word whole")


def _tokenizer(words: list[str]) -> CLIPTokenizer:
    merges: dict[tuple[str, str], None] = {}
    pieces: dict[str, None] = {}
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        pieces.update(dict.fromkeys(letters))
        prefix = letters[0]
        for letter in letters[1:]:
            merges[prefix, letter] = None
            prefix += letter
            pieces[prefix] = None
    vocab = {token: index for index, token in enumerate([*sorted(pieces), _START, _END])}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=MAX_TOKENS)
