"""Long jobs (generating, tracing, measuring, editing) as generators that report progress and can be stopped.

A job yields after every U-Net call, and while it waits for the model (`core.ui.backend.queue`). It is stopped by its
ticket (Cancel, a newer job, a closed page) or by closing the generator (an API client that cancels); either way the
engine's generator is closed, which frees the model.
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from core.diffusion.images import prepare_image
from core.information.results import Attribution, Measurement, Progress
from core.job import Job
from core.ui.backend.dictionary import no_concepts
from core.ui.backend.errors import JobError
from core.ui.backend.inputs import decoding, image_note
from core.ui.backend.queue import Turn
from core.ui.backend.runtime import Runtime
from core.ui.look.images import data_url
from core.ui.look.scene import Scene

if TYPE_CHECKING:
    from core.concepts.layout import Layout
    from core.concepts.trace import CodeTrace, CodeTracer
    from core.diffusion.diffuser import Diffuser
    from core.edits import ConceptEdit
    from core.edits.metrics import OutOfRange

_FRAME_SIDE = 160
"""Largest side of a preview on the film strip, in pixels."""
MAX_EVALS = 20_000
"""U-Net evaluations that a request may take. The engine's own budget stays below it up to 38 words."""
_POLL_SECONDS = 0.25
"""How often a job that waits looks whether it is still wanted."""
_PREVIEW_SECONDS = 0.6
"""Between previews of edited images: decoding several takes a while."""


class Waiting(NamedTuple):
    """The job waits for the model."""

    text: str
    """What it waits for."""


class GenerationProgress(NamedTuple):
    """An image is being generated."""

    frames: tuple[str, ...]
    """Previews so far, as data URLs."""
    n_steps: int
    """Steps in all."""
    latest: Image.Image
    """The newest preview."""
    seconds_left: float
    """At the pace so far."""


class MeasurementProgress(NamedTuple):
    """Information is being measured."""

    n_evals: int
    """U-Net evaluations so far."""
    error: float | None
    """Relative error so far."""
    partial: Any
    """The unfinished result so far, or None."""
    share: float
    """Fraction of the work done, 0..1, at the spread seen so far."""
    seconds_left: float
    """At the pace so far."""


class EditProgress(NamedTuple):
    """An image is being regenerated with and without edits."""

    done: int
    """Steps so far."""
    n_steps: int
    """Steps in all."""
    frames: tuple[str, ...]
    """Previews as data URLs, the unedited one first; empty while the last ones are recent enough."""
    seconds_left: float
    """At the pace so far."""


class EditedImages(NamedTuple):
    """An image without edits, and one for each list of edits."""

    images: tuple[Image.Image, ...]
    """The unedited one first."""
    out_of_range: "tuple[OutOfRange, ...]"
    """For each edited image, how far the edited latents left the range seen in data."""


def generate(
    runtime: Runtime, ticket: int | None, prompt: str, seed: int, steps: int, guidance: float
) -> Generator[Waiting | GenerationProgress | Scene, None, None]:
    """Generate an image; the last item is its scene, unless the job was cancelled.

    A job whose ticket is None cannot be cancelled, here and below.
    """
    frames: list[str] = []
    started = time.monotonic()
    begin = partial(runtime.run, 2 * steps, _generate, prompt, seed, steps, guidance)
    with closing(in_turn(runtime, ticket, begin)) as items:
        for item in items:
            if isinstance(item, Waiting):
                started = time.monotonic()
                yield item
                continue
            if isinstance(item, _Generated):
                scene = Scene(item.image, prompt, seed, steps, guidance, tuple(frames))
                if item.trace:
                    runtime.cache_trace(scene.key, item.trace)
                yield scene
                return
            frames.append(_frame(item.image))
            pace = (time.monotonic() - started) / len(frames)
            yield GenerationProgress(tuple(frames), steps, item.image, pace * (steps - len(frames)))


def load_user_image(
    runtime: Runtime, ticket: int | None, path: Path, caption: str, seed: int
) -> Generator[Waiting | tuple[Scene, str], None, None]:
    """Make a scene of an uploaded image; the last item is the scene and a note on what was done to the image."""
    model = yield from _wait_for_model(runtime, ticket)
    if model is not None and _wanted(runtime, ticket):
        model.check_prompt(caption)
        with decoding():
            image = prepare_image(path, model.image_size)
        yield Scene(image, caption, seed, runtime.spec.num_inference_steps, 1.0, uploaded=True), image_note(path)


