"""The one object behind the page: the model, loaded in the background, and who may still compute."""

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.information.results import Attribution
from core.information.surprisal import load_surprisal
from core.spec import BUILT_IN, ModelSpec
from core.ui.concepts.dictionary import Dictionary, load_dictionary
from core.ui.look.scene import target
from core.ui.zero_gpu import LentEngine, ZeroGpuRunner, on_zero_gpu, seconds_of

if TYPE_CHECKING:
    from core.concepts.trace import CodeTrace
    from core.edits import Editor
    from core.segmentation.semantic import Segmenter

log = logging.getLogger(__name__)
T = TypeVar("T")

_LOADING_SECONDS = {"picturebook": 10}
_KEPT = 64
_TRACES_KEPT = 16
"""A trace of the embedded model is 1 MB; one of 50 steps of SD v1.4 is 8."""


class Tickets:
    """Numbers for jobs, so that one that still waits in the queue can be cancelled like one that runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._live: dict[str, int] = {}
        self._claimed: dict[int, set[str]] = {}

    def issue(self, session: str) -> int:
        """A new ticket; the session's earlier one is cancelled by it."""
        with self._lock:
            self._last += 1
            old = self._live.pop(session, None)
            self._claimed.pop(old or 0, None)
            self._live[session] = self._last
            self._claimed[self._last] = set()
            return self._last

    def cancel(self, session: str) -> None:
        """Stop whatever the session has asked for."""
        with self._lock:
            self._claimed.pop(self._live.pop(session, 0), None)

    def drop(self, ticket: int) -> None:
        """Forget a job that failed; whatever was to follow it is not wanted."""
        with self._lock:
            self._claimed.pop(ticket, None)

    def newest(self, session: str) -> int:
        """The session's present ticket, or 0."""
        with self._lock:
            return self._live.get(session, 0)

    def live(self, ticket: int) -> bool:
        """Whether the job is still wanted. A running job asks this after every U-Net call."""
        with self._lock:
            return ticket in self._claimed

    def claim(self, ticket: int, work: str) -> bool:
        """Take on a piece of the ticket's work; false if it is cancelled or another job has taken it."""
        with self._lock:
            if work in self._claimed.get(ticket, {work}):
                return False
            self._claimed[ticket].add(work)
            return True


