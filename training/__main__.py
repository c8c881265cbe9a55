"""`python -m training COMMAND`: train, label, evaluate and publish models and sparse autoencoders."""

import argparse
import importlib
import io
import logging
import os
import sys
from pathlib import Path
from types import ModuleType

from core.errors import is_deliberate
from core.threads import wait_without_spinning

wait_without_spinning()

COMMANDS = {
    "picturebook": ("training.pipeline.run", "train the embedded model and put it into the package"),
    "sae": ("training.sae.command", "train sparse autoencoders while the sampler runs"),
    "labels": ("training.labels.command", "label the latents of sparse autoencoders"),
    "evaluate": ("training.evaluate.run", "measure whether the claims are true"),
    "publish": ("training.hub.publish", "put autoencoders and concept tables on the Hub"),
    "deploy-space": ("training.hub.space", "put the app on a Hugging Face Space"),
    "benchmark": ("training.benchmark.run", "measure speed, next to other implementations and lower bounds"),
    "report": ("training.pipeline.report", "write the READMEs of all stored results"),
}
"""Name, module with `add_arguments` and `main`, and help of each command."""

DISTRIBUTED = ("sae", "labels")
"""Commands that share their work among the processes that torchrun or `accelerate launch` starts."""
EXTRAS = ("accelerate", "datasets", "filelock")
"""Packages that the commands need and the app does not."""


def main() -> None:
    """Parse the command line and run the command. A user's mistake ends in one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=help_text, description=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        # Only the command that is asked for is imported: torch and diffusers take seconds.
        if name in sys.argv[1:2]:
            _import(module, parser).add_arguments(command)
    arguments = parser.parse_args()
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    if n_processes > 1 and arguments.command not in DISTRIBUTED:
        parser.error(
            f"{n_processes} processes were started, each of which would do all of {arguments.command!r} by itself. "
            f"Start one; only {' and '.join(map(repr, DISTRIBUTED))} share their work."
        )
    for option in ("out", "run_dir"):
        if (folder := getattr(arguments, option, None)) is not None:
            _check_writable(folder, f"--{option.replace('_', '-')}", parser)
    if (device := getattr(arguments, "device", None)) is not None:
        _check_device(device, parser)
    for stream in (sys.stdout, sys.stderr):  # a prompt that a terminal cannot show ends no run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        _import(COMMANDS[arguments.command][0], parser).main(arguments)
    except (Exception, SystemExit) as error:
        if not _is_mistake(error):
            raise
        parser.exit(2, f"{parser.prog} {arguments.command}: error: {error}\n")


def _import(module: str, parser: argparse.ArgumentParser) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        parser.error(f'{error.name} is not installed. Run `pip install -e ".[train]"` in the checkout.')


def _check_writable(folder: Path, option: str, parser: argparse.ArgumentParser) -> None:
    """Refuse a folder that cannot be made or written to before hours are spent on what goes into it."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        parser.error(f"{option}: {folder} cannot be written, because of {existing}. Name another folder.")


def _check_device(device: str, parser: argparse.ArgumentParser) -> None:
    """Refuse a device that torch does not know or this computer does not have."""
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device: {device!r} cannot be used: {str(error).splitlines()[0]}. Try cpu, cuda or mps.")


def _is_mistake(error: BaseException) -> bool:
    """Whether the message is for the user: errors of the file system and the network, the project's own exceptions, and
    the ValueErrors that it raises on purpose. Any other exception is a bug, whose traceback is wanted.
    """
    if isinstance(error, SystemExit):
        return isinstance(error.code, str)
    return isinstance(error, OSError) or is_deliberate(error, (ValueError,))


if __name__ == "__main__":
    main()
