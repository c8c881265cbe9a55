"""Which words a model knows, and the nearest known words to one that it does not.

The vocabulary of CLIP has every byte as a token, so that any text can be spelled and no word is unknown. That of a
small model has whole words; any other word is split into letters, or becomes the end token, and means nothing to the
model.
"""

import difflib
from collections.abc import Sequence
from itertools import count, takewhile
from typing import TYPE_CHECKING, TypeVar

from core.diffusion.text import split_words
from core.errors import EmptyPromptError, ModelError, PromptTooLongError, UnknownWordError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

ItemT = TypeVar("ItemT")

_END = "</w>"
_ONE_LETTER = frozenset({"a", "i"})
_N_BYTES = 256
_MAX_WINDOWS = 4
"""Maximum number of windows in which a long prompt is read; each adds to the work of every attention layer."""


class Vocabulary:
    """The words and the length of prompt that a CLIP tokenizer can represent."""

    known_words: tuple[str, ...]
    """Whole words of a word-level vocabulary, sorted; empty where any text can be spelled."""
    window: int
    """Maximum number of tokens that the text encoder reads at once, without start and end."""
    limit: int
    """Maximum number of tokens in a prompt. A model that can spell any text reads a long prompt window by window; one
    with a vocabulary of its own was not trained on long prompts."""

    def __init__(self, tokenizer: "CLIPTokenizer", n_positions: int | None = None) -> None:
        """`n_positions` is the most tokens that the text encoder reads at once, where the tokenizer states no length or
        a longer one.

        Raises:
            ModelError: The tokenizer has no start, end or padding token.
        """
        self._tokenizer = tokenizer
        marks = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        missing = [f"{name}_token" for name, token in marks.items() if token is None]
        if missing:
            raise ModelError(
                f"The tokenizer has no {' and no '.join(missing)}; a CLIP tokenizer is needed, with all three. Name "
                f"them in tokenizer/tokenizer_config.json (the padding of Stable Diffusion 1 is <|endoftext|>)."
            )
        self._start, self._end, self._padding = (int(marks[name]) for name in ("bos", "eos", "pad"))
        self._following = _learned_vectors(tokenizer)
        longest = int(tokenizer.model_max_length)
        self.window = (longest if n_positions is None else min(longest, n_positions)) - 2
        vocabulary = tokenizer.get_vocab()
        n_letters = sum(len(token.removesuffix(_END)) == 1 and token.endswith(_END) for token in vocabulary)
        self.spells_anything = n_letters >= _N_BYTES
        self.limit = self.window * (_MAX_WINDOWS if self.spells_anything else 1)
        stems = {token.removesuffix(_END) for token in vocabulary if token.endswith(_END)}
        words = () if self.spells_anything else sorted(stem for stem in stems if self._is_word(stem))
        self.known_words = tuple(words)

    def unknown_words(self, prompt: str, n: int = 4) -> dict[str, list[str]]:
        """Each unknown word (or mark) of the prompt with up to `n` of the nearest known words, nearest first."""
        if self.spells_anything:
            return {}
        pieces: list[str] = []
        at = 0
        for word in split_words(prompt):
            pieces += [*prompt[at : word.start].split(), word.text]
            at = word.end
        if self._tokenizer.unk_token_id != self._tokenizer.pad_token_id:
            pieces += prompt[at:].split()  # otherwise a full stop becomes one more end token, which is also the padding
        return {piece: self._nearest(piece, n) for piece in dict.fromkeys(pieces) if not self._knows(piece)}

    def check(self, prompt: str) -> None:
        """Raise the `PromptError` that fits an empty, overlong or unknown prompt."""
        words = split_words(prompt)
        if not words:
            raise EmptyPromptError
        unknown = self.unknown_words(prompt)
        if unknown:
            raise UnknownWordError(unknown)
        self.check_length(prompt)

    def check_length(self, prompt: str) -> None:
        """Raise `PromptTooLongError` where the model would not read the whole prompt."""
        n_tokens = len(self._tokens(prompt))
        if n_tokens > self.limit:
            raise PromptTooLongError(n_tokens, self.limit, len(split_words(prompt)))

    def windows(self, prompt: str) -> list[list[int]]:
        """Token ids of the prompt, in windows of `window` tokens with start and end, padded; at least one window."""
        parts = _parts([token for token, _ in self._tokens(prompt)], self.window)
        return [[self._start, *part, self._end] + [self._padding] * (self.window - len(part)) for part in parts]

    def token_spans(self, prompt: str) -> list[tuple[int, int]]:
        """Start and end in the prompt of each token of `windows`; (0, 0) for start, end and padding."""
        none = (0, 0)
        return [
            span
            for part in _parts([span for _, span in self._tokens(prompt)], self.window)
            for span in (none, *part, none, *[none] * (self.window - len(part)))
        ]

    def _tokens(self, prompt: str) -> list[tuple[int, tuple[int, int]]]:
        """The id of each token, with its start and end in the prompt; a learned concept has all of its vectors."""
        encoded = self._tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        return [
            (token, tuple(span))
            for first, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for token in (first, *self._following.get(first, ()))
        ]

    def _knows(self, piece: str) -> bool:
        tokens = self._tokenizer.tokenize(piece)
        return all(token.endswith(_END) and self._is_word(token.removesuffix(_END), mark=True) for token in tokens)

    @staticmethod
    def _is_word(stem: str, mark: bool = False) -> bool:
        """Whether a whole token is a word, or with `mark` punctuation; single letters are not, but for a and i."""
        if len(stem) == 1:
            return stem in _ONE_LETTER or stem.isdigit() or (mark and not stem.isalpha())
        return bool(split_words(stem)) or mark

    def _nearest(self, word: str, n: int) -> list[str]:
        long_enough = [known for known in self.known_words if len(known) > 2]
        return difflib.get_close_matches(word.lower(), long_enough, n=n, cutoff=0.6)


def _learned_vectors(tokenizer: "CLIPTokenizer") -> dict[int, tuple[int, ...]]:
    """By the id of a learned concept's token, the ids of its further vectors.

    Textual inversion names the vectors of `<toy>` as `<toy>`, `<toy>_1`, `<toy>_2`, and diffusers puts all of them in
    where `<toy>` stands in a prompt.
    """
    added = tokenizer.get_added_vocab()
    following: dict[int, tuple[int, ...]] = {}
    for token, number in added.items():
        names = takewhile(added.__contains__, (f"{token}_{i}" for i in count(1)))
        following[number] = tuple(added[name] for name in names)
    return {number: others for number, others in following.items() if others}


def _parts(items: Sequence[ItemT], size: int) -> list[Sequence[ItemT]]:
    return [items[at : at + size] for at in range(0, max(len(items), 1), size)]
