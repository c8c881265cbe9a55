"""API endpoints of the further questions: `/decompose`, `/rank_captions`, `/change_word`, `/likelihood`."""

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from core.diffusion.text import distinct_words
from core.information.decomposition import Decomposition
from core.information.ranking import Ranking
from core.ui.backend.errors import refuse
from core.ui.backend.fields import IMAGE_OPTIONS, PROGRESS, ChoiceField, ImageField, NumberField, TextField, told
from core.ui.backend.inputs import (
    MAX_QUERY,
    bits_error_problem,
    captions_problem,
    certainty_problem,
    image_problem,
    prompt_problem,
    rel_error_problem,
    seed_problem,
    split_captions,
)
from core.ui.backend.jobs import MeasurementProgress, Waiting, load_user_image
from core.ui.backend.runtime import MAX_PROMPT, Runtime
from core.ui.look.scene import Scene
from core.ui.questions import jobs
from core.ui.questions.ranking import ranking_dict

if TYPE_CHECKING:
    from core.information.counterfactual import WordChange

MAX_WORDS = 8
"""Words that are decomposed at once; W of them cost 1 + W + W (W - 1) / 2 prompts per noise sample."""


def build_questions_api(runtime: Runtime) -> None:
    """Add the endpoints to the surrounding `gr.Blocks`."""

    def decompose(
        image: str, prompt: str, words: str, given: str, rel_error: float, seed: float, progress: gr.Progress = PROGRESS
    ) -> Iterator[Any]:
        """Decompose what pairs of `words` (separated by commas; all of the prompt if empty) contribute to `image`.

        `given` is `rest` (on top of the other words) or `nothing` (on their own). Returns, for every pair, its
        redundancy, unique and synergistic information, each with its total in bits, map and errors; and the settings.
        """
        refuse(image_problem(image), prompt_problem(runtime, prompt))
        refuse(rel_error_problem(rel_error), seed_problem(seed))
        wanted = [word.strip() for word in (words or "").split(",") if word.strip()] or distinct_words(prompt)
        refuse(_too_many(wanted))
        work = _decomposition(image, prompt.strip(), wanted, given, float(rel_error), int(seed))
        for item in told(work, progress):
            yield _jsonable(item.to_dict()) if isinstance(item, Decomposition) else gr.skip()

    def rank_captions(
        image: str, captions: str, certainty: float, seed: float, progress: gr.Progress = PROGRESS
    ) -> Iterator[Any]:
        """Rank captions (one per line) by how well they fit `image`, until the order is right with `certainty`.

        Returns the order, the bits of each caption over an empty prompt (direct), the differences between each two,
        probabilities, and the orthogonal bits by which Kong et al. 2024 rank.
        """
        refuse(image_problem(image), captions_problem(runtime, captions))
        refuse(certainty_problem(certainty), seed_problem(seed))
        for item in told(_ranking(image, split_captions(captions), float(certainty), int(seed)), progress):
            yield _jsonable(ranking_dict(item)) if isinstance(item, Ranking) else gr.skip()

    def change_word(
        image: str, prompt: str, word: str, to: str, progress: gr.Progress = PROGRESS
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Regenerate `image` from its own noise, with its prompt and with `word` replaced by `to` (empty: removed).

        Returns both images and the map of the change, with the error of regenerating the image unchanged.
        """
        refuse(image_problem(image), prompt_problem(runtime, prompt))
        refuse(prompt_problem(runtime, to) if (to or "").strip() else None)
        for item in told(_change(image, prompt.strip(), word, (to or "").strip() or None), progress):
            if isinstance(item, Waiting | MeasurementProgress):
                yield gr.skip(), gr.skip(), gr.skip()
            else:
                yield item.before, item.after, _change_dict(item)

    def likelihood(
        image: str, prompt: str, error: float, seed: float, progress: gr.Progress = PROGRESS
    ) -> Iterator[Any]:
        """Bits per dimension of `image` under the model, with `prompt` and without, to a standard `error`.

        Returns both, how many bits the prompt saves in all, and the two error curves, each with errors; and the
        settings.
        """
        refuse(image_problem(image), prompt_problem(runtime, prompt))
        refuse(bits_error_problem(error), seed_problem(seed))
        for item in told(_likelihood(image, prompt.strip(), float(error), int(seed)), progress):
            yield gr.skip() if isinstance(item, Waiting | MeasurementProgress) else _jsonable(item.to_dict())

    def _decomposition(
        image: str, prompt: str, words: list[str], given: str, rel_error: float, seed: int
    ) -> Generator[Any, None, None]:
        scene = yield from _scene_of(runtime, image, prompt, seed)
        yield from jobs.decompose(runtime, None, scene, words, given, rel_error)

    def _ranking(image: str, captions: list[str], certainty: float, seed: int) -> Generator[Any, None, None]:
        scene = yield from _scene_of(runtime, image, captions[0], seed)
        yield from jobs.rank_captions(runtime, None, scene, captions, certainty)

    def _change(image: str, prompt: str, word: str, to: str | None) -> Generator[Any, None, None]:
        scene = yield from _scene_of(runtime, image, prompt, 0)
        yield from jobs.change_word(runtime, None, scene, word, to)

    def _likelihood(image: str, prompt: str, error: float, seed: int) -> Generator[Any, None, None]:
        scene = yield from _scene_of(runtime, image, prompt, seed)
        yield from jobs.likelihood(runtime, None, scene, error)

    with gr.Group(visible=False):
        image = ImageField(label="image", **IMAGE_OPTIONS)
        prompt = TextField(label="prompt")
        words = TextField(value="", label="words", max_length=MAX_PROMPT)
        given = ChoiceField(["rest", "nothing"], value="rest", label="given")
        rel_error = NumberField(value=0.1, label="rel_error")
        seed = NumberField(value=0, label="seed")
        captions = TextField(label="captions", lines=2)
        certainty = NumberField(value=0.95, label="certainty")
        word = TextField(label="word", max_length=MAX_QUERY)
        to = TextField(value="", label="to")
        error = NumberField(value=0.01, label="error")
        gr.Button().click(
            decompose,
            [image, prompt, words, given, rel_error, seed],
            gr.JSON(label="decomposition"),
            api_name="decompose",
        )
        gr.Button().click(
            rank_captions,
            [image, captions, certainty, seed],
            gr.JSON(label="ranking"),
            api_name="rank_captions",
        )
        gr.Button().click(
            change_word,
            [image, prompt, word, to],
            [gr.Image(label="before", format="png"), gr.Image(label="after", format="png"), gr.JSON(label="change")],
            api_name="change_word",
        )
        gr.Button().click(
            likelihood,
            [image, prompt, error, seed],
            gr.JSON(label="likelihood"),
            api_name="likelihood",
        )


def _scene_of(runtime: Runtime, image: str, prompt: str, seed: int) -> Generator[Waiting, None, Scene]:
    """The scene of an uploaded image."""
    for item in load_user_image(runtime, None, Path(image), prompt, seed):
        if not isinstance(item, Waiting):
            return item[0]
        yield item
    raise AssertionError("a job without a ticket cannot be cancelled")


def _too_many(words: list[str]) -> str | None:
    if len(words) <= MAX_WORDS:
        return None
    return f"{len(words)} words make too many pairs; name at most {MAX_WORDS} of the prompt's, separated by commas."


def _change_dict(changed: "WordChange") -> dict[str, Any]:
    names = ("word", "to", "changed_prompt", "relative_change", "reconstruction_error", "n_evals")
    return {**{name: getattr(changed, name) for name in names}, "change": changed.change.tolist()}


def _jsonable(document: dict[str, Any]) -> Any:
    """A document reduced to plain JSON types."""
    return json.loads(json.dumps(document))
