"""What stands between the web and every handler of the page and the API: answers, listeners, hosts and headers."""

import time
from asyncio import Queue
from collections.abc import Collection, Sequence
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.ui.backend.errors import refuse, sentence
from core.ui.backend.queue import MAX_WAITING, asker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names under which only this computer reaches itself."""
MAX_THREADS = MAX_WAITING + 48
"""Each waiting job takes a thread, and must not take one from what needs no model."""
UNHEARD_SECONDS, UNHEARD_STEPS = 15.0, 12
"""How long, and at least for how many steps, a job goes on whose answers nobody fetches."""
MAX_BODY = 4_000_000
"""Bytes of a request that is no upload: the page and the API send settings and short texts."""
KEEP_FILES = (900, 4 * 3600)
"""Seconds between two looks for old files, and how old uploads and images that were given back may become."""
CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio starts the page with a script in it, and compiles the small scripts of its HTML components.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
"""Nothing is loaded from, or sent to, another host, not even by a script that found its way into the page."""


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this computer's own, which no other can reach."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def server_options(hosts: Sequence[str]) -> dict[str, Any]:
    """Options of `Blocks.launch`; `hosts` are the host names to answer to, without ports, or none for all."""
    names = {host.strip("[]").lower() for host in hosts}
    return {
        "max_threads": MAX_THREADS,
        "app_kwargs": {"middleware": [Middleware(Guard, hosts=names)]},
        "enable_monitoring": False,
        "run_history": False,
    }


class PageBlocks(gr.Blocks):
    """Blocks in which every failure, Gradio's own checks included, is answered with one sentence.

    A job whose answers nobody fetches is closed: a client may ask without ever listening.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._piles: WeakKeyDictionary[Queue[Any], _Pile] = WeakKeyDictionary()

    async def process_api(self, *arguments: Any, **options: Any) -> Any:
        """One step of a handler; see `gr.Blocks`.

        Raises:
            gr.Error: With a sentence for the person who asked.
        """
        session: str = options.get("session_hash") or ""
        asker.set(session)
        try:
            if options.get("iterator") is None:
                _check_count(options.get("block_fn"), options.get("inputs"))
            result = await super().process_api(*arguments, **options)
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=False) from error
        if isinstance(result, dict) and result.get("is_generating") and self._is_unheard(session):
            raise gr.Error("Nobody was listening any more.", print_exception=False)
        return result

    def _is_unheard(self, session: str) -> bool:
        """Whether a session's messages only pile up: a listener takes those of earlier steps while a step runs."""
        messages = self._queue.pending_messages_per_session.get(session)
        if messages is None:
            return False
        now, size = time.monotonic(), messages.qsize()
        pile = self._piles.get(messages)
        if pile is None or size <= pile.size:
            pile = _Pile(now, size, 0)
        self._piles[messages] = pile = pile._replace(size=size, n_grown=pile.n_grown + 1)
        return pile.n_grown > UNHEARD_STEPS and now - pile.since > UNHEARD_SECONDS


def _host_of(scope: Scope) -> str | None:
    """The host that a request names, without its port; None for what is no host."""
    try:
        return urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname
    except ValueError:
        return None


def _check_count(handler: Any, values: Any) -> None:
    """Refuse a request with fewer values than its handler takes."""
    needed, found = len(getattr(handler, "inputs", ())), len(values or ())
    if found < needed:
        refuse(f"{needed} values are needed here, in the order of the API's description; {found} were sent.")


class _Pile(NamedTuple):
    """Messages that nobody has taken yet."""

    since: float
    """When one was taken last, or the first one was put there."""
    size: int
    """How many there are."""
    n_grown: int
    """In how many steps they became more."""


class Guard:
    """ASGI middleware: refuses foreign hosts and large requests, and adds the headers that browsers obey.

    A page elsewhere can have its name resolved to 127.0.0.1 (DNS rebinding), and would then be let in by the browser;
    but its requests name its own host.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()) -> None:
        """Args:
        app: What is guarded.
        hosts: Host names that are answered, without ports; empty: all.
        """
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if self.hosts and _host_of(scope) not in self.hosts:
            text = (
                "This app listens on this computer only, and answers to no other name. If it is meant to be reached "
                "under this one, through a proxy, start it with --allow-host and the name."
            )
            await PlainTextResponse(text, 421)(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length, is_upload = headers.get("content-length", "0"), scope["path"].rstrip("/").endswith("/upload")
        if not is_upload and ("transfer-encoding" in headers or not length.isdecimal() or int(length) > MAX_BODY):
            text = f"A request may have at most {MAX_BODY:,} bytes, and has to say how many."
            await PlainTextResponse(text, 413)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
                headers.setdefault("Content-Security-Policy", CONTENT_POLICY)
            await send(message)

        await self.app(scope, receive, with_headers)
