"""The solves that run for visitors, so that another event of the same visitor can end one."""

from __future__ import annotations

import secrets
from collections.abc import Generator
from contextlib import contextmanager

from .trajectory import Settling


class Runs:
    """Running solves by a name that only the visitor's own page is told."""

    def __init__(self) -> None:
        self._running: dict[str, Settling] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._running

    @contextmanager
    def named(self, settling: Settling) -> Generator[str, None, None]:
        """The name of a solve while it runs."""
        name = secrets.token_urlsafe(12)
        self._running[name] = settling
        try:
            yield name
        finally:
            self._running.pop(name, None)

    def stop(self, name: object) -> None:
        """End a solve where it stands; its steps are shown. Nothing where it has ended already."""
        settling = self._running.get(name) if isinstance(name, str) else None
        if settling is not None:
            settling.stop()

    def drop(self, name: object) -> None:
        """End a solve that nobody waits for any more; it is a run no longer."""
        settling = self._running.pop(name, None) if isinstance(name, str) else None
        if settling is not None:
            settling.stop()
