"""A stand-in for the engine: the same generators, lock and checks, without a model, in milliseconds."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from core.diffusion.schedule import NoiseSchedule, stage_at, step_times
from core.diffusion.text import delete_words, distinct_words, split_words
from core.errors import ArtifactError, EmptyPromptError, ModelError, PromptTooLongError, UnknownWordError
from core.information.attribution import choose_words
from core.information.captions import check_captions
from core.information.decomposition import Decomposition, Replicates, split
from core.information.likelihood import Likelihood
from core.information.partial import _different
from core.information.ranking import Ranking, differences
from core.information.results import Attribution, AttributionProgress, Curves, Progress, Timeline
from core.job import JobLock
from core.spec import BUILT_IN

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
        self.unet = SimpleNamespace(named_modules=lambda: ())  # without blocks, so that no concepts fit it
        self.image_size = SIZE
        self.delay = delay
        self.calls: list[tuple[str, float]] = []
        self.lock = JobLock()
        self.lend = self.lock.lend

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
        self, prompt: str, *, seed: int, num_inference_steps: int, guidance_scale: float, contexts: Sequence[Any] = ()
    ) -> Iterator[Any]:
        del contexts
        self.check_prompt(prompt)
        return self._generate(prompt, seed, num_inference_steps, guidance_scale)

    def _generate(self, prompt: str, seed: int, n: int, guidance: float) -> Iterator[Any]:
        with self.lock.held():
            final = paint(prompt, seed)
            noise = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            for step, t in enumerate(step_times(n)):
                self.call(f"draw {prompt}")
                image = Image.blend(Image.fromarray(noise), final, 1 - float(t) * 0.9)
                yield SimpleNamespace(step=step, n_steps=n, t=float(t), stage=stage_at(float(t)).name, image=image)
            yield SimpleNamespace(image=final, latents=None, prompt=prompt, seed=seed, guidance_scale=guidance)


class FakeEngine:
    """Replaces the package `core`."""

    def __init__(self, delay: float = 0.0, load_seconds: float = 0.0, fails: str | None = None) -> None:
        self.delay, self.load_seconds, self.fails = delay, load_seconds, fails
        self.model: FakeModel | None = None

    def load_model(self, _name: str, **_options: Any) -> FakeModel:
        time.sleep(self.load_seconds)
        if self.fails:
            raise ModelError(self.fails)
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
        max_evals: int,
        num_inference_steps: int,
    ) -> Iterator[Any]:
        assert max_evals > 1000
        assert image.size == (SIZE, SIZE)
        model.check_prompt(prompt)
        chosen = choose_words(prompt, words)
        return self._attribute(model, prompt, chosen, given, rel_error, seed, num_inference_steps)

    def decompose_iter(
        self,
        model: FakeModel,
        _image: Image.Image,
        prompt: str,
        *words: str,
        given: str,
        surprisal: Callable[[str], float] | None,
        seed: int,
        rel_error: float,
        max_evals: int,
    ) -> Iterator[Any]:
        """Two words of the prompt, by the engine's own rules and arithmetic, from made-up replicates."""
        assert max_evals > 1000
        model.check_prompt(prompt)
        chosen = _different(prompt, words)
        surprisals = tuple(map(surprisal, chosen)) if surprisal else None
        return self._run(
            model, f"decompose {prompt}", lambda n: decomposition(chosen, given, seed, n, surprisals), rel_error
        )

    def rank_captions_iter(
        self,
        model: FakeModel,
        _image: Image.Image,
        captions: Sequence[str],
        *,
        certainty: float,
        seed: int,
        max_evals: int,
    ) -> Iterator[Any]:
        """The longest caption fits best by direct bits, the shortest by orthogonal bits."""
        assert max_evals > 1000
        texts = check_captions(model, captions)  # type: ignore[arg-type]
        return self._run(model, "rank", lambda n: ranking(texts, certainty, seed, n), certainty)

    def likelihood_iter(
        self,
        model: FakeModel,
        _image: Image.Image,
        prompt: str,
        *,
        error: float,
        seed: int,
        max_evals: int,
        num_inference_steps: int,
    ) -> Iterator[Any]:
        """Every letter of the prompt saves a bit."""
        assert max_evals > 1000
        model.check_prompt(prompt)
        return self._run(
            model, f"likelihood {prompt}", lambda n: likelihood(prompt, error, seed, num_inference_steps, n), error
        )

    def change_word_iter(
        self, model: FakeModel, _image: Image.Image, prompt: str, word: str, to: str | None
    ) -> Iterator[Any]:
        """A disc of another prompt; half of the latents' cells change."""
        model.check_prompt(prompt)
        (found,) = choose_words(prompt, [word])
        changed = delete_words(prompt, [found]) if to is None else prompt.replace(found, to)
        if to is not None:
            model.check_prompt(changed)
        return self._change(model, prompt, changed, found, to)

    def _change(self, model: FakeModel, prompt: str, changed: str, word: str, to: str | None) -> Iterator[Any]:
        with model.lock.held():
            for n in range(1, 13):
                model.call(f"change {prompt}")
                yield SimpleNamespace(n_evals=n, max_evals=12)
            change = np.zeros((16, 16))
            change[:, :8] = np.arange(128).reshape(16, 8)
            yield SimpleNamespace(
                word=word,
                to=to,
                prompt=prompt,
                changed_prompt=changed,
                before=paint(prompt, 0),
                after=paint(changed, 1),
                change=change,
                relative_change=0.4,
                reconstruction_error=0.008,
                n_evals=12,
            )

    def _run(self, model: FakeModel, job: str, result: Callable[[int], Any], target: float) -> Iterator[Any]:
        with model.lock.held():
            for replicate in range(1, 9):
                model.call(job)
                partial = result(replicate) if replicate > 1 else None
                yield Progress(replicate * 24, 64 * 24, replicate, 2 * target, partial, 8 * 24)
            yield replace(result(8), stopped="converged")

    def predict_layout(self, model: FakeModel, prompt: str, *, seed: int, **options: Any) -> Any:
        with model.lock.held():
            model.call(f"layout {prompt}")
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
        with model.lock.held():
            n_replicates = 16 if error < 0.2 else 8
            for replicate in range(1, n_replicates + 1):
                model.call(f"measure {prompt}")
                partial = attribution(prompt, words, given, error, seed, n, replicate) if replicate > 1 else None
                reached = partial.rel_error if partial else float("inf")
                yield AttributionProgress(replicate * 24, 64 * 24, replicate, reached, partial, n_replicates * 24)
            yield attribution(prompt, words, given, error, seed, n, n_replicates, "converged")


