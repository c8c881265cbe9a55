"""Further questions about a picture for programs: `/decompose`, `/rank_captions`, `/change_word`, `/likelihood`."""

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from core.diffusion.text import distinct_words
from core.information.decomposition import Decomposition
from core.information.ranking import Ranking
from core.ui.api import refuse, told
from core.ui.events import MODEL
from core.ui.inputs import (
    PICTURE,
    Number,
    Picture,
    bits_error_problem,
    captions_problem,
    certainty_problem,
    image_problem,
    other_word_problem,
    prompt_problem,
    rel_error_problem,
    seed_problem,
    split_captions,
)
from core.ui.jobs import Measuring, Waiting, bring
from core.ui.look.scene import Scene
from core.ui.questions.jobs import change, expect, rank, take_apart
from core.ui.questions.ranking import ranking_dict
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.information.counterfactual import WordChange

MAX_WORDS = 8
"""Words that are taken apart at once; W of them cost 1 + W + W (W - 1) / 2 texts a noise sample."""


def build_questions_api(runtime: Runtime) -> None:
    """Put the endpoints into the surrounding `gr.Blocks`."""

    def decompose(picture: str, prompt: str, words: str, given: str, rel_error: float, seed: float) -> Iterator[Any]:
        """What pairs of `words` (separated by commas; all of the prompt if empty) tell `picture`, in parts.

        Returns everything of every pair: redundancy, unique, synergy, each with its total, map and errors; settings.
        """
        refuse(image_problem(picture), prompt_problem(runtime, prompt))
        refuse(rel_error_problem(rel_error), seed_problem(seed))
        wanted = [word.strip() for word in (words or "").split(",") if word.strip()] or distinct_words(prompt)
        refuse(_too_many(wanted))
        for item in told(_decomposition(picture, prompt.strip(), wanted, given, float(rel_error), int(seed))):
            yield _jsonable(item.to_dict()) if isinstance(item, Decomposition) else gr.skip()

    def rank_captions(picture: str, captions: str, certainty: float, seed: float) -> Iterator[Any]:
        """Captions (one a line) in the order of how well they fit `picture`, until that is right with `certainty`.

        Returns the order, bits over nothing (direct), what lies between each two, chances, the published rule's bits.
        """
        refuse(image_problem(picture), captions_problem(runtime, captions))
        refuse(certainty_problem(certainty), seed_problem(seed))
        for item in told(_ranking(picture, split_captions(captions), float(certainty), int(seed))):
            yield _jsonable(ranking_dict(item)) if isinstance(item, Ranking) else gr.skip()

    def change_word(picture: str, prompt: str, word: str, to: str) -> Iterator[tuple[Any, Any, Any]]:
        """`picture` drawn again from its own noise, with its prompt and with `to` for a `word` of it (empty: left out).

        Returns both pictures, and how much changed where, beside the error of drawing it again.
        """
        refuse(image_problem(picture), prompt_problem(runtime, prompt), other_word_problem(runtime, to))
        for item in told(_change(picture, prompt.strip(), word, (to or "").strip() or None)):
            if isinstance(item, Waiting | Measuring):
                yield gr.skip(), gr.skip(), gr.skip()
            else:
                yield item.before, item.after, _change_dict(item)

    def likelihood(picture: str, prompt: str, error: float, seed: float) -> Iterator[Any]:
        """How many bits a dimension `picture` has for the model, with `prompt` and without, to a standard `error`.

        Returns both, what the prompt saves in all, the two error curves, each with its errors; settings.
        """
        refuse(image_problem(picture), prompt_problem(runtime, prompt))
        refuse(bits_error_problem(error), seed_problem(seed))
        for item in told(_likelihood(picture, prompt.strip(), float(error), int(seed))):
            yield gr.skip() if isinstance(item, Waiting | Measuring) else _jsonable(item.to_dict())

    def _decomposition(
        picture: str, prompt: str, words: list[str], given: str, rel_error: float, seed: int
    ) -> Iterator[Any]:
        scene = yield from _brought(runtime, picture, prompt, seed)
        yield from take_apart(runtime, None, scene, words, given, rel_error)

    def _ranking(picture: str, captions: list[str], certainty: float, seed: int) -> Iterator[Any]:
        scene = yield from _brought(runtime, picture, captions[0], seed)
        yield from rank(runtime, None, scene, captions, certainty)

    def _change(picture: str, prompt: str, word: str, to: str | None) -> Iterator[Any]:
        scene = yield from _brought(runtime, picture, prompt, 0)
        yield from change(runtime, None, scene, word, to)

    def _likelihood(picture: str, prompt: str, error: float, seed: int) -> Iterator[Any]:
        scene = yield from _brought(runtime, picture, prompt, seed)
        yield from expect(runtime, None, scene, error)

    with gr.Group(visible=False):
        picture = Picture(label="picture", **PICTURE)
        prompt = gr.Textbox(label="prompt")
        words = gr.Textbox(value="", label="words")
        given = gr.Radio(["rest", "nothing"], value="rest", label="given")
        rel_error = Number(value=0.1, label="rel_error")
        seed = Number(value=0, label="seed")
        captions = gr.Textbox(label="captions", lines=2)
        certainty = Number(value=0.95, label="certainty")
        word = gr.Textbox(label="word")
        to = gr.Textbox(value="", label="to")
        error = Number(value=0.01, label="error")
        gr.Button().click(
            decompose,
            [picture, prompt, words, given, rel_error, seed],
            gr.JSON(label="decomposition"),
            api_name="decompose",
            **MODEL,
        )
        gr.Button().click(
            rank_captions,
            [picture, captions, certainty, seed],
            gr.JSON(label="ranking"),
            api_name="rank_captions",
            **MODEL,
        )
        gr.Button().click(
            change_word,
            [picture, prompt, word, to],
            [gr.Image(label="before", format="png"), gr.Image(label="after", format="png"), gr.JSON(label="change")],
            api_name="change_word",
            **MODEL,
        )
        gr.Button().click(
            likelihood,
            [picture, prompt, error, seed],
            gr.JSON(label="likelihood"),
            api_name="likelihood",
            **MODEL,
        )


def _brought(runtime: Runtime, picture: str, prompt: str, seed: int) -> Generator[Waiting, None, Scene]:
    """The scene of a picture that a program brought."""
    for item in bring(runtime, None, Path(picture), prompt, seed):
        if not isinstance(item, Waiting):
            return item[0]
        yield item
    raise AssertionError("a job without a ticket is always wanted")


def _too_many(words: list[str]) -> str | None:
    if len(words) <= MAX_WORDS:
        return None
    return f"{len(words)} words make too many pairs; name at most {MAX_WORDS} of the prompt's, separated by commas."


def _change_dict(changed: "WordChange") -> dict[str, Any]:
    names = ("word", "to", "changed_prompt", "relative_change", "reconstruction_error", "n_evals")
    return {**{name: getattr(changed, name) for name in names}, "change": changed.change.tolist()}


def _jsonable(document: dict[str, Any]) -> Any:
    """Plain lists and numbers, as JSON would bring them."""
    return json.loads(json.dumps(document))
