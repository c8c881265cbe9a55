"""What a person is told of an error."""

import logging
import secrets

import gradio as gr
from gradio.exceptions import InvalidPathError
from pydantic import ValidationError

from core.errors import is_deliberate

log = logging.getLogger(__name__)


class JobError(RuntimeError):
    """A job that cannot be done; the message says why and what to do."""


def refuse(*problems: str | None) -> None:
    """Raise the first problem, if there is one, as the API client's error."""
    for problem in problems:
        if problem:
            raise gr.Error(problem, print_exception=False)


def sentence(error: BaseException) -> str:
    """What a person is told of an error: its message if we wrote it, else a reference to the log, where it then is.

    The libraries' and Python's own messages are for programmers, and some name folders of this computer.
    """
    if is_deliberate(error, (ValueError, LookupError, gr.Error)):
        return str(error.message if isinstance(error, gr.Error) else error)
    if isinstance(error, gr.Error):  # of one of Gradio's components
        return "A value of this request is not among those that can be chosen. The API's description lists them."
    if isinstance(error, InvalidPathError):
        return "Only a file that was uploaded to this app can be used. Upload it, and use the path in the answer."
    if isinstance(error, ValidationError):
        return "A part of this request does not have the form that it has in the API's description (?view=api)."
    reference = secrets.token_hex(3)
    log.error("reference %s", reference, exc_info=error)
    return f"Something went wrong here. What it was is in the server's log, under the reference {reference}."
