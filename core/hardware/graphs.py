"""Small U-Net calls replayed from CUDA graphs.

For a few latents, launching a thousand kernels from Python takes longer than computing them. A CUDA graph launches all
at once: always the same kernels, on the same memory. A graph can therefore replace the forward of a module as long as
nothing recorded in it changes, and no Python code other than the module's own has to run inside:

- Without hooks inside the U-Net, the whole call is one graph.
- With hooks, each residual or attention block without hooks inside has a graph of its own. Hooks on a block itself run
  outside its forward, so that recordings and edits of blocks work as usual.
- A block runs kernel by kernel if it has hooks inside, modules that are neither torch's nor diffusers' (PEFT adapters),
  or attention processors that are not diffusers' or have settings; and so does a U-Net whose forward another library
  has replaced, as accelerate does to move weights on demand.

A graph is recorded at the third call of its kind (same shapes, strides and dtypes), and kept only if its first replay
equals the call to the bit. All graphs share a memory pool. Any failure, such as running out of memory, turns graphs off
with one line in the log, and the call runs without them.
"""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from core.hardware.graph_calls import equal, forward_of, is_tensors, kind_of_call, kind_of_tensor
from core.hardware.graph_capture import Capture, CudaCapture, Output, Work

log = logging.getLogger(__name__)

MAX_BATCH = 8
"""Maximum number of latents in a replayed call; larger calls keep a GPU busy for longer than their launches take."""
N_EAGER = 2
"""Ordinary calls of a kind before it is recorded, which pays off only for frequent calls."""
MAX_GRAPHS = 8
"""Graphs kept per module, the most recently used."""
_KNOWN = ("torch.nn.", "diffusers.")
"""Packages whose modules and attention processors depend on nothing but their parts and settings."""


