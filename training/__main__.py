"""`python -m training COMMAND`: what makes and measures the artifacts."""

import argparse
import importlib
import logging
import os
import sys

COMMANDS = {
    "picturebook": ("training.pipeline.run", "train the embedded model and put it into the package"),
    "sae": ("training.sae.command", "train sparse autoencoders while the sampler runs"),
    "labels": ("training.labels.command", "name the concepts of sparse autoencoders"),
    "evaluate": ("training.evaluate.run", "measure whether the claims are true"),
    "publish": ("training.hub.publish", "put autoencoders and concept tables on the Hub"),
    "deploy-space": ("training.hub.space", "put the app on a Hugging Face Space"),
    "benchmark": ("training.benchmark.run", "measure speed, each figure beside a peer or a floor"),
}
"""Name, module with `add_arguments` and `main`, and help of each command."""

SHARES_WORK = "sae"
"""The command that joins the processes that torchrun or `accelerate launch` starts."""


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=help_text, description=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        # Only the command that is asked for is imported: torch and diffusers take seconds.
        if name in sys.argv[1:2]:
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args()
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    if n_processes > 1 and arguments.command != SHARES_WORK and getattr(arguments, "world", 1) == 1:
        parser.error(
            f"{n_processes} processes were started, each of which would do all of {arguments.command!r} by itself. "
            f"Start one; only {SHARES_WORK!r} shares its work out that way."
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    importlib.import_module(COMMANDS[arguments.command][0]).main(arguments)


if __name__ == "__main__":
    main()
