"""phantomgrad inside code written for torchdeq 0.1.0.

    import phantomgrad.torchdeq
    phantomgrad.torchdeq.register()
    deq = torchdeq.get_deq(args, core="phantom")  # everything else in the script stays as it is

Every option of torchdeq is mapped to our solvers and gradients, or refused by name; docs/from-torchdeq.md lists them.
torchdeq is imported by `register` and by nothing else.
"""

from __future__ import annotations

import importlib
from typing import Any

from phantomgrad.torchdeq._deq import PhantomDEQ as PhantomDEQ
from phantomgrad.torchdeq._options import DEQOptions as DEQOptions
from phantomgrad.torchdeq._reading import read

__all__ = ["DEQOptions", "PhantomDEQ", "register"]


def register() -> None:
    """Teach `torchdeq.get_deq` the cores "phantom" and "phantom-indexing"; doing so twice is harmless.

    With one returned state, which is torchdeq's default, the two are the same. With several, "phantom" builds the graph of
    torchdeq's core "sliced" (each solve goes on from the last returned state) and "phantom-indexing" that of "indexing" (the
    states are taken from a single solve).

    Raises ImportError, with the line that installs it, where torchdeq is missing.
    """
    try:
        torchdeq: Any = importlib.import_module("torchdeq")
    except ModuleNotFoundError as error:
        if error.name != "torchdeq":
            raise
        message = "torchdeq is not installed; run: pip install 'phantomgrad[torchdeq]'"
        raise ImportError(message, name="torchdeq") from error
    for core in ("phantom", "phantom-indexing"):
        torchdeq.register_deq(core, _build)


def _build(config: Any) -> PhantomDEQ:
    """What `get_deq` calls with its arguments, merged into a `DEQConfig`."""
    return PhantomDEQ(read(config.config))