def measure(
    runtime: Runtime, ticket: int | None, scene: Scene, given: str, rel_error: float, words: list[str] | None = None
) -> Generator[Waiting | MeasurementProgress | Attribution, None, None]:
    """Measure the information of each word about the image; the last item is the result, unless cancelled."""
    work = in_turn(
        runtime,
        ticket,
        lambda: runtime.engine.attribute_iter(
            runtime.model,
            scene.image,
            scene.prompt,
            seed=scene.seed,
            words=words,
            given=given,
            rel_error=rel_error,
            max_evals=MAX_EVALS,
            num_inference_steps=scene.steps,
        ),
        lends=True,
    )
    yield from with_progress(work)


def in_turn(
    runtime: Runtime, ticket: int | None, begin: Callable[[], Iterable[Any]], lends: bool = False
) -> Generator[Any, None, None]:
    """`Waiting` until the model is loaded and it is the job's turn, then the job's items while it is wanted.

    Args:
        runtime: Has the model and the queue for it.
        ticket: The job's.
        begin: Begins the work, once the job has the model. A generator that it returns is closed.
        lends: Whether the work is a measurement, which can be suspended after each `Progress` for other jobs.

    Raises:
        JobError: Too many jobs are waiting, or the model could not be loaded.
    """
    turn = runtime.queue.join()
    try:
        yield from _wait_for_model(runtime, ticket)
        if not (yield from _wait_for_turn(runtime, ticket, turn)):
            return
        lends = lends and runtime.can_lend
        items = begin()
        try:
            for item in items:
                if not _wanted(runtime, ticket):
                    return
                yield item
                if lends and isinstance(item, Progress) and runtime.queue.gives_way(turn):
                    assert runtime.model is not None
                    take_back = runtime.model.lend()
                    if not (yield from _wait_for_turn(runtime, ticket, turn)):
                        return
                    take_back()
        finally:
            if isinstance(items, Generator | Job):
                items.close()
    finally:
        runtime.queue.leave(turn)


