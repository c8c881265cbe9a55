"""Errors whose message a user can act on, and their form in the API."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import gradio as gr

P = ParamSpec("P")
T = TypeVar("T")


class JobError(RuntimeError):
    """A job that cannot be done; the message says why and what to do."""


def refuse(*problems: str | None) -> None:
    """Raise the first problem, if there is one, as the API client's error."""
    for problem in problems:
        if problem:
            raise gr.Error(problem, print_exception=False)


def with_client_errors(items: Iterator[T]) -> Iterator[T]:
    """The same items; errors a user can act on become the API client's. A closed request closes the work."""
    try:
        yield from items
    except (JobError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def raises_client_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that errors a user can act on become the API client's."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (IndexError, ValueError, JobError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call
