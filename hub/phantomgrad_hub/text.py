"""Words of other people's files in our messages."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

_LONGEST = 100


def summarise(entries: Iterable[str], limit: int = 8) -> str:
    """The first entries, each shortened and made printable, and how many there are beyond."""
    listed = list(entries)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(printable(entry) for entry in islice(listed, limit)) + more


def printable(text: str, longest: int = _LONGEST) -> str:
    """`text` in one line that cannot steer a terminal, its middle left out where it is long."""
    if len(text) > longest:
        text = f"{text[: longest // 2]}...{text[-longest // 4 :]}"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
