"""`phantomgrad demo`: the page on which a photo is classified."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from phantomgrad_hub.extras import require, require_installed

from .common import INTERRUPTED, UsageError, add_command


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "demo",
        summary="Serve the demo page on this machine.",
        example="phantomgrad demo --port 7860",
        json_output=False,
    )
    parser.add_argument(
        "--checkpoint",
        default="embedded",
        help="embedded (the default), a folder, or a repository of the Hugging Face Hub",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 serves other machines too")
    parser.add_argument("--port", type=int, default=None, help="by default 7860 or the next free one; 0 takes any")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    if options.port is not None and not 0 <= options.port <= 65535:
        raise UsageError(f"--port must be between 0 and 65535, not {options.port}")
    require("gradio", "demo")
    for module, distribution in (("skimage", "scikit-image"), ("sklearn", "scikit-learn")):  # the example photos
        require_installed(module, distribution, "demo")
    # By name: the hub does not depend on the demo.
    app = require("phantomgrad_demo.app", "demo")
    try:
        app.launch(checkpoint=options.checkpoint, host=options.host, port=options.port)
    except KeyboardInterrupt:
        # A visitor's thread may still be inside torch; the interpreter aborts if it shuts down under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    return 0