@dataclass
class Runtime:
    """What every part of the page is built from. Making one imports nothing heavy; `start` does, in a thread."""

    name: str = "picturebook"
    """A built-in model, a folder or a Hub id."""
    engine: Any = None
    """Where `load_model` and `attribute_iter` are found: `core`, or a test's stand-in."""
    examples_dir: Path | None = None
    """Folder of stored examples; None: those that come with the model, if any."""
    device: str | None = None
    """Torch device; None: the best there is."""
    dtype: str | None = None
    """What it computes in; None: the model's default there."""
    hookpoints: Sequence[str] = ()
    """Blocks to look into; none named: the model's own."""
    saes: str | None = None
    """Sparse autoencoders with their concept tables: a built-in name, a folder or a Hub id; None: the model's own,
    or such as were trained on this computer."""
    tickets: Tickets = field(default_factory=Tickets)
    """Jobs that are wanted."""
    ready: threading.Event = field(default_factory=threading.Event)
    """Set once the model is there, or has failed to load."""
    error: str | None = None
    """Why it failed to load."""

    def __post_init__(self) -> None:
        self._model: Any = None
        self._gpu_runner: ZeroGpuRunner | None = None
        self._dictionary: Dictionary | None = None
        self._segmenter: Segmenter | None = None
        self._traces: OrderedDict[str, CodeTrace] = OrderedDict()
        self._cached: OrderedDict[tuple[str, str, float], Attribution] = OrderedDict()
        self._started = 0.0
        if self.examples_dir is None and self.name == "picturebook":
            self.examples_dir = Path(BUILT_IN["picturebook"].source).parent / "examples"

    @property
    def spec(self) -> ModelSpec:
        """The model's settings; before it is loaded, as far as they are known."""
        if self._model is not None:
            spec: ModelSpec = self._model.spec
            return spec
        return BUILT_IN.get(self.name) or ModelSpec(name=self.name, source=self.name)

    @property
    def model(self) -> Any:
        """The `core.Diffuser`, or None while it is being loaded."""
        return self._model

    @property
    def dictionary(self) -> "Dictionary | None":
        """The model's concepts; None while they are being loaded, or where there are none."""
        return self._dictionary

    @property
    def editor(self) -> "Editor | None":
        """What edits pictures by the model's concepts; None where there are none yet, or none at all."""
        if self._model is None or self._dictionary is None:
            return None
        from core.edits import Editor

        return Editor(self._model, self._dictionary.saes, self._dictionary.tables.__getitem__)

    @property
    def segmenter(self) -> "Segmenter | None":
        """What says where things are in the model's pictures; None where none comes with it."""
        if self._segmenter is None and self.spec.name == "picturebook":
            from core.segmentation.semantic import load_segmenter

            # A lent GPU is not there for what is computed between requests.
            self._segmenter = load_segmenter(device="cpu" if self._gpu_runner else self.device)
        return self._segmenter

    def enable_zero_gpu(self) -> None:
        """On a Space that lends its GPU (ZeroGPU): load the model now, as is wanted there, and compute on that GPU.

        A small model computes on the Space's own processor instead, which costs no visitor anything.
        """
        if not on_zero_gpu():
            return
        gpu_runner = ZeroGpuRunner(self)  # in any case: such a Space has to have a function for its GPU
        if self.spec.half:
            self._gpu_runner = gpu_runner
        else:
            self.device = "cpu"
        self._load()

    def run(
        self, n_evals: int, function: Callable[..., Generator[T, None, None]], *arguments: Any
    ) -> Generator[T, None, None]:
        """Model work: what a module's generator function yields of this runtime and the arguments.

        `n_evals` is about how many U-Net evaluations it takes. Where the GPU is lent, it runs in another process:
        what it is given and yields has to be fit for sending, and what it changes stays there.
        """
        if self._gpu_runner is None:
            return function(self, *arguments)
        return self._gpu_runner.run(seconds_of(n_evals), function, self, *arguments)

    def start(self) -> None:
        """Load the model in a thread of its own, if it is not there yet."""
        if self.ready.is_set():
            return
        threading.Thread(target=self._load, name="load-model", daemon=True).start()

    def _load(self) -> None:
        self._started = time.monotonic()
        try:
            engine = self.engine or import_module("core")
            given = {"device": self.device, "dtype": self.dtype, "hookpoints": tuple(self.hookpoints)}
            options: dict[str, Any] = {name: value for name, value in given.items() if value}
            if self._gpu_runner:  # concepts are searched by the text encoder, between requests
                options |= {"text_device": "cpu", "offload": False}
            model = engine.load_model(self.name, **options)
            self._dictionary = load_dictionary(self.name, self.saes, model)
            self._model, self.engine = model, LentEngine(engine, self, self._gpu_runner) if self._gpu_runner else engine
            log.info("%s is ready after %.1f s", self.name, time.monotonic() - self._started)
        except Exception as error:  # whatever it is, the page has to say it
            log.exception("%s could not be loaded", self.name)
            self.error = str(error) or type(error).__name__
        finally:
            self.ready.set()

    def badge(self) -> tuple[str, str]:
        """State (`loading`, `ready`, `failed`) and the words for it."""
        if self.error:
            return "failed", f"{self.name} could not be loaded: {self.error}"
        if self._model is None:
            usual = _LOADING_SECONDS.get(self.name)
            passed = int(time.monotonic() - self._started) if self._started else 0
            about = f", about {max(usual - passed, 1)} s" if usual else f", {passed} s so far"
            return "loading", f"loading the model{about}"
        device = str(getattr(self._model, "device", "cpu")).split(":")[0]
        return "ready", f"{self.spec.name} · {'GPU' if device == 'cuda' else device.upper()} · ready"

    def unknown_words(self, prompt: str) -> dict[str, list[str]]:
        """Words the model was never taught, with the nearest it knows; none while it is still loading."""
        unknown: dict[str, list[str]] = self._model.unknown_words(prompt) if self._model is not None else {}
        return unknown

    def surprisal(self, words: Sequence[str]) -> Callable[[str], float] | None:
        """How many bits it takes to guess each of these words; None where that is not known of them all."""
        known = load_surprisal(self.spec.name)
        return known if known is not None and all(map(math.isfinite, map(known, words))) else None

    def trace(self, key: str) -> "CodeTrace | None":
        """The codes of a picture, if they are still kept."""
        return self._traces.get(key)

    def keep_trace(self, key: str, trace: "CodeTrace") -> None:
        """Remember the codes of a picture; the oldest are forgotten."""
        self._traces[key] = trace
        while len(self._traces) > _TRACES_KEPT:
            self._traces.popitem(last=False)

    def stored(self, key: str, given: str, rel_error: float) -> Attribution | None:
        """An attribution made before, of the same picture with the same settings."""
        return self._cached.get((key, given, rel_error))

    def most_exact(self, key: str, given: str) -> Attribution | None:
        """Of the attributions made before of the same picture, the one with the smallest error."""
        kept = [a for (of, by, _), a in self._cached.items() if (of, by) == (key, given)]
        return min(kept, key=lambda a: a.rel_error, default=None)

    def keep(self, key: str, attribution: Attribution) -> None:
        """Remember a finished attribution; the oldest is forgotten."""
        self._cached[key, attribution.given, target(attribution)] = attribution
        while len(self._cached) > _KEPT:
            self._cached.popitem(last=False)
