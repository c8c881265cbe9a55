"""Words of a prompt, and prompts with words left out, under a short name for notebooks: see `core.diffusion.text`."""

from core.diffusion.text import (
    Word,
    delete_words,
    distinct_words,
    occurrences,
    only_words,
    plain,
    replace_word,
    split_words,
)

__all__ = [
    "Word",
    "delete_words",
    "distinct_words",
    "occurrences",
    "only_words",
    "plain",
    "replace_word",
    "split_words",
]
