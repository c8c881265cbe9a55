"""Words of a prompt, and prompts with words left out. Imports no torch.

Attribution compares a prompt with the same prompt without a word. The embedded model is trained on texts made by these
same functions, so that every comparison is between texts that it knows.

Words are those of Unicode's text segmentation (UAX 29, https://unicode.org/reports/tr29), in the form that the standard
leaves to its users: a letter keeps its combining marks, an emoji is one word however many characters it has, and
numbers keep their decimal mark. Unlike there, hyphens join a word, a full stop joins single letters only ("U.S."), and
scripts without spaces are not cut, which would take a dictionary. Two spellings of one word are the same word: composed
or decomposed, with a straight or a curly apostrophe, in capitals or not.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import regex

from core.arguments import as_items

_SIGN = r"[\p{L}\p{N}][\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]*+"
_INSIDE = r"\p{Pc}++|[-‐‑'’＇·‧״]|(?<=\p{Nd})[.,](?=\p{Nd})|(?<=(?<![\p{L}\p{N}])\p{L})\.(?=\p{L}(?![\p{L}\p{N}]))"
_PICTURE = r"(?=[\p{Extended_Pictographic}\p{RI}☀-➿--[©®™]]|[#*]\uFE0F?\u20E3)\X"
_WORD = regex.compile(rf"{_SIGN}(?:(?:{_INSIDE})?{_SIGN})*+|{_PICTURE}", regex.VERSION1)

_SPELLINGS = str.maketrans({"’": "'", "＇": "'", "‐": "-", "‑": "-", "\u00ad": None, "\ufe0f": None})


class Word(NamedTuple):
    """One occurrence of a word, or of a phrase of several, in a prompt."""

    text: str
    """The word in lower case and composed (NFC), without punctuation; a phrase's words are joined by one space."""
    start: int
    """Index of its first character."""
    end: int
    """Index after its last character."""


def split_words(prompt: str) -> list[Word]:
    """Every occurrence of every word, in order. Hyphens and apostrophes inside a word belong to it."""
    return list(_split(prompt))


def distinct_words(prompt: str) -> list[str]:
    """The different words of a prompt, lower case, in the order of their first occurrence."""
    return list(dict.fromkeys(word.text for word in split_words(prompt)))


def plain(phrase: str) -> str:
    """A word or phrase as `Word.text` has it: `" Hot  dog,"` is `"hot dog"`; empty where there is no word."""
    return " ".join(word.text for word in split_words(phrase))


def occurrences(prompt: str, phrases: str | Iterable[str]) -> list[Word]:
    """Where words or phrases stand in a prompt, in order, without overlaps: of two that overlap, the longer is taken.

    A phrase occurs where its words follow each other with nothing but space between them.
    """
    words = split_words(prompt)
    found = [word for phrase in as_items(phrases) for word in _occurrences(prompt, words, plain(phrase))]
    taken: list[Word] = []
    for word in sorted(set(found), key=lambda w: (w.start - w.end, w.start)):
        if all(word.end <= other.start or word.start >= other.end for other in taken):
            taken.append(word)
    return sorted(taken, key=lambda w: w.start)


def delete_words(prompt: str, words: str | Iterable[str]) -> str:
    """The prompt without any occurrence of `words`, which may be phrases; the condition of CMI.

    What is left is a prompt that somebody could have written: spaces are closed up, a mark that no longer separates two
    words goes, and so do brackets, quotes and weights round what is gone. `"a cat, a dog"` without `cat` is `"a, a
    dog"`, without `dog` is `"a cat, a"`; `"a (cat:1.3) on grass"` without `cat` is `"a on grass"`; and a prompt
    that has no word left is the empty text.
    """
    gone = [word for phrase in as_items(words) for word in occurrences(prompt, phrase)]
    return _without(prompt, gone) if gone else prompt


def only_words(prompt: str, words: str | Iterable[str]) -> str:
    """The first occurrence of each of `words` in the prompt, joined by spaces; compared with the empty text by MI."""
    first = [found[0] for phrase in as_items(words) if (found := occurrences(prompt, phrase))]
    return " ".join(prompt[start:end] for start, end in _spans(first))


def replace_word(prompt: str, word: str, to: str) -> str:
    """The prompt with every occurrence of a word or phrase replaced by another word, or by several."""
    for found in reversed(occurrences(prompt, word)):
        prompt = prompt[: found.start] + to + prompt[found.end :]
    return prompt


@lru_cache(4096)
def _split(prompt: str) -> tuple[Word, ...]:
    return tuple(Word(_spelt(m.group()), m.start(), m.end()) for m in _WORD.finditer(prompt))


def _spelt(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower().translate(_SPELLINGS))


def _occurrences(prompt: str, words: Sequence[Word], phrase: str) -> list[Word]:
    wanted = phrase.split()
    found: list[Word] = []
    for i in range(len(words) - len(wanted) + 1 if wanted else 0):
        run = words[i : i + len(wanted)]
        gaps = (prompt[a.end : b.start] for a, b in pairwise(run))
        follows = not found or run[0].start >= found[-1].end
        if follows and [word.text for word in run] == wanted and all(gap.isspace() for gap in gaps):
            found.append(Word(phrase, run[0].start, run[-1].end))
    return found