def paint(prompt: str, seed: int) -> Image.Image:
    """A disc whose colour and position depend on the prompt and the seed."""
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
    """Consistent numbers: long words get many bits, short ones few, and "blue" contradicts the image."""
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
    # Two curves whose half areas differ by the direct bits; each alone is ten times less certain than that.
    without = np.broadcast_to(900 / (1 + np.exp(-centre)), when.shape)
    apart = 2 * np.log(2) * when / bits[:, None] * direct[:, None]
    curves = Curves(without, without * 0.1, without - apart, without * 0.1, np.abs(apart) * 0.01)
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
        curves=curves,
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


def decomposition(
    words: tuple[str, ...], given: Any, seed: int, n_replicates: int, surprisals: Any = None
) -> Decomposition:
    """The first word is about the left, the second about the right, both about the middle; the synergy is negative."""
    spread = np.random.default_rng(seed).normal(1, 0.01, (3, n_replicates, 1, 1))
    x = np.broadcast_to(np.arange(16), (16, 16))
    first, second = np.where(x < 10, 0.05, 0.0), np.where(x >= 6, 0.04, 0.0)
    both = np.maximum(first, second) - 0.5 * np.minimum(first, second)
    maps = tuple(s * cells for s, cells in zip(spread, (first, second, both), strict=True))
    pair = split(
        (words[0], words[1]),
        Replicates(maps, tuple(cells.sum((1, 2)) for cells in maps)),  # type: ignore[arg-type]
        surprisals,
    )
    return Decomposition(
        words=words,
        pairs=(pair,),
        prompt=f"a {words[0]} and a {words[1]}",
        given=given,
        n_evals=24 * n_replicates,
        n_replicates=n_replicates,
        stopped="cancelled",
        rel_error=0.08,
        seed=seed,
        settings={"rel_error": 0.1},
    )


def ranking(captions: tuple[str, ...], certainty: float, seed: int, n_replicates: int) -> Ranking:
    """As many bits as letters, and a small error of the differences."""
    noise = np.random.default_rng(seed).normal(0, 0.5, (n_replicates, len(captions)))
    direct = np.array([len(caption) for caption in captions]) + noise
    ahead, ahead_stderr = differences(direct)
    return Ranking(
        captions=captions,
        bits=direct.mean(0),
        stderr=direct.std(0),
        ahead=ahead,
        ahead_stderr=ahead_stderr,
        orthogonal_bits=60 - direct.mean(0),
        orthogonal_stderr=direct.std(0),
        n_evals=24 * n_replicates,
        n_replicates=n_replicates,
        stopped="cancelled",
        rel_error=0.1,
        seed=seed,
        settings={"certainty": certainty},
    )


def likelihood(prompt: str, error: float, seed: int, n_steps: int, n_replicates: int) -> Likelihood:
    """A letter of the prompt saves a bit; the errors are those of standard normal latents."""
    edges = NoiseSchedule.stable_diffusion().bin_edges(n_steps, -5.0, 7.0)
    gain, n_dims = float(len(prompt)), 1024
    centre = (edges[1:] + edges[:-1]) / 2
    without = 1 / (1 + np.exp(-centre))
    errors = np.stack([without, 0.9 * without])
    return Likelihood(
        prompt=prompt,
        bits_per_dim=-0.5 - gain / n_dims,
        stderr=error,
        unprompted_bits_per_dim=-0.5,
        unprompted_stderr=error,
        gain=gain,
        gain_stderr=0.5,
        n_dims=n_dims,
        log_snr_range=(-5.0, 7.0),
        edges=edges,
        errors=errors,
        error_stderr=0.1 * errors,
        n_evals=16 * n_replicates,
        n_replicates=n_replicates,
        stopped="cancelled",
        rel_error=error,
        seed=seed,
        settings={"error": error, "num_inference_steps": n_steps},
    )
