"""The one object behind the page: the model, loaded in the background, its concepts, and what was computed before."""

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
from core.ui.backend.dictionary import ConceptDictionary, load_dictionary
from core.ui.backend.errors import sentence
from core.ui.backend.queue import ModelQueue
from core.ui.backend.tickets import Tickets
from core.ui.backend.zero_gpu import ZeroGpuEngine, ZeroGpuRunner, on_zero_gpu, seconds_for
from core.ui.look.scene import requested_rel_error

if TYPE_CHECKING:
    from core.concepts.trace import CodeTrace
    from core.diffusion.diffuser import Diffuser
    from core.edits import Editor
    from core.segmentation.semantic import Segmenter

log = logging.getLogger(__name__)
T = TypeVar("T")

_LOADING_SECONDS = {"picturebook": 10}
MAX_PROMPT = 500
"""Characters of a prompt; the model's own limit in tokens is checked by the model."""
_MAX_ATTRIBUTIONS = 64
_MAX_TRACES = 16
"""A trace of the embedded model takes 1 MB, one of 50 steps of SD v1.4 takes 8 MB."""


@dataclass
class Runtime:
    """What every part of the page is built from. Making one imports nothing heavy; `start` does, in a thread."""

    name: str = "picturebook"
    """A built-in model, a folder or a Hub id."""
    engine: Any = None
    """Provides `load_model`, `attribute_iter` and so on: the package `core`, or a test's stand-in."""
    examples_dir: Path | None = None
    """Folder of stored examples; None: those that come with the model, if any."""
    device: str | None = None
    """Torch device; None: the best available."""
    dtype: str | None = None
    """Compute dtype; None: the model's default on that device."""
    hookpoints: Sequence[str] = ()
    """Blocks to look into; empty: the model's own."""
    saes: str | None = None
    """Sparse autoencoders with concept tables: a built-in name, a folder or a Hub id; None: the model's own, or those
    trained on this computer."""
    tickets: Tickets = field(default_factory=Tickets)
    """Jobs that are wanted."""
    queue: ModelQueue = field(default_factory=ModelQueue)
    """Jobs that wait for the model."""
    ready: threading.Event = field(default_factory=threading.Event)
    """Set once the model is loaded, or has failed to load."""
    error: str | None = None
    """Why it failed to load."""

    def __post_init__(self) -> None:
        self._model: Diffuser | None = None
        self._gpu_runner: ZeroGpuRunner | None = None
        self._dictionary: ConceptDictionary | None = None
        self._segmenter: Segmenter | None = None
        self._traces: OrderedDict[str, CodeTrace] = OrderedDict()
        self._attributions: OrderedDict[tuple[str, str, float], Attribution] = OrderedDict()
        self._started = 0.0
        if self.examples_dir is None and self.spec.assets is not None:
            self.examples_dir = self.spec.assets / "examples"

    @property
    def spec(self) -> ModelSpec:
        """The model's settings; before it is loaded, as far as they are known."""
        if self._model is not None:
            return self._model.spec
        return BUILT_IN.get(self.name) or ModelSpec(name=self.name, source=self.name)

    @property
    def model(self) -> "Diffuser | None":
        """The model, or None while it is being loaded."""
        return self._model

    @property
    def dictionary(self) -> ConceptDictionary | None:
        """The model's concepts; None while they are being loaded, or if there are none."""
        return self._dictionary

    @property
    def editor(self) -> "Editor | None":
        """Edits images by the model's concepts; None if there are none yet, or none at all."""
        if self._model is None or self._dictionary is None:
            return None
        from core.edits import Editor

        return Editor(self._model, self._dictionary.saes, self._dictionary.tables.__getitem__)

    @property
    def segmenter(self) -> "Segmenter | None":
        """Segments the model's images into classes; None for a model that comes without one."""
        if self._segmenter is None and self.spec.assets is not None:
            from core.segmentation.semantic import load_segmenter

            # On ZeroGPU there is no GPU between requests.
            self._segmenter = load_segmenter(device="cpu" if self._gpu_runner else self.device)
        return self._segmenter

    def enable_zero_gpu(self) -> None:
        """On a ZeroGPU Space: load the model now, as the Space expects, and compute on the Space's GPU.

        A small model computes on the Space's own processor instead, which uses no visitor's quota.
        """
        if not on_zero_gpu():
            return
        # In any case: such a Space has to have a function for its GPU.
        gpu_runner = ZeroGpuRunner(self, ("model", "dictionary"))
        if self.spec.half:
            self._gpu_runner = gpu_runner
        else:
            self.device = "cpu"
        self._load()

    def run(
        self, n_evals: int, function: Callable[..., Generator[T, None, None]], *arguments: Any
    ) -> Generator[T, None, None]:
        """Model work: the items of a module-level generator function, called with this runtime and the arguments.

        `n_evals` is about how many U-Net evaluations it takes. On ZeroGPU it runs in another process: arguments and
        items must be picklable, and changes to the runtime made there are lost.
        """
        if self._gpu_runner is None:
            return function(self, *arguments)
        return self._gpu_runner.run(seconds_for(n_evals), function, self, *arguments)

    def start(self) -> None:
        """Load the model in a thread of its own, unless it is loaded already."""
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
            self._model, self.engine = model, ZeroGpuEngine(engine, self._gpu_runner) if self._gpu_runner else engine
            log.info("%s is ready after %.1f s", self.name, time.monotonic() - self._started)
        except Exception as error:  # whatever it is, the page has to say it
            self.error = sentence(error)
            log.error("%s could not be loaded: %s", self.name, self.error)
        finally:
            self.ready.set()

    def badge(self) -> tuple[str, str]:
        """The model's state (`loading`, `ready` or `failed`) and a line of text about it."""
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
        """Words outside the model's vocabulary, each with the nearest it knows; empty while the model is loading, and
        for a text that is too long to be a prompt."""
        return self._model.unknown_words(prompt) if self._model is not None and len(prompt) <= MAX_PROMPT else {}

    @property
    def can_lend(self) -> bool:
        """Whether a measurement may be suspended between two U-Net calls while others use the model: not where it runs
        in another process, nor where it computes in two precisions and may have left the model in the other one."""
        if self._gpu_runner is not None or self._model is None:
            return False
        from core.information.precision import levels_of  # which imports torch, as the model did

        return levels_of(self._model) is None

    def surprisal(self, words: Sequence[str]) -> Callable[[str], float] | None:
        """The surprisal in bits of each of these words; None unless it is known for all of them."""
        known = load_surprisal(self.spec)
        return known if known is not None and all(map(math.isfinite, map(known, words))) else None

    def cached_trace(self, key: str) -> "CodeTrace | None":
        """The codes of an image, if they are still cached; `key` is its `Scene.key`."""
        return self._traces.get(key)

    def cache_trace(self, key: str, trace: "CodeTrace") -> None:
        """Cache the codes of an image; the oldest are dropped."""
        self._traces[key] = trace
        while len(self._traces) > _MAX_TRACES:
            self._traces.popitem(last=False)

    def cached_attribution(self, key: str, given: str, rel_error: float) -> Attribution | None:
        """An earlier attribution of the same image with the same settings."""
        return self._attributions.get((key, given, rel_error))

    def most_exact_attribution(self, key: str, given: str) -> Attribution | None:
        """The cached attribution of an image that has the smallest error."""
        cached = [a for (of, by, _), a in self._attributions.items() if (of, by) == (key, given)]
        return min(cached, key=lambda a: a.rel_error, default=None)

    def cache_attribution(self, key: str, attribution: Attribution) -> None:
        """Cache a finished attribution; the oldest is dropped."""
        self._attributions[key, attribution.given, requested_rel_error(attribution)] = attribution
        while len(self._attributions) > _MAX_ATTRIBUTIONS:
            self._attributions.popitem(last=False)