def _spans(words: Iterable[Word]) -> list[tuple[int, int]]:
    """Start and end of what words cover, in order; overlapping ones are one."""
    spans: list[tuple[int, int]] = []
    for _, start, end in sorted(words, key=lambda w: w.start):
        if spans and start < spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((start, end))
    return spans


# --- what is left where a word is gone --------------------------------------------------------------------------------

_GONE = "\uffff"
"""Stands where a word was; no character of Unicode."""
_MARKS = ",.;:!?…、。，；：！？،؛؟।"
"""Marks that stand directly after a word and separate it from the next."""
_OPEN = r"\p{Ps}\p{Pi}<„‚»›”’"
_CLOSE = r"\p{Pe}\p{Pf}>“‘«‹"
_QUOTES = "\"'`"
_BETWEEN = rf"[^\p{{L}}\p{{N}}\p{{M}}\p{{Cf}}\p{{Extended_Pictographic}}\p{{RI}}{_OPEN}{_CLOSE}{_QUOTES}{_GONE}]"
_LOST = rf"{_GONE}(?:(?P<middle>{_BETWEEN}*+){_GONE})*+"
_EMPTY_BRACKETS = regex.compile(
    rf"[{_OPEN}]{_BETWEEN}*+{_LOST}(?:\s*:\s*[+-]?[\d.]+)?{_BETWEEN}*+[{_CLOSE}](?:[+-]+(?!\w)|[\d.]*\d(?!\w))?"
)
_EMPTY_QUOTES = regex.compile(rf"(?<!\w)([{_QUOTES}]+)[^\w\s{_QUOTES}{_GONE}]*+{_LOST}[^\w\s{_QUOTES}]*+\1(?!\w)")
_PAIRED = regex.compile(rf"[{_OPEN}{_CLOSE}{_QUOTES}]")
_ROUND_GONE = regex.compile(
    rf"(?P<before>^|[{_OPEN}](?=\s*+{_BETWEEN}*+{_GONE})|[{_QUOTES}](?={_GONE}))?"
    rf"(?P<left>{_BETWEEN}*+){_LOST}(?P<right>{_BETWEEN}*+)"
    rf"(?P<after>$|(?=[{_CLOSE}])|(?<={_GONE})(?=[{_QUOTES}]))?"
)
_SIGN_BEFORE_GONE = regex.compile(r"(?<=\s)\S+$")
_SIGN_AFTER_GONE = regex.compile(rf"^[^\s{_MARKS}]\S*(?=\s)")
_SIGN_AFTER_WORD = regex.compile(rf"[^\s{_MARKS}]+(?=\s)")


def _without(prompt: str, gone: Sequence[Word]) -> str:
    """The prompt without these words. All but their surroundings stays as it is, but for runs of white space."""
    pieces, at = [], 0
    for start, end in _spans(gone):
        pieces.append(prompt[at:start].replace(_GONE, " "))
        at = end
    text = " ".join(_GONE.join([*pieces, prompt[at:].replace(_GONE, " ")]).split())
    before = ""
    while text != before and _PAIRED.search(text):
        before, text = text, _EMPTY_QUOTES.sub(_GONE, _EMPTY_BRACKETS.sub(_GONE, text))
    text = _ROUND_GONE.sub(_closed_up, text).strip()
    return text if _WORD.search(text) else ""


def _closed_up(match: "regex.Match[str]") -> str:
    """What stands between two words where those between them are gone."""
    before, after = match["before"], match["after"]
    if before is not None or after is not None:
        return before or ""
    left, right = match["left"], match["right"]
    # A sign directly at a word belongs to it, as in "#cat" or "50%": with the word it stays or goes.
    left, right = _SIGN_BEFORE_GONE.sub("", left), _SIGN_AFTER_GONE.sub("", right)
    ours, theirs = _SIGN_AFTER_WORD.match(left), _SIGN_BEFORE_GONE.search(right)
    left, kept_before = (left[ours.end() :], ours.group()) if ours else (left, "")
    right, kept_after = (right[: theirs.start()], theirs.group()) if theirs else (right, "")
    return kept_before + _separator([left, *match.captures("middle"), right]) + kept_after


def _separator(gaps: Sequence[str]) -> str:
    """One separator in place of those round what is gone, which are in `gaps`; of several, the first."""
    marks = [gap for gap in gaps if gap.strip()]
    # A sign that joins two words without space, as in "cat/dog", goes with one of them.
    marks = [gap for gap in marks if len(marks) > 1 or gap.strip()[0] in _MARKS or gap != gap.strip()]
    if not marks:
        return " "
    mark = marks[0].split()[0]
    spaced = any(gap[-1:].isspace() for gap in gaps)
    if mark[0] in _MARKS:
        return mark + (" " if spaced else "")
    return f" {mark} " if spaced else mark
