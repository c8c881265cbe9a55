"""Errors that a user can cause; every message says how to fix it. Imports no torch."""

import difflib
import dis
from collections.abc import Mapping, Sequence

_OURS = ("core.", "training.")


def is_deliberate(error: BaseException, kinds: tuple[type[BaseException], ...] = (ValueError, LookupError)) -> bool:
    """Whether the project raised an error on purpose, so that its message is for the user.

    That is an exception class of its own, or one of these kinds that a `raise` in its code made, rather than Python or
    a library on behalf of a line of its code.
    """
    if type(error).__module__.startswith(_OURS):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, kinds):
        return False
    frame = trace.tb_frame
    by_raise = dis.opname[frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return by_raise and str(frame.f_globals.get("__name__")).startswith(_OURS)


class ModelError(ValueError):
    """A model that cannot be found or used."""


class OutOfMemory(ModelError):
    """A device has too little memory for the least that can be computed at once; the message says what to do."""

    n_rows: int
    """Size of the batch: how many latents, images or prompts."""

    def __init__(self, device: str, what: str, n_rows: int, available: int | None, why: str, remedy: str) -> None:
        self.n_rows = n_rows
        left = "" if available is None else f" ({available / 2**30:.1f} GiB are left for it)"
        super().__init__(
            f"{device} has too little memory for {what} with a batch of {n_rows}{left}: {why} {remedy}".rstrip()
        )


class NotFiniteError(ModelError):
    """A part of a model that computes NaN or infinity; the message says which, in which precision, and what to do."""

    part: str
    """The part, as the message begins: `The U-Net`."""
    dtype: str
    """What it computed in, such as `float16`."""

    def __init__(self, part: str, dtype: object) -> None:
        """`dtype` is torch's, or its name."""
        self.part, self.dtype = part, str(dtype).removeprefix("torch.")
        remedy = (
            "Its weights or what it was given are damaged: download or save the model again."
            if self.dtype == "float32"
            else 'They may exceed its range: load the model with dtype="float32".'
        )
        super().__init__(
            f"{part} gave values that are not finite (NaN or infinite), computed in {self.dtype}. {remedy}"
        )


class ArtifactError(ValueError):
    """A trained artifact, such as an SAE, that cannot be found or read."""


class ImageError(ValueError):
    """An image that cannot be used."""


class PromptError(ValueError):
    """A prompt that the model cannot use."""


class EmptyPromptError(PromptError):
    """A prompt without words."""

    def __init__(self) -> None:
        super().__init__("The prompt is empty. Describe the image in a few words.")


class PromptTooLongError(PromptError):
    """A prompt with more tokens than the model reads. Prompts are never truncated silently."""

    n_tokens: int
    """Tokens in the prompt, without the start and end tokens."""
    limit: int
    """The most tokens that the model reads."""

    def __init__(self, n_tokens: int, limit: int, n_words: int) -> None:
        self.n_tokens, self.limit, self.n_words = n_tokens, limit, n_words
        counted = f"{n_words} words" if n_words == n_tokens else f"{n_words} words ({n_tokens} tokens)"
        unit = "words" if n_words == n_tokens else "tokens"
        super().__init__(
            f"The prompt has {counted}; this model reads at most {limit} {unit}. Leave out at least {n_tokens - limit}."
        )


class UnknownWordError(PromptError):
    """Words that are not in the model's vocabulary."""

    suggestions: dict[str, list[str]]
    """Each unknown word with the nearest known words, nearest first; possibly none."""

    def __init__(self, suggestions: Mapping[str, Sequence[str]]) -> None:
        self.suggestions = {word: list(near) for word, near in suggestions.items()}
        advice = [
            f"{word!r} (try {', '.join(near)})" if near else f"{word!r} (leave it out)"
            for word, near in self.suggestions.items()
        ]
        super().__init__(f"This model does not know {', '.join(advice)}.")


class WordNotInPromptError(PromptError):
    """A word that is not in the prompt was requested."""

    def __init__(self, word: str, words: Sequence[str]) -> None:
        self.word, self.words = word, list(words)
        near = difflib.get_close_matches(word.lower(), words, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"{word!r} is not in the prompt.{hint} Its words are: {', '.join(words)}.")


class Cancelled(RuntimeError):
    """A callback stopped the work before there was a result."""
