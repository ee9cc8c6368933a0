"""Requests as they are recorded, and faults that are done to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_KINDS = (
    ("whoami", r"GET /api/whoami-v2"),
    ("create", r"POST /api/repos/create"),
    ("validate-yaml", r"POST /api/validate-yaml"),
    ("info", r"GET /api/models/[^/]+/[^/]+"),
    ("revision", r"GET /api/models/[^/]+/[^/]+/revision/.+"),
    ("preupload", r"POST /api/models/[^/]+/[^/]+/preupload/.+"),
    ("commit", r"POST /api/models/[^/]+/[^/]+/commit/.+"),
    ("lfs-batch", r"POST /[^/]+/[^/]+\.git/info/lfs/objects/batch"),
    ("lfs-verify", r"POST /[^/]+/[^/]+\.git/info/lfs/verify"),
    ("lfs-put", r"PUT /lfs/.+"),
    ("lfs-get", r"GET /lfs/.+"),
    ("lfs-head", r"HEAD /lfs/.+"),
    ("get", r"GET /[^/]+/[^/]+/resolve/[^/]+/.+"),
    ("head", r"HEAD /[^/]+/[^/]+/resolve/[^/]+/.+"),
)

Action = Literal["status", "reset", "cut", "reset-body", "corrupt", "slow", "lost-answer"]


@dataclass
class Request:
    """What a client asked for."""

    number: int
    """Counted from 1 since the last reset."""
    method: str
    path: str
    kind: str
    status: int = 0
    """What was answered; 0 for a connection that was closed instead."""
    sent_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Fault:
    """What is done to the next `times` requests (None: to all) of `kind`, or to request `number`; to any where neither is given.

    `status`: answered with that status and header, nothing is done. `reset`: the connection is reset before an answer. `cut`,
    `reset-body`: the answer ends after `after_bytes` of its body, by closing or by a reset. `corrupt`: one byte of the body is
    flipped. `slow`: the answer waits `delay` seconds. `lost-answer`: all is done, then the connection is reset.
    """

    kind: str | None = None
    number: int | None = None
    action: Action = "status"
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b""
    times: int | None = 1
    after_bytes: int = 0
    delay: float = 0.0

    def meets(self, request: Request) -> bool:
        """Whether this is done to `request`."""
        if self.times is not None and self.times < 1:
            return False
        return self.kind in (None, request.kind) and self.number in (None, request.number)


def kind_of(method: str, path: str) -> str:
    """A short name for what a request is for."""
    return next((kind for kind, pattern in _KINDS if re.fullmatch(pattern, f"{method} {path}")), f"{method} {path}")