def with_progress(work: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """The items of a measurement, its progress as `MeasurementProgress`; the last one is its result."""
    started = last = time.monotonic()
    with closing(work):
        for item in work:
            now = time.monotonic()
            if isinstance(item, Waiting):
                started += now - last
            elif not isinstance(item, Measurement):
                needed = max(item.expected_evals, item.n_evals)
                pace = (now - started) / item.n_evals
                error = item.rel_error if item.partial is not None else None
                share = item.n_evals / needed
                item = MeasurementProgress(item.n_evals, error, item.partial, share, pace * (needed - item.n_evals))
            last = now
            yield item


def trace(runtime: Runtime, ticket: int | None, scene: Scene) -> "Generator[Waiting | CodeTrace, None, None]":
    """The codes of a scene; the last item is the trace, unless the job was cancelled or there are no concepts.

    A stored example is generated once more for it; to an uploaded image noise is added.
    """
    yield from _wait_for_model(runtime, ticket)
    dictionary, cached = runtime.dictionary, runtime.cached_trace(scene.key)
    if dictionary is None or not _wanted(runtime, ticket):
        return
    if cached is not None:
        yield cached
        return
    with closing(in_turn(runtime, ticket, partial(runtime.run, 2 * scene.steps, _trace, scene))) as items:
        for item in items:
            if item is None:
                yield Waiting("Reading the concepts…")
                continue
            if not isinstance(item, Waiting):
                runtime.cache_trace(scene.key, item)
            yield item


def predict_layout(
    runtime: Runtime, ticket: int | None, prompt: str, seed: int, **options: Any
) -> "Generator[Waiting | Layout, None, None]":
    """Predict a layout; the last item is it. The options are those of `core.predict_layout`."""
    yield from _wait_for_model(runtime, ticket)
    if runtime.dictionary is None:
        raise JobError(no_concepts(runtime.name))
    options["source"] = runtime.dictionary.source
    yield from in_turn(
        runtime, ticket, lambda: (runtime.engine.predict_layout(runtime.model, prompt, seed=seed, **options),)
    )


def intervene(
    runtime: Runtime, ticket: int | None, scene: Scene, edits: "Sequence[Sequence[ConceptEdit]]"
) -> "Generator[Waiting | EditProgress | EditedImages, None, None]":
    """Regenerate a scene's image, together with one image for each list of edits; the last item holds all of them.

    All are rows of one batch, so that what no edit touches is the same in all of them.
    """
    yield from _wait_for_model(runtime, ticket)
    if runtime.editor is None:
        raise JobError(no_concepts(runtime.name))
    n_evals = 2 * scene.steps * (len(edits) + 1)
    yield from in_turn(runtime, ticket, partial(runtime.run, n_evals, _run_edits, scene, [(), *edits]))


def _run_edits(
    runtime: Runtime, scene: Scene, rows: "Sequence[Sequence[ConceptEdit]]"
) -> "Generator[EditProgress | EditedImages, None, None]":
    from core.edits.metrics import OutOfRangeMeter

    editor, model = runtime.editor, runtime.model
    if editor is None or model is None:
        return
    meter = OutOfRangeMeter(editor, rows, scene.steps)
    run = model.sample(
        [scene.prompt] * len(rows),
        seeds=[scene.seed] * len(rows),
        num_inference_steps=scene.steps,
        guidance_scale=scene.guidance,
        contexts=[editor.editing_each(rows, scene.steps), meter.context],
    )
    started = shown_at = time.monotonic()
    with closing(run) as states:
        for state in states:
            done, now = state.step_context.step + 1, time.monotonic()
            if done == scene.steps:
                yield EditedImages(tuple(model.decode(state.x)), tuple(map(meter.out_of_range, range(1, len(rows)))))
                return
            frames: tuple[str, ...] = ()
            if now - shown_at > _PREVIEW_SECONDS:
                frames = tuple(_frame(image) for image in model.decode(state.x0))
                shown_at = time.monotonic()
            yield EditProgress(done, scene.steps, frames, (now - started) / done * (scene.steps - done))


class _Generated(NamedTuple):
    """A finished image, and its codes if there are concepts."""

    image: Image.Image
    trace: "CodeTrace | None"


def _generate(runtime: Runtime, prompt: str, seed: int, steps: int, guidance: float) -> Generator[Any, None, None]:
    """Previews, and last a `_Generated`."""
    model, tracer = runtime.model, _tracer(runtime)
    if model is None:
        return
    work = model.generate_iter(
        prompt,
        seed=seed,
        num_inference_steps=steps,
        guidance_scale=guidance,
        contexts=[tracer.context] if tracer else [],
    )
    with closing(work) as items:
        for item in items:
            if item.image is not None and hasattr(item, "latents"):
                yield _Generated(item.image, tracer.trace() if tracer else None)
            else:
                yield item


def _trace(runtime: Runtime, scene: Scene) -> "Generator[CodeTrace | None, None, None]":
    """None after each step; last the trace."""
    from core.concepts.trace import trace_image

    dictionary, tracer, model = runtime.dictionary, _tracer(runtime), runtime.model
    if dictionary is None or tracer is None or model is None:
        return
    if scene.uploaded:
        yield trace_image(
            model, scene.image, scene.prompt, dictionary.saes, seed=scene.seed, num_inference_steps=scene.steps
        )
        return
    run = model.sample(
        [scene.prompt],
        seeds=[scene.seed],
        num_inference_steps=scene.steps,
        guidance_scale=scene.guidance,
        contexts=[tracer.context],
    )
    with closing(run) as states:
        for _ in states:
            yield None
    yield tracer.trace()


def _tracer(runtime: Runtime) -> "CodeTracer | None":
    """Reads the concepts of an image while it is generated."""
    if runtime.model is None or runtime.dictionary is None:
        return None
    from core.concepts.trace import CodeTracer

    return CodeTracer(runtime.model, runtime.dictionary.saes)


def _wanted(runtime: Runtime, ticket: int | None) -> bool:
    return ticket is None or runtime.tickets.live(ticket)


def _wait_for_model(runtime: Runtime, ticket: int | None) -> "Generator[Waiting, None, Diffuser | None]":
    """Yields while the model is being loaded; returns it, or None if the job was cancelled meanwhile."""
    while not runtime.ready.wait(_POLL_SECONDS):
        if not _wanted(runtime, ticket):
            return None
        yield Waiting(f"Waiting for the model: {runtime.badge()[1]}")
    if runtime.error:
        raise JobError(f"The model could not be loaded: {runtime.error}")
    return runtime.model


def _wait_for_turn(runtime: Runtime, ticket: int | None, turn: Turn) -> Generator[Waiting, None, bool]:
    """Yields while others have the model; returns whether the job has it, and False if it was cancelled meanwhile."""
    seconds = 0.0  # a free model is not waited for
    while _wanted(runtime, ticket):
        if runtime.queue.wait(turn, seconds):
            return True
        yield Waiting(runtime.queue.standing(turn))
        seconds = _POLL_SECONDS
    return False


def _frame(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_FRAME_SIDE, _FRAME_SIDE))
    return data_url(small, quality=80)
