"""What the subcommands share: arguments, messages, devices."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from phantomgrad import PhantomGradError
from phantomgrad_hub.json_text import json_text
from phantomgrad_hub.text import printable

PROGRAM = "phantomgrad"
DATA_HELP = (
    "folder of one subfolder of photos for each class, or of train and val with such subfolders; folder of train-*.parquet and "
    "validation-*.parquet; cifar10:FOLDER, imagenette:FOLDER or imagenet:FOLDER as torchvision lays them out; user/name on the "
    "Hugging Face Hub, streamed"
)
INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended: 128 and the signal's number, as shells have it."""


class UsageError(PhantomGradError, ValueError):
    """The arguments make no sense together: exit status 2."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the help only where it is asked for."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        fail(f"{self.prog}: {message} (see {self.prog} --help)")
        raise SystemExit(2)


def add_command(
    commands: Any, name: str, *, summary: str, example: str, notes: str = "", json_output: bool = True
) -> argparse.ArgumentParser:
    """A subcommand's parser; its help ends with `notes` and `example`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"{notes}\n\nexample:\n  {example}".lstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser)
    if json_output:
        parser.add_argument("--json", action="store_true", help="print JSON for machines")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, by default the GPU where there is one."""
    parser.add_argument(
        "--device", type=device, default=None, help="cpu, cuda, cuda:1, mps; by default a GPU if there is one"
    )


def device(text: str) -> torch.device:
    """The device of that name; raises where this machine lacks it."""
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; take cpu, cuda, cuda:1 or mps") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} is not available on this machine")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise argparse.ArgumentTypeError(f"{text!r} is not supported; take cpu, cuda, cuda:1 or mps")
    return chosen


def default_device(chosen: torch.device | None) -> torch.device:
    """`chosen`, else a GPU where there is one."""
    return chosen or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def positive_integer(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return value


def seed(text: str) -> int:
    """An integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return int(text)


def step_counts(text: str) -> tuple[int, ...]:
    """Numbers of solver steps: `1,2,4,8`."""
    return tuple(positive_integer(part.strip()) for part in text.split(","))


def fail(message: str) -> None:
    """One line on stderr."""
    print(printable(" ".join(message.split()), longest=4000), file=sys.stderr)


def print_json(value: Any) -> None:
    """One JSON document on stdout, in ASCII where stdout's encoding lacks a character."""
    text = json_text(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json_text(value, indent=2)
    print(text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts in columns, the first aligned left and the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
