"""Whether a file is the one the Hub says it is: sha256 for files in LFS, git's own sha1 for the others."""

from __future__ import annotations

import hashlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 2**20


@dataclass(frozen=True)
class Checksum:
    """What a file of a commit must hash to."""

    algorithm: str
    """`sha256`, or `git-sha1` of the blob."""
    digest: str
    size: int | None = None
    """In bytes, where it is known."""

    def matches(self, file: Path) -> bool:
        """Whether `file` is that file."""
        with file.open("rb") as handle:
            return self._matches(handle, file.stat().st_size)

    def matches_bytes(self, content: bytes) -> bool:
        """Whether `content` is that of the file."""
        return self._matches(io.BytesIO(content), len(content))

    def _matches(self, handle: BinaryIO, size: int) -> bool:
        if self.size is not None and size != self.size:
            return False
        if self.algorithm == "sha256":
            found = hashlib.sha256()
        else:
            found = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        while block := handle.read(_BLOCK):
            found.update(block)
        return found.hexdigest() == self.digest


def of_sibling(sibling: Any) -> Checksum | None:
    """The checksum in one entry of `model_info(files_metadata=True).siblings`; None where it holds none."""
    if sibling.lfs is not None:
        return Checksum("sha256", sibling.lfs.sha256, sibling.lfs.size)
    return None if sibling.blob_id is None else Checksum("git-sha1", sibling.blob_id, sibling.size)


def of_cached(file: Path) -> Checksum | None:
    """The checksum by which the client's cache names the content of `file`; None where it keeps plain copies."""
    if not file.is_symlink():
        return None
    name = Path(os.readlink(file)).name
    if re.fullmatch("[0-9a-f]{64}", name):
        return Checksum("sha256", name)
    return Checksum("git-sha1", name) if re.fullmatch("[0-9a-f]{40}", name) else None


def discard(file: Path) -> None:
    """Remove `file` from the client's cache, content and name, so that it is fetched again."""
    if file.is_symlink():
        (file.parent / os.readlink(file)).unlink(missing_ok=True)
    file.unlink(missing_ok=True)
