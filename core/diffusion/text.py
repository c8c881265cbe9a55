"""Words of a prompt, and prompts with words left out.

Attribution compares a prompt with the same prompt without a word. The embedded model is trained on texts made by these
same functions, so that every comparison is between texts that it knows.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")


class Word(NamedTuple):
    """One occurrence of a word in a prompt."""

    text: str
    """The word in lower case, without punctuation."""
    start: int
    """Index of its first character."""
    end: int
    """Index after its last character."""


def split_words(prompt: str) -> list[Word]:
    """Every occurrence of every word, in order. Hyphens and apostrophes inside a word belong to it."""
    return [Word(m.group().lower(), m.start(), m.end()) for m in _WORD.finditer(prompt)]


def distinct_words(prompt: str) -> list[str]:
    """The different words of a prompt, lower case, in the order of their first occurrence."""
    return list(dict.fromkeys(word.text for word in split_words(prompt)))


def delete_words(prompt: str, words: Iterable[str]) -> str:
    """The prompt without any occurrence of `words`; the condition of CMI.

    Spaces are closed up, and punctuation that no longer separates two words is removed: `"a cat, a dog"` without `cat`
    is `"a, a dog"`, without `dog` is `"a cat, a"`, and a prompt that has no word left is the empty text.
    """
    gone = {word.lower() for word in words}
    pieces: list[str] = []
    at = 0
    for word in split_words(prompt):
        between = prompt[at : word.start]
        if word.text in gone:
            pieces.append(between)
        else:
            pieces.append(between + prompt[word.start : word.end])
        at = word.end
    pieces.append(prompt[at:])
    return _tidy("".join(pieces)) if gone else prompt


def only_words(prompt: str, words: Iterable[str]) -> str:
    """The first occurrence of each of `words` in the prompt, joined by spaces; compared with the empty text by MI."""
    wanted = {word.lower() for word in words}
    kept: list[str] = []
    for word in split_words(prompt):
        if word.text in wanted:
            wanted.discard(word.text)
            kept.append(prompt[word.start : word.end])
    return " ".join(kept)


def replace_word(prompt: str, word: str, to: str) -> str:
    """The prompt with every occurrence of a word replaced by another word, or by several."""
    for found in reversed(split_words(prompt)):
        if found.text == word.lower():
            prompt = prompt[: found.start] + to + prompt[found.end :]
    return prompt


def _tidy(text: str) -> str:
    text = " ".join(text.split())
    text = re.sub(r"\s+([,.;:!?])", r"\1", text)
    text = re.sub(r"([,.;:!?])(?:\s*[,.;:!?])+", r"\1", text)
    text = text.strip(" ,.;:!?")
    return text if _WORD.search(text) else ""
