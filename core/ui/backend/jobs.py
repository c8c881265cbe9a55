"""Long jobs (generating, tracing, measuring, editing) as generators that report progress and can be stopped.

A job yields after every U-Net call. It is stopped by its ticket (Cancel, a newer job, a closed page) or by closing
the generator (an API client that cancels); either way the engine's generator is closed, which frees the model.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from core.diffusion.images import prepare_image
from core.information.results import Attribution, Measurement
from core.ui.backend.dictionary import no_concepts
from core.ui.backend.errors import JobError
from core.ui.backend.inputs import image_note
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
    yield from _wait_for_model(runtime, ticket)
    if not _wanted(runtime, ticket):
        return
    frames: list[str] = []
    started = time.monotonic()
    with closing(runtime.run(2 * steps, _generate, prompt, seed, steps, guidance)) as items:
        for item in items:
            if not _wanted(runtime, ticket):
                return
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
        image = prepare_image(path, model.image_size)
        yield Scene(image, caption, seed, runtime.spec.num_inference_steps, 1.0, uploaded=True), image_note(path)


def measure(
    runtime: Runtime, ticket: int | None, scene: Scene, given: str, rel_error: float, words: list[str] | None = None
) -> Generator[Waiting | MeasurementProgress | Attribution, None, None]:
    """Measure the information of each word about the image; the last item is the result, unless cancelled."""
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
    yield from with_progress(work)


def engine_items(
    runtime: Runtime, ticket: int | None, begin: Callable[[], Generator[Any, None, None]]
) -> Generator[Any, None, None]:
    """`Waiting` until the model is loaded, then the items of one of the engine's generators while the job is wanted."""
    yield from _wait_for_model(runtime, ticket)
    if not _wanted(runtime, ticket):
        return
    with closing(begin()) as items:
        for item in items:
            if not _wanted(runtime, ticket):
                return
            yield item


def with_progress(work: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """The items of a measurement, its progress as `MeasurementProgress`; the last one is its result."""
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
                yield MeasurementProgress(item.n_evals, error, item.partial, share, pace * (needed - item.n_evals))
                continue
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
    yield Waiting("Reading the concepts…")
    with closing(runtime.run(2 * scene.steps, _trace, scene)) as items:
        for item in items:
            if not _wanted(runtime, ticket):
                return
            if item is not None:
                runtime.cache_trace(scene.key, item)
                yield item


def predict_layout(
    runtime: Runtime, ticket: int | None, prompt: str, seed: int, **options: Any
) -> "Generator[Waiting | Layout, None, None]":
    """Predict a layout; the last item is it. The options are those of `core.predict_layout`."""
    yield from _wait_for_model(runtime, ticket)
    if runtime.dictionary is None:
        raise JobError(no_concepts(runtime.name))
    if _wanted(runtime, ticket):
        source = runtime.dictionary.source
        yield runtime.engine.predict_layout(runtime.model, prompt, seed=seed, source=source, **options)


def intervene(
    runtime: Runtime, ticket: int | None, scene: Scene, edits: "Sequence[Sequence[ConceptEdit]]"
) -> "Generator[Waiting | EditProgress | EditedImages, None, None]":
    """Regenerate a scene's image, together with one image for each list of edits; the last item holds all of them.

    All are rows of one batch, so that what no edit touches is the same in all of them.
    """
    yield from _wait_for_model(runtime, ticket)
    if runtime.editor is None:
        raise JobError(no_concepts(runtime.name))
    if not _wanted(runtime, ticket):
        return
    n_evals = 2 * scene.steps * (len(edits) + 1)
    with closing(runtime.run(n_evals, _run_edits, scene, [(), *edits])) as items:
        for item in items:
            if not _wanted(runtime, ticket):
                return
            yield item


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
    while not runtime.ready.wait(0.25):
        if not _wanted(runtime, ticket):
            return None
        yield Waiting(f"Waiting for the model: {runtime.badge()[1]}")
    if runtime.error:
        raise JobError(f"The model could not be loaded: {runtime.error}")
    return runtime.model


def _frame(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_FRAME_SIDE, _FRAME_SIDE))
    return data_url(small, quality=80)
