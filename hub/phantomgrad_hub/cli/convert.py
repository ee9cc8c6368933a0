"""`phantomgrad convert`: official MDEQ checkpoints as checkpoint folders."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_command, print_json


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "convert",
        summary="Turn a checkpoint file of the official MDEQ code into a checkpoint folder.",
        example="phantomgrad convert MDEQ_Small_Cls.pkl --out mdeq-small",
    )
    parser.add_argument("file", metavar="FILE", help="a file that torch.save wrote; nothing in it is executed")
    parser.add_argument("--out", required=True, help="the new checkpoint folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from phantomgrad_hub.convert import convert_official

    model = convert_official(options.file)
    model.save_pretrained(options.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if options.json:
        print_json({"checkpoint": options.out, "parameters": parameters, "classes": len(model.labels)})
    else:
        print(f"{options.out}: an MDEQ of {parameters:,} parameters for {len(model.labels)} classes")
    return 0
