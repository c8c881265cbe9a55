"""A stand-in for the package `spaces`: what it wraps runs in a fork that is sent its arguments and sends its results.

As in the real one, everything sent is pickled, an error of the task comes back as a `gr.Error` without its message, and
closing the generator ends the work at its next item.
"""

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import gradio as gr
import torch

FORK = multiprocessing.get_context("fork")


class FakeSpaces(ModuleType):
    """Put it into `sys.modules` as `spaces`."""

    def __init__(self) -> None:
        super().__init__("spaces")
        self.durations: list[float] = []
        self.exit_codes: list[int | None] = []
        self.n_items = FORK.Value("i", 0)
        self.quota = True

    def GPU(self, task: Callable[..., Iterator[Any]], *, duration: Callable[..., float]) -> Callable[..., Any]:
        def handler(*arguments: Any) -> Iterator[Any]:
            self.durations.append(duration(*arguments))
            if not self.quota:
                raise gr.Error("You have exceeded your free ZeroGPU quota (20s requested vs. 0s left).")
            here, there = FORK.Pipe()
            stop = FORK.Event()
            process = FORK.Process(target=self._work, args=(task, pickle.dumps(arguments), there, stop))
            process.start()
            there.close()
            try:
                while True:
                    kind, value = pickle.loads(here.recv_bytes())
                    if kind == "error":
                        raise gr.Error(value)
                    if kind == "end":
                        return
                    yield value
            finally:
                stop.set()
                here.close()
                process.join(30)
                self.exit_codes.append(process.exitcode)

        return handler

    def _work(self, task: Callable[..., Iterator[Any]], arguments: bytes, pipe: Any, stop: Any) -> None:
        torch.set_num_threads(1)  # other threads do not survive a fork
        try:
            items = task(*pickle.loads(arguments))
            for item in items:
                with self.n_items:
                    self.n_items.value += 1
                if stop.is_set():
                    items.close()  # type: ignore[attr-defined]
                    return
                pipe.send_bytes(pickle.dumps(("item", item)))
            pipe.send_bytes(pickle.dumps(("end", None)))
        except BrokenPipeError:
            return
        except Exception as error:
            pipe.send_bytes(pickle.dumps(("error", type(error).__name__)))
