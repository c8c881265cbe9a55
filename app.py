"""Serve the page: `python app.py`, then open the address it prints."""

import argparse
import logging
import os
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line; options in a file `app.args` beside this one come before it, which is how a Space has some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--model", default="picturebook", help="picturebook, sd-v1-4, a StableDiffusionPipeline folder, or owner/name"
    )
    parser.add_argument(
        "--saes",
        default=None,
        help="autoencoders with concept tables: a folder or owner/name; by default the model's own",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda or mps; by default the best there is")
    parser.add_argument(
        "--dtype", default=None, help="float32, bfloat16 or float16; by default float16 for large models on a GPU"
    )
    parser.add_argument(
        "--hookpoints", nargs="+", default=(), help="blocks to look into; by default the model's own, or found"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for the whole network")
    parser.add_argument("--port", type=int, default=None, help="port; by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also make a public link through Gradio's relay")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    own = Path(__file__).with_suffix(".args")
    return parser.parse_args([*(own.read_text().split() if own.exists() else ()), *sys.argv[1:]])


def main() -> None:
    """Serve the page, then load the model behind it: importing torch takes longer than building the page."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

    # Imported here, so that `--help` answers at once and Gradio sees the line above.
    from core.ui.backend.runtime import Runtime
    from core.ui.look.theme import launch_options
    from core.ui.page import build_demo

    runtime = Runtime(args.model, device=args.device, dtype=args.dtype, hookpoints=args.hookpoints, saes=args.saes)
    runtime.enable_zero_gpu()  # on a Space that lends one; nothing elsewhere
    demo = build_demo(runtime)
    _, url, shared = demo.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        inbrowser=args.open,
        quiet=True,
        prevent_thread_lock=True,
        **launch_options(),
    )
    logging.info("The page is at %s (stop it with Ctrl+C).", shared or url)
    runtime.start()
    demo.block_thread()


if __name__ == "__main__":
    main()