class CallGraphs:
    """Replays small calls of a U-Net inside `replaying`; outside, the U-Net is unchanged."""

    enabled: bool
    """Whether calls are replayed; may be set at any time, and is set to False when recording fails."""
    n_captured: int
    """Graphs recorded so far."""
    n_replayed: int
    """Replays so far."""

    def __init__(
        self, unet: torch.nn.Module, *, enabled: bool = True, capture: Callable[[], Capture] = CudaCapture
    ) -> None:
        """`capture` makes the recorder, again after each `clear`."""
        self.enabled = enabled
        self.n_captured = self.n_replayed = 0
        self._unet, self._make_capture = unet, capture
        self._capture: Capture | None = None
        self._forwards: list[_Forward] = []
        self._inputs: dict[Any, Tensor] = {}
        self._settings: tuple[Any, ...] = ()
        self._lock = threading.Lock()
        self._thread: int | None = None

    def clear(self) -> None:
        """Drop all graphs and their memory; frequent calls are recorded again."""
        for forward in self._forwards:
            forward.drop()
        self._inputs.clear()
        self._capture = None

    @contextmanager
    def replaying(self, n_rows: int) -> Iterator[None]:
        """A context in which this thread calls the U-Net with `n_rows` latents: whatever can be replayed is."""
        if not self.enabled or n_rows > MAX_BATCH or not self._can_replay() or not self._lock.acquire(blocking=False):
            yield
            return
        try:
            self._thread = threading.get_ident()
            self._prepare()
            for forward in self._forwards:
                forward.put_in_place()
            yield
        finally:
            for forward in self._forwards:
                forward.remove()
            self._thread = None
            self._lock.release()

    def is_active(self) -> bool:
        """Whether the present thread is inside `replaying`, and not inside `alone`."""
        return self._thread == threading.get_ident()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which no module is replayed, because what is called there becomes part of a graph."""
        thread, self._thread = self._thread, None
        try:
            yield
        finally:
            self._thread = thread

    def record(self, work: Work, given: Sequence[Tensor]) -> tuple[Output, "_Graph | None"]:
        """The output of some work, and its graph; None if recording fails, which turns everything off."""
        expected = work(*given)
        try:
            if not is_tensors(expected):
                raise RuntimeError(f"the U-Net's parts return tensors, not a {type(expected).__name__}")
            # An input made in inference mode could not be written outside it.
            with torch.inference_mode(False), torch.no_grad():
                inputs = [self._input(slot, tensor) for slot, tensor in enumerate(given)]
                if self._capture is None:
                    self._capture = self._make_capture()
                graph = _Graph(inputs, self._capture(work, inputs))
                if not equal(expected, graph(given)):
                    raise RuntimeError("a replay does not equal the call")
        except RuntimeError as error:  # running out of memory is one
            self.enabled = False
            self.clear()
            log.warning("CUDA graphs of the U-Net are off; small calls take longer: %s", error)
            return expected, None
        self.n_captured += 1
        return expected, graph

    def _input(self, slot: int, like: Tensor) -> Tensor:
        """The tensor from which graphs read an argument; shared by all arguments of the same kind."""
        key = (slot, kind_of_tensor(like))
        if key not in self._inputs:
            self._inputs[key] = torch.empty_like(like)
        return self._inputs[key].copy_(like)

    def _can_replay(self) -> bool:
        is_replaced = "forward" in vars(self._unet) and not isinstance(vars(self._unet)["forward"], _Forward)
        is_watched = torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        return not (is_replaced or is_watched or torch.is_autocast_enabled("cuda"))

    def _prepare(self) -> None:
        """Find the modules that can have graphs, and drop all graphs if settings have changed that select kernels."""
        modules = [self._unet, *_blocks(self._unet)]
        if modules != [forward.module for forward in self._forwards]:
            self.clear()
            self._forwards = [_Forward(module, self) for module in modules]
        cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
        settings = (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
            cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
            cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
            cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
            cuda.matmul.allow_fp16_reduced_precision_reduction,
            cuda.matmul.allow_bf16_reduced_precision_reduction,
        )
        if settings != self._settings:
            self.clear()
            self._settings = settings


class _Graph:
    """Recorded work, with the tensors that it reads."""

    def __init__(self, inputs: Sequence[Tensor], replay: Callable[[], Output]) -> None:
        self._inputs, self._replay = inputs, replay

    def __call__(self, given: Sequence[Tensor]) -> Output:
        """The output for given inputs, in new tensors: the next replay overwrites the recorded ones."""
        for held, tensor in zip(self._inputs, given, strict=True):
            held.copy_(tensor)
        output = self._replay()
        return output.clone() if isinstance(output, Tensor) else tuple(tensor.clone() for tensor in output)


class _Forward:
    """Replaces the forward of a module during a call."""

    def __init__(self, module: torch.nn.Module, owner: CallGraphs) -> None:
        self.module, self._owner = module, owner
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._n_calls: Counter[Any] = Counter()
        self._state: list[Any] | None = None
        self._inside: list[dict[str, Any]] = []
        self._is_known = False

    def put_in_place(self) -> None:
        """Become the forward of the module, unless another library has replaced it."""
        vars(self.module).setdefault("forward", self)

    def remove(self) -> None:
        """Restore the module."""
        if vars(self.module).get("forward") is self:
            del vars(self.module)["forward"]

    def drop(self) -> None:
        """Forget all graphs."""
        self._graphs.clear()
        self._n_calls.clear()
        self._state = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module: replayed, recorded, or computed as usual."""
        owner, forward = self._owner, type(self.module).forward
        kind = kind_of_call(args, kwargs) if owner.is_active() and owner.enabled else None
        if kind is None or not self._check_state():
            return forward(self.module, *args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if kind in self._graphs:
            self._graphs.move_to_end(kind)
            owner.n_replayed += 1
            return self._graphs[kind](given)
        with owner.alone():
            self._n_calls[kind] += 1
            if self._n_calls[kind] <= N_EAGER:
                return forward(self.module, *args, **kwargs)
            output, graph = owner.record(forward_of(self.module, args, kwargs), given)
        if graph is not None:
            self._graphs[kind] = graph
            while len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        return output

    def _check_state(self) -> bool:
        """Whether the module can be replayed now; drops its graphs if its weights or parts have changed."""
        state = self._find_state()
        if state is not None and state != self._state:
            self.drop()
            modules = list(self.module.modules())
            self._inside = [vars(module) for module in modules]
            self._is_known = all(_is_known(module) for module in modules)
            self._state = state = self._find_state()
        return state is not None and self._is_known

    def _find_state(self) -> list[Any] | None:
        """What a graph depends on: parts, settings, and the addresses of weights. None if other code has to run."""
        found: list[Any] = []
        own = vars(self.module)
        for inside in self._inside or [own]:
            if inside is not own and (inside["_forward_hooks"] or inside["_forward_pre_hooks"]):
                return None
            forward, processor, parts = inside.get("forward"), inside.get("processor"), inside["_modules"]
            if forward is not None and not isinstance(forward, _Forward):
                return None
            if processor is not None:
                if vars(processor) or not _is_known(processor):
                    return None
                found.append(processor)
            if parts:
                found += parts.values()
                found += [value for value in inside.values() if type(value) in (bool, int, float)]
            for weights in (inside["_parameters"], inside["_buffers"]):
                found += [weight.data_ptr() for weight in weights.values() if weight is not None]
        return found


def _is_known(part: object) -> bool:
    return type(part).__module__.startswith(_KNOWN)


def _blocks(unet: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of the levels of a diffusers U-Net: residual and attention blocks, down- and upsampling."""
    levels = [*getattr(unet, "down_blocks", ()), getattr(unet, "mid_block", None), *getattr(unet, "up_blocks", ())]
    lists = [part for level in levels if level is not None for part in level.children()]
    return [block for part in lists if isinstance(part, torch.nn.ModuleList) for block in part]
