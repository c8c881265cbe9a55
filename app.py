"""Serve the page: `python app.py`, then open the address it prints."""

import argparse
import errno
import logging
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from core.artifacts import find_model, find_source, neither
from core.spec import BUILT_IN
from core.threads import wait_without_spinning

wait_without_spinning()

DTYPES = ("float32", "bfloat16", "float16")
AUTH_VARIABLE = "INTERPRETABLE_DIFFUSION_AUTH"
"""Environment variable with the value of `--auth`."""
LIBRARY_NOTES = {
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    "diffusers.models.modeling_utils": "Cannot initialize model with low cpu memory usage",
    "diffusers.pipelines.pipeline_utils": "Cannot initialize model with low cpu memory usage",
}
"""By logger, notes of libraries about optional packages that the app does not need; everything else is logged."""


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The options, without the checks of `parse_args`."""
    parser = _Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--model", default="picturebook", help="picturebook, sd-v1-4, a StableDiffusionPipeline folder, or owner/name"
    )
    parser.add_argument(
        "--saes",
        default=None,
        help="autoencoders with concept tables: a folder or owner/name; by default the model's own, or those "
        "trained on this computer",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda or mps; by default the best available")
    parser.add_argument(
        "--dtype", default=None, choices=DTYPES, help="compute dtype; by default float16 for large models on a GPU"
    )
    parser.add_argument(
        "--hookpoints", nargs="+", default=(), help="blocks to look into; by default the model's own, or found"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for the whole network")
    parser.add_argument("--port", type=int, default=None, help="port; by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also make a public link through Gradio's relay")
    parser.add_argument(
        "--auth",
        default=None,
        metavar="USER:PASSWORD",
        help="ask visitors for this name and password, or for those in a file, one pair a line: @FILE. Other users of "
        f"this computer can read a command line, but neither that file nor the environment variable {AUTH_VARIABLE}, "
        "which does the same",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="while listening on this computer only, also answer requests to this host name, as a proxy passes them on",
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; options in a file `app.args` next to this one come first, as on a Space."""
    parser = build_parser()
    space = Path(__file__).with_suffix(".args")
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args([*(space.read_text(encoding="utf-8").split() if space.exists() else ()), *given])
    for problem in (_model_problem(args.model), _saes_problem(args.saes), _device_problem(args.device)):
        if problem:
            parser.error(problem)
    if problem := _address_problem(args.host, args.port):
        parser.error(problem)
    try:
        args.auth = _credentials(args.auth or os.environ.get(AUTH_VARIABLE, ""))
    except ValueError as error:
        parser.error(str(error))
    return args


def _credentials(given: str) -> list[tuple[str, str]]:
    """Names and passwords, from `USER:PASSWORD` or `@FILE`."""
    lines = [given]
    if given.startswith("@"):
        try:
            lines = Path(given[1:]).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The file of --auth, {given[1:]}, cannot be read as text.") from error
        if not any(map(str.strip, lines)):
            raise ValueError(f"The file of --auth, {given[1:]}, is empty: it needs lines such as USER:PASSWORD.")
    pairs = [tuple(line.strip().split(":", 1)) for line in lines if line.strip()]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):  # what it is stays off the screen
        raise ValueError("--auth needs a name and a password with a colon in between, such as USER:PASSWORD, or @FILE.")
    return [(user, password) for user, password in pairs]


def _model_problem(name: str) -> str | None:
    try:
        find_model(name)
    except ValueError as error:
        return str(error)
    return None


def _saes_problem(name: str | None) -> str | None:
    if name is None or name in BUILT_IN or find_source(name):
        return None
    return neither("There are no autoencoders", name, BUILT_IN)


def _device_problem(device: str | None) -> str | None:
    if device is None or re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        return None
    return f"There is no device {device!r}: use cpu, cuda, cuda:1 or mps, or leave --device out for the best available."


def _address_problem(host: str, port: int | None) -> str | None:
    if port is not None and not 1 <= port <= 65535:
        return f"There is no port {port}: use one from 1 to 65535, or leave --port out for the first free one."
    try:
        with socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"Port {port} is in use: choose another, or leave --port out for the first free one."
        if error.errno == errno.EACCES:
            return f"Port {port} is not open to you: choose one above 1023."
        return f"This machine cannot listen on {host!r}: use 127.0.0.1, 0.0.0.0, or an address of its own."


def set_up_logging() -> None:
    """Our own lines and the libraries' warnings, without `LIBRARY_NOTES`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for name, note in LIBRARY_NOTES.items():
        logging.getLogger(name).addFilter(lambda record, note=note: note not in record.getMessage())


def main() -> None:
    """Serve the page, then load the model behind it: importing torch takes longer than building the page."""
    args = parse_args()
    set_up_logging()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

    # Imported here, so that `--help` answers at once and Gradio sees the line above.
    from core.ui.backend.runtime import Runtime
    from core.ui.backend.server import LOOPBACK, is_loopback, server_options
    from core.ui.look.theme import launch_options
    from core.ui.page import build_demo

    runtime = Runtime(args.model, device=args.device, dtype=args.dtype, hookpoints=args.hookpoints, saes=args.saes)
    runtime.enable_zero_gpu()  # does nothing outside a ZeroGPU Space
    demo = build_demo(runtime)
    alone = is_loopback(args.host) and not args.share
    if not alone and not args.auth and "SPACE_ID" not in os.environ:  # a Space has its own visibility
        logging.warning(
            "Anybody who can reach %s can use this app: it asks for no password. Set one with --auth.",
            "its public link" if args.share else f"this computer on {args.host}",
        )
    _, url, shared = demo.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        inbrowser=args.open,
        quiet=True,
        prevent_thread_lock=True,
        auth=args.auth or None,
        **launch_options(),
        **server_options([*LOOPBACK, args.host, *args.allow_host] if alone else ()),
    )
    logging.info("The page is at %s (stop it with Ctrl+C).", shared or url)
    runtime.start()
    demo.block_thread()


if __name__ == "__main__":
    main()
