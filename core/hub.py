"""What the Hub answered, in a sentence. Imports no torch."""

import errno
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_SIGN_IN = "sign in with `hf auth login`, with a token that may read it"


def hub_answer(error: BaseException, hub_id: str, revision: str | None = None) -> str:
    """Why a repository could not be read, and what to do about it, as the end of a sentence.

    Args:
        error: What huggingface_hub raised; its causes are looked at too.
        hub_id: The repository, `owner/name`.
        revision: The commit, tag or branch that was asked for.
    """
    url = f"https://huggingface.co/{hub_id}"
    for one in _causes(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(one, GatedRepoError):
            return f"access to it is granted on request: ask at {url}, then {_SIGN_IN}."
        if isinstance(one, RevisionNotFoundError):
            return f"the Hub has no revision {revision!r} of it. {url}/tree/main lists its branches and tags."
        if isinstance(one, RepositoryNotFoundError) or status == 404:
            return f"the Hub shows you none of this name (404). Check the name; if it is private, {_SIGN_IN}."
        if status == 401:
            return f"the Hub does not know who asks (401): {_SIGN_IN}; an expired token is refused too."
        if status == 403:
            return f"the Hub refuses you (403): {url} says who may read it; {_SIGN_IN}."
        if status == 429:
            wait = one.response.headers.get("Retry-After") if hasattr(one, "response") else None
            pause = f"{wait} seconds" if wait else "a few minutes"
            return f"the Hub was asked too often from here (429): try again in {pause}, or {_SIGN_IN}."
        if status is not None and status >= 500:
            return f"the Hub has a fault of its own ({status}): try again in a few minutes."
        if isinstance(one, OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE is set: unset it, or run `hf download {hub_id}` where there is a network."
        if isinstance(one, OSError) and (said := _disk(one)):
            return said
    return f"the Hub was not reached ({error}): check the network or proxy, and try again."


def _disk(error: OSError) -> str | None:
    """What is wrong with the cache's disk, if that is it."""
    remedy = "set HF_HOME to a folder that can be written and has room"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror}): {remedy}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of the cache {constants.HF_HUB_CACHE} is full: make room, or {remedy}."
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
