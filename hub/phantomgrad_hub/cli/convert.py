"""`phantomgrad convert`: official MDEQ checkpoints as checkpoint folders."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phantomgrad_hub.files import LIBRARY_VERSION

from .common import PROGRAM, UsageError, add_command, fail, print_json


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
    parser.add_argument(
        "--config",
        metavar="FILE",
        help='JSON with fields of the model config that the file does not show, such as {"groups": 4}; the rest is inferred',
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="names of the classes in order, a line each or as in labels.json; those of ImageNet-1k and CIFAR-10 are known",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from phantomgrad_hub.checkpoint import WEIGHTS_FILE
    from phantomgrad_hub.convert import convert_official
    from phantomgrad_hub.errors import CheckpointError
    from phantomgrad_hub.labels import default_labels, read_labels

    out = Path(options.out)
    if out.is_dir() and any(out.iterdir()) and not (out / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{out} is not empty and is no checkpoint; give another folder")
    labels = None if options.labels is None else read_labels(options.labels)
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        model = convert_official(options.file, _fields(options.config), labels=labels)
    for warning in noted:
        fail(f"{PROGRAM} convert: {warning.message}")
    model.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    named = model.classes != default_labels(len(model.classes))
    if options.json:
        print_json({"checkpoint": options.out, "parameters": parameters, "classes": len(model.labels), "named": named})
        return 0
    names = f"{', '.join(model.labels[:3])}, ..." if named else "without names; --labels FILE names them"
    print(f"{out}: an MDEQ of {parameters:,} parameters for {len(model.labels)} classes: {names}")
    return 0


def _fields(file: str | None) -> Mapping[str, Any] | None:
    if file is None:
        return None
    try:
        fields = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config {file} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"--config {file} must hold a JSON object of fields of the model config")
    # Which release wrote a checkpoint's config is no field of the model.
    return {key: value for key, value in fields.items() if key != LIBRARY_VERSION}
