"""A stand-in for the engine: the same generators, lock and checks, without torch, in milliseconds."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from core.errors import ArtifactError, EmptyPromptError, PromptTooLongError, UnknownWordError, WordNotInPromptError
from core.information.results import Attribution, AttributionProgress, Timeline
from core.schedule import NoiseSchedule, stage_at, step_times
from core.spec import BUILT_IN
from core.text import distinct_words, split_words

KNOWN = (  # noqa: SIM905 - a sentence reads better than thirty quotes
    "a an at and cat dog on in of the there is crab car tree left right picture poster grass sea snow sun small blue"
).split()
COLOURS = {"cat": "#e0913a", "dog": "#8a5a34", "sun": "#f3c53a", "blue": "#3465c0", "snow": "#e8eef5", "sea": "#2f6fa8"}
SIZE = 64


class FakeModel:
    """Draws a disc; logs when each of its jobs calls the U-Net."""

    def __init__(self, delay: float = 0.0) -> None:
        self.spec = BUILT_IN["picturebook"]
        self.device = "cpu"
        self.hookpoints: tuple[str, ...] = ()
        self.image_size = SIZE
        self.delay = delay
        self.calls: list[tuple[str, float]] = []
        self.lock = threading.Lock()

    def unknown_words(self, prompt: str) -> dict[str, list[str]]:
        return {w: ["cat", "grass"] for w in distinct_words(prompt) if w not in KNOWN}

    def check_prompt(self, prompt: str) -> None:
        words = split_words(prompt)
        if not words:
            raise EmptyPromptError
        if unknown := self.unknown_words(prompt):
            raise UnknownWordError(unknown)
        if len(words) > 20:
            raise PromptTooLongError(len(words), 20, len(words))

    def call(self, job: str) -> None:
        time.sleep(self.delay)
        self.calls.append((job, time.monotonic()))

    def generate_iter(
        self, prompt: str, *, seed: int, num_inference_steps: int, guidance_scale: float
    ) -> Iterator[Any]:
        self.check_prompt(prompt)
        return self._generate(prompt, seed, num_inference_steps, guidance_scale)

    def _generate(self, prompt: str, seed: int, n: int, guidance: float) -> Iterator[Any]:
        with self.lock:
            final = paint(prompt, seed)
            noise = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            for step, t in enumerate(step_times(n)):
                self.call(f"draw {prompt}")
                image = Image.blend(Image.fromarray(noise), final, 1 - float(t) * 0.9)
                yield SimpleNamespace(step=step, n_steps=n, t=float(t), stage=stage_at(float(t)).name, image=image)
            yield SimpleNamespace(image=final, latents=None, prompt=prompt, seed=seed, guidance_scale=guidance)


class FakeEngine:
    """In the place of the package `core`."""

    def __init__(self, delay: float = 0.0, load_seconds: float = 0.0, fails: str | None = None) -> None:
        self.delay, self.load_seconds, self.fails = delay, load_seconds, fails
        self.model: FakeModel | None = None

    def load_model(self, _name: str, **_options: Any) -> FakeModel:
        time.sleep(self.load_seconds)
        if self.fails:
            raise ValueError(self.fails)
        self.model = FakeModel(self.delay)
        return self.model

    def attribute_iter(
        self,
        model: FakeModel,
        image: Image.Image,
        prompt: str,
        *,
        seed: int,
        words: list[str] | None,
        given: str,
        rel_error: float,
        num_inference_steps: int,
    ) -> Iterator[Any]:
        assert image.size == (SIZE, SIZE)
        model.check_prompt(prompt)
        present = distinct_words(prompt)
        for word in words or []:
            if word not in present:
                raise WordNotInPromptError(word, present)
        chosen = tuple(words or present)
        return self._attribute(model, prompt, chosen, given, rel_error, seed, num_inference_steps)

    def predict_layout(self, model: FakeModel, prompt: str, *, seed: int, **options: Any) -> Any:
        with model.lock:
            model.call(f"foretell {prompt}")
            if options["hookpoint"] not in (None, "mid"):
                raise ArtifactError(f"There is no SAE at {options['hookpoint']}.")
            scores = np.full((2, 2, 2), seed / 10, dtype=np.float32)
            return SimpleNamespace(
                labels=np.array([[0, 1], [-1, options["step"]]]), classes=("cat", "sea"), scores=scores
            )

    def _attribute(
        self,
        model: FakeModel,
        prompt: str,
        words: tuple[str, ...],
        given: str,
        error: float,
        seed: int,
        n: int,
    ) -> Iterator[Any]:
        with model.lock:
            n_replicates = 16 if error < 0.2 else 8
            for replicate in range(1, n_replicates + 1):
                model.call(f"measure {prompt}")
                partial = attribution(prompt, words, given, error, seed, n, replicate) if replicate > 1 else None
                reached = partial.rel_error if partial else float("inf")
                yield AttributionProgress(replicate * 24, 64 * 24, replicate, reached, partial, n_replicates * 24)
            yield attribution(prompt, words, given, error, seed, n, n_replicates, "converged")


def paint(prompt: str, seed: int) -> Image.Image:
    """A disc whose colour and place depend on the prompt and the seed."""
    words = distinct_words(prompt)
    ground = next((COLOURS[w] for w in words if w in ("sea", "snow")), "#7fb069")
    image = Image.new("RGB", (SIZE, SIZE), ground)
    colour = next((COLOURS[w] for w in words if w in COLOURS), "#c04a6a")
    x, y = 14 + 7 * (seed % 5), 16 + 5 * (seed % 3)
    ImageDraw.Draw(image).ellipse([x, y, x + 26, y + 26], fill=colour)
    return image


def attribution(
    prompt: str,
    words: tuple[str, ...],
    given: str,
    rel_error: float,
    seed: int,
    n_steps: int,
    n_replicates: int,
    stopped: Any = "cancelled",
) -> Attribution:
    """Numbers that add up: nouns told much, small words little, "blue" contradicts."""
    schedule = NoiseSchedule.stable_diffusion()
    edges = schedule.bin_edges(n_steps, -5.0, 7.0)
    bits = np.array([0.15 if len(w) < 3 else 0.8 + 1.3 * (len(w) % 5) for w in words])
    stderr = bits * 0.35 / np.sqrt(n_replicates) + 0.02
    y, x = np.mgrid[:16, :16]
    blobs = np.stack([np.exp(-((x - 3 - 3 * i % 12) ** 2 + (y - 8) ** 2) / 14) for i in range(len(words))])
    maps = blobs / blobs.sum((1, 2), keepdims=True) * bits[:, None, None]
    centre = (edges[1:] + edges[:-1]) / 2
    shape = np.exp(-((centre[None] + 2 - np.arange(len(words))[:, None]) ** 2) / 4)
    when = shape / (shape * np.diff(edges)).sum(1, keepdims=True) * bits[:, None]
    direct = np.where(np.array(words) == "blue", -1.0, 0.9) * bits
    reached = float((stderr / np.maximum(bits, 0.1 * bits.max())).max())
    return Attribution(
        words=words,
        bits=bits,
        stderr=stderr,
        maps=maps,
        map_stderr=maps * 0.4 + 0.002,
        direct_bits=direct,
        direct_stderr=stderr,
        timeline=Timeline(edges, when, when * 0.2 + 0.01),
        prompt_bits=None,
        prompt_stderr=None,
        n_evals=n_replicates * 24,
        n_replicates=n_replicates,
        stopped=stopped,
        rel_error=reached,
        prompt=prompt,
        given=given,  # type: ignore[arg-type]
        seed=seed,
        settings={"rel_error": rel_error, "num_inference_steps": n_steps},
    )
