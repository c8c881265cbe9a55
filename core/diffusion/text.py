"""Words of a prompt, and prompts with words left out.

Attribution compares a prompt with the same prompt less a word, and the embedded model is trained on exactly the texts
these functions make, so that every comparison is between texts that the model knows.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")


class Word(NamedTuple):
    """One occurrence of a word in a prompt."""

    text: str
    """Lower case, without the punctuation round it."""
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
    """The prompt without any occurrence of `words`; what CMI conditions on.

    Spaces close up, and punctuation that no longer stands between two words goes: `"a cat, a dog"` without `cat` is
    `"a, a dog"`, without `dog` is `"a cat, a"`, and a prompt that has no word left is the empty text.
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
    """The prompt with only the first occurrence of each of `words` left: compared with the empty text by MI and PID."""
    wanted = {word.lower() for word in words}
    kept: list[str] = []
    for word in split_words(prompt):
        if word.text in wanted:
            wanted.discard(word.text)
            kept.append(prompt[word.start : word.end])
    return " ".join(kept)


def replace_word(prompt: str, word: str, to: str) -> str:
    """The prompt with another word, or several, in the place of every occurrence of one."""
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
