"""`phantomgrad export`: a checkpoint as one file that runs without this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import UsageError, add_command, positive_integer, print_json


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "export",
        summary="Write a checkpoint as one .onnx or .pt2 file that runs without phantomgrad, and check its answers.",
        notes="FILE.onnx runs in onnxruntime and others, FILE.pt2 in torch.export.load. Its input is a float32 batch of\n"
        "preprocessed photos, as many as you like, its output logits. A .json of the same name holds class names,\n"
        "preprocessing and solver.",
        example="phantomgrad export embedded --out model.onnx",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="embedded, a folder, or a repository of the Hugging Face Hub"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the new file, ending in .onnx or .pt2")
    parser.add_argument(
        "--steps",
        type=positive_integer,
        metavar="N",
        help="evaluations of the block for every photo; by default as many as the checkpoint's solver may take, at most 12 if "
        "that is Anderson's or Broyden's",
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export, and say what was written and how it was checked."""
    from phantomgrad_hub.errors import ExportError
    from phantomgrad_hub.export import CHECKED_BATCHES, export, file_format
    from phantomgrad_hub.models.mdeq import MDEQ

    try:
        ending = file_format(Path(options.out))
    except ExportError as error:
        raise UsageError(f"--out {error}") from error
    found = export(MDEQ.from_pretrained(options.checkpoint), options.out, steps=options.steps, force=options.force)
    if options.json:
        print_json({"checkpoint": options.checkpoint, **found.to_dict()})
        return 0
    print(
        f"{found.path}: {found.size / 1e6:.1f} MB, {found.steps} steps of the block damped by {found.damping:g}; class names and "
        f"preprocessing in {found.description}"
    )
    if found.difference is None:
        print("not checked: onnxruntime is not installed; pip install 'phantomgrad[export]' brings it")
        return 0
    engine = "torch.export.load" if ending == ".pt2" else "onnxruntime"
    batches = " and ".join(map(str, CHECKED_BATCHES))
    print(
        f"checked in {engine} on batches of {batches} random images: its logits are the model's after as many steps, "
        f"largest difference {found.difference:.1e} of the largest logit"
    )
    return 0
