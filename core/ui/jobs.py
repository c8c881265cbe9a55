"""The long jobs, drawing, reading, measuring, as generators that say how far they are and stop when nobody wants them.

A job yields after every U-Net call. It is stopped by its ticket (Cancel, a newer job, a closed page) or by closing
the generator (a client that cancels); either way the engine's generator is closed, which frees the model.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from core.images import prepare_image
from core.information.results import Attribution
from core.ui.dictionary import no_concepts
from core.ui.images import data_url
from core.ui.inputs import picture_note
from core.ui.runtime import Runtime
from core.ui.scene import Scene

if TYPE_CHECKING:
    from core.layout import Layout
    from core.trace import Trace, Tracer

_FRAME_SIDE = 160
"""Largest side of a preview on the film strip, in pixels."""


class Waiting(NamedTuple):
    """Nothing computes yet."""

    text: str


class Drawing(NamedTuple):
    """A picture is being drawn."""

    frames: tuple[str, ...]
    """Previews so far, as data URLs."""
    n_steps: int
    """Steps in all."""
    latest: Image.Image
    """The newest preview."""
    seconds_left: float
    """At the pace so far."""


class Measuring(NamedTuple):
    """A picture's words are being measured."""

    n_evals: int
    """U-Net evaluations so far."""
    error: float | None
    """Largest relative error of a word so far."""
    partial: Attribution | None
    """What is known so far."""
    share: float
    """Part of the work that is done, 0..1, at the present spread."""
    seconds_left: float
    """At the pace so far."""


class JobError(RuntimeError):
    """The job cannot be done, for a reason that the user can read."""


def draw(
    runtime: Runtime, ticket: int | None, prompt: str, seed: int, steps: int, guidance: float
) -> Generator[Waiting | Drawing | Scene, None, None]:
    """Draw a picture; the last item is its scene, unless the job was cancelled. A ticket of None is always wanted."""
    yield from _wait_for_model(runtime, ticket)
    if not _wanted(runtime, ticket):
        return
    frames: list[str] = []
    started = time.monotonic()
    with closing(runtime.run(2 * steps, _drawn, prompt, seed, steps, guidance)) as items:
        for item in items:
            if not _wanted(runtime, ticket):
                return
            if isinstance(item, _Drawn):
                scene = Scene(item.image, prompt, seed, steps, guidance, tuple(frames))
                if item.trace:
                    runtime.keep_trace(scene.key, item.trace)
                yield scene
                return
            frames.append(_frame(item.image))
            pace = (time.monotonic() - started) / len(frames)
            yield Drawing(tuple(frames), steps, item.image, pace * (steps - len(frames)))


def bring(
    runtime: Runtime, ticket: int | None, picture: Path, caption: str, seed: int
) -> Iterator[Waiting | tuple[Scene, str]]:
    """Make a scene of a picture that somebody brought; the last item is the scene, and what was done to it."""
    yield from _wait_for_model(runtime, ticket)
    if _wanted(runtime, ticket):
        runtime.model.check_prompt(caption)
        image = prepare_image(picture, runtime.model.image_size)
        yield Scene(image, caption, seed, runtime.spec.num_inference_steps, 1.0, own=True), picture_note(picture)


def measure(
    runtime: Runtime, ticket: int | None, scene: Scene, given: str, rel_error: float, words: list[str] | None = None
) -> Generator[Waiting | Measuring | Attribution, None, None]:
    """Measure what each word told the picture; the last item is the result, unless the job was cancelled."""
    yield from _wait_for_model(runtime, ticket)
    if not _wanted(runtime, ticket):
        return
    started = time.monotonic()
    work = runtime.engine.attribute_iter(
        runtime.model,
        scene.image,
        scene.prompt,
        seed=scene.seed,
        words=words,
        given=given,
        rel_error=rel_error,
        num_inference_steps=scene.steps,
    )
    with closing(work) as items:
        for item in items:
            if not _wanted(runtime, ticket):
                return
            if isinstance(item, Attribution):
                yield item
                return
            needed = max(item.expected_evals, item.n_evals)
            pace = (time.monotonic() - started) / item.n_evals
            error = item.rel_error if item.partial is not None else None
            share = item.n_evals / needed
            yield Measuring(item.n_evals, error, item.partial, share, pace * (needed - item.n_evals))


