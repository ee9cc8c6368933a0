"""The program `phantomgrad`."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import phantomgrad
from phantomgrad import NotConvergedWarning, PhantomGradError

from . import convert, demo, doctor, evaluate, export, predict, pull, push, train
from .common import INTERRUPTED, PROGRAM, Parser, UsageError, fail

COMMANDS = (predict, train, evaluate, convert, export, push, pull, demo, doctor)


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog=PROGRAM,
        description="Multiscale deep equilibrium image classifiers, trained with phantom gradients.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {phantomgrad.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a failure, 2 for bad usage, 128 + n for signal n."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file's name may hold what the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    command = PROGRAM
    try:
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            # Of the subcommand where there is one: its help lists what it knows.
            vars(options).get("parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
        if options.command is None:
            parser.print_help()
            return 0
        command = f"{PROGRAM} {options.command}"
        with warnings.catch_warnings():
            warnings.showwarning = _shown(command)
            status: int = options.run(options)
        sys.stdout.flush()
        return status
    except SystemExit as stop:  # argparse, after --help or an error
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        fail(f"{command}: {error}")
        return 2
    except (PhantomGradError, OSError) as error:
        fail(f"{command}: {error}")
        return 1
    except Exception as error:
        if os.environ.get("PHANTOMGRAD_TRACEBACK"):
            raise
        fail(
            f"{command}: unexpected {type(error).__name__}: {error} "
            "(set PHANTOMGRAD_TRACEBACK=1 to see where, and please report it)"
        )
        return 1


def _shown(command: str) -> Callable[..., None]:
    """How warnings are shown: the library's own in one line, those of others as ever."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category is UserWarning or issubclass(category, NotConvergedWarning):
            fail(f"{command}: {message}")
        else:
            usual(message, category, *place, **more)

    return show


if __name__ == "__main__":
    sys.exit(main())
