"""The web page: `python app.py`, then open the printed address."""

import argparse
import os
import sys
from pathlib import Path

from dit_suite.ui.settings import ServerSettings, parse_auth


def build_parser() -> argparse.ArgumentParser:
    """Command-line flags of the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/app"), help="folder for what is made (default: outputs/app)"
    )
    parser.add_argument("--host", help="address to bind (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public link; needs --auth or --public")
    parser.add_argument("--public", action="store_true", help="open to strangers: small sizes, no history, short queue")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for a login (or set DIT_SUITE_AUTH)")
    parser.add_argument("--model", action="append", default=[], help="offer one more checkpoint (may be repeated)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    return parser


def read_settings(argv: list[str] | None = None) -> ServerSettings:
    """Settings from the flags and the environment; on a hosted Space the server is public.

    Raises:
        ValueError: a public address without protection, a bad --auth, or a device that can't be used.
    """
    args = build_parser().parse_args(argv)
    if args.device is not None:
        from dit_suite.checkpoints import check_device

        check_device(args.device)
    hosted = "SPACE_ID" in os.environ
    return ServerSettings(
        output=args.output,
        host=args.host or ("0.0.0.0" if hosted else "127.0.0.1"),
        port=args.port,
        share=args.share,
        public=args.public or hosted,
        auth=parse_auth(args.auth),
        models=tuple(args.model),
        device=args.device or default_device(),
    )


def default_device() -> str:
    """The accelerator that torch finds, or the CPU."""
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def main(argv: list[str] | None = None) -> int:
    """Runs the server until it is interrupted; returns 2 after one sentence about a bad setting."""
    try:
        settings = read_settings(argv)
        from dit_suite.ui.page import build_page, launch_arguments

        page = build_page(settings)
    except (ValueError, FileNotFoundError) as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    try:
        _, address, shared = page.launch(**launch_arguments(settings), prevent_thread_lock=True, quiet=True)
    except OSError as error:  # Gradio's words for a taken port name its own parameters
        where = f"port {settings.port} of {settings.host}" if settings.port else f"{settings.host}"
        print(f"app.py: can't listen on {where}; choose another --port ({error})", file=sys.stderr)
        return 2
    print(f"Open {shared or address} in a browser. Ctrl-C ends the server.", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