def trace(runtime: Runtime, ticket: int | None, scene: Scene) -> "Generator[Waiting | Trace, None, None]":
    """The codes of a scene; the last item is the trace, unless the job was cancelled or there are no concepts.

    A stored example is drawn once more for it; noise is added to a picture that somebody brought.
    """
    yield from _wait_for_model(runtime, ticket)
    dictionary, kept = runtime.dictionary, runtime.trace(scene.key)
    if dictionary is None or not _wanted(runtime, ticket):
        return
    if kept is not None:
        yield kept
        return
    yield Waiting("Reading the concepts…")
    with closing(runtime.run(2 * scene.steps, _traced, scene)) as items:
        for item in items:
            if not _wanted(runtime, ticket):
                return
            if item is not None:
                runtime.keep_trace(scene.key, item)
                yield item


def foretell(
    runtime: Runtime, ticket: int | None, prompt: str, seed: int, **options: Any
) -> "Generator[Waiting | Layout, None, None]":
    """Foretell a layout; the last item is it. The options are those of `core.predict_layout`."""
    yield from _wait_for_model(runtime, ticket)
    if runtime.dictionary is None:
        raise JobError(no_concepts(runtime.name))
    if _wanted(runtime, ticket):
        source = runtime.dictionary.source
        yield runtime.engine.predict_layout(runtime.model, prompt, seed=seed, source=source, **options)


class _Drawn(NamedTuple):
    """A picture that is finished, and its codes where there are concepts."""

    image: Image.Image
    trace: "Trace | None"


def _drawn(runtime: Runtime, prompt: str, seed: int, steps: int, guidance: float) -> Generator[Any, None, None]:
    """Previews, and last what was drawn."""
    tracer = _tracer(runtime)
    watched = {"contexts": [tracer.context]} if tracer else {}
    work = runtime.model.generate_iter(prompt, seed=seed, num_inference_steps=steps, guidance_scale=guidance, **watched)
    with closing(work) as items:
        for item in items:
            yield _Drawn(item.image, tracer.trace() if tracer else None) if hasattr(item, "latents") else item


def _traced(runtime: Runtime, scene: Scene) -> "Generator[Trace | None, None, None]":
    """None after each step; last the trace."""
    from core.trace import trace_image

    dictionary, tracer, model = runtime.dictionary, _tracer(runtime), runtime.model
    if dictionary is None or tracer is None:
        return
    if scene.own:
        settings = {"seed": scene.seed, "num_inference_steps": scene.steps}
        yield trace_image(model, scene.image, scene.prompt, dictionary.saes, **settings)
        return
    run = {"num_inference_steps": scene.steps, "guidance_scale": scene.guidance}
    with closing(model.sample([scene.prompt], seeds=[scene.seed], contexts=[tracer.context], **run)) as states:
        for _ in states:
            yield None
    yield tracer.trace()


def _tracer(runtime: Runtime) -> "Tracer | None":
    """What reads the concepts of a picture while it is drawn."""
    if runtime.dictionary is None:
        return None
    from core.trace import Tracer

    return Tracer(runtime.model, runtime.dictionary.saes)


def _wanted(runtime: Runtime, ticket: int | None) -> bool:
    return ticket is None or runtime.tickets.live(ticket)


def _wait_for_model(runtime: Runtime, ticket: int | None) -> Iterator[Waiting]:
    while not runtime.ready.wait(0.25):
        if not _wanted(runtime, ticket):
            return
        yield Waiting(f"Waiting for the model: {runtime.badge()[1]}")
    if runtime.error:
        raise JobError(f"The model could not be loaded: {runtime.error}")


def _frame(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_FRAME_SIDE, _FRAME_SIDE))
    return data_url(small, quality=80)
