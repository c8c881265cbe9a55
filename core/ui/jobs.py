"""The long jobs (drawing, reading, measuring, editing) as generators that say how far they are and stop if unwanted.

A job yields after every U-Net call. It is stopped by its ticket (Cancel, a newer job, a closed page) or by closing
the generator (a client that cancels); either way the engine's generator is closed, which frees the model.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from core.diffusion.images import prepare_image
from core.information.results import Attribution, Measurement
from core.ui.concepts.dictionary import no_concepts
from core.ui.inputs import image_note
from core.ui.look.images import data_url
from core.ui.look.scene import Scene
from core.ui.runtime import Runtime

if TYPE_CHECKING:
    from core.concepts.layout import Layout
    from core.concepts.trace import CodeTrace, CodeTracer
    from core.edits import ConceptEdit
    from core.edits.metrics import OutOfRange

_FRAME_SIDE = 160
"""Largest side of a preview on the film strip, in pixels."""
_PREVIEW_SECONDS = 0.6
"""Between previews of pictures that are drawn again: decoding several takes a while."""


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
    """Information is being measured."""

    n_evals: int
    """U-Net evaluations so far."""
    error: float | None
    """Relative error so far."""
    partial: Any
    """What is known so far: an unfinished result, or None."""
    share: float
    """Part of the work that is done, 0..1, at the present spread."""
    seconds_left: float
    """At the pace so far."""


class Redrawing(NamedTuple):
    """A picture is drawn again, with and without edits."""

    done: int
    """Steps so far."""
    n_steps: int
    """Steps in all."""
    frames: tuple[str, ...]
    """Previews as data URLs, the unedited one first; none where the last ones are still new."""
    seconds_left: float
    """At the pace so far."""


class Redrawn(NamedTuple):
    """A picture without edits, and with each list of them."""

    images: tuple[Image.Image, ...]
    """The unedited one first."""
    out_of_range: "tuple[OutOfRange, ...]"
    """How far each of the others went from what data have."""


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
        yield Scene(image, caption, seed, runtime.spec.num_inference_steps, 1.0, own=True), image_note(picture)


def measure(
    runtime: Runtime, ticket: int | None, scene: Scene, given: str, rel_error: float, words: list[str] | None = None
) -> Generator[Waiting | Measuring | Attribution, None, None]:
    """Measure what each word told the picture; the last item is the result, unless the job was cancelled."""
    work = engine_items(
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
            num_inference_steps=scene.steps,
        ),
    )
    yield from measuring(work)


def engine_items(
    runtime: Runtime, ticket: int | None, begin: Callable[[], Generator[Any, None, None]]
) -> Generator[Any, None, None]:
    """`Waiting` until the model is there, then what one of the engine's generators yields while the job is wanted."""
    yield from _wait_for_model(runtime, ticket)
    if not _wanted(runtime, ticket):
        return
    with closing(begin()) as items:
        for item in items:
            if not _wanted(runtime, ticket):
                return
            yield item


def measuring(work: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """The items of a measurement, its progress as `Measuring`; last its result."""
    started = time.monotonic()
    with closing(work):
        for item in work:
            if isinstance(item, Waiting):
                started = time.monotonic()
            elif not isinstance(item, Measurement):
                needed = max(item.expected_evals, item.n_evals)
                pace = (time.monotonic() - started) / item.n_evals
                error = item.rel_error if item.partial is not None else None
                share = item.n_evals / needed
                yield Measuring(item.n_evals, error, item.partial, share, pace * (needed - item.n_evals))
                continue
            yield item


def trace(runtime: Runtime, ticket: int | None, scene: Scene) -> "Generator[Waiting | CodeTrace, None, None]":
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


def intervene(
    runtime: Runtime, ticket: int | None, scene: Scene, edits: "Sequence[Sequence[ConceptEdit]]"
) -> "Generator[Waiting | Redrawing | Redrawn, None, None]":
    """Draw a scene's picture once more, and beside it once for each list of edits; the last item is all of them.

    All are rows of one batch, so that what no edit touches is the same in all of them.
    """
    yield from _wait_for_model(runtime, ticket)
    if runtime.editor is None:
        raise JobError(no_concepts(runtime.name))
    if not _wanted(runtime, ticket):
        return
    n_evals = 2 * scene.steps * (len(edits) + 1)
    with closing(runtime.run(n_evals, _redrawn, scene, [(), *edits])) as items:
        for item in items:
            if not _wanted(runtime, ticket):
                return
            yield item


def _redrawn(
    runtime: Runtime, scene: Scene, rows: "Sequence[Sequence[ConceptEdit]]"
) -> "Generator[Redrawing | Redrawn, None, None]":
    from core.edits.metrics import OutOfRangeMeter

    editor, model = runtime.editor, runtime.model
    if editor is None:
        return
    watch = OutOfRangeMeter(editor, rows, scene.steps)
    run = model.sample(
        [scene.prompt] * len(rows),
        seeds=[scene.seed] * len(rows),
        num_inference_steps=scene.steps,
        guidance_scale=scene.guidance,
        contexts=[editor.editing_each(rows, scene.steps), watch.context],
    )
    started = shown_at = time.monotonic()
    with closing(run) as states:
        for state in states:
            done, now = state.step_context.step + 1, time.monotonic()
            if done == scene.steps:
                yield Redrawn(tuple(model.decode(state.x)), tuple(map(watch.out_of_range, range(1, len(rows)))))
                return
            frames: tuple[str, ...] = ()
            if now - shown_at > _PREVIEW_SECONDS:
                frames = tuple(_frame(image) for image in model.decode(state.x0))
                shown_at = time.monotonic()
            yield Redrawing(done, scene.steps, frames, (now - started) / done * (scene.steps - done))


class _Drawn(NamedTuple):
    """A picture that is finished, and its codes where there are concepts."""

    image: Image.Image
    trace: "CodeTrace | None"


def _drawn(runtime: Runtime, prompt: str, seed: int, steps: int, guidance: float) -> Generator[Any, None, None]:
    """Previews, and last what was drawn."""
    tracer = _tracer(runtime)
    watched = {"contexts": [tracer.context]} if tracer else {}
    work = runtime.model.generate_iter(prompt, seed=seed, num_inference_steps=steps, guidance_scale=guidance, **watched)
    with closing(work) as items:
        for item in items:
            yield _Drawn(item.image, tracer.trace() if tracer else None) if hasattr(item, "latents") else item


def _traced(runtime: Runtime, scene: Scene) -> "Generator[CodeTrace | None, None, None]":
    """None after each step; last the trace."""
    from core.concepts.trace import trace_image

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


def _tracer(runtime: Runtime) -> "CodeTracer | None":
    """What reads the concepts of a picture while it is drawn."""
    if runtime.dictionary is None:
        return None
    from core.concepts.trace import CodeTracer

    return CodeTracer(runtime.model, runtime.dictionary.saes)


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
