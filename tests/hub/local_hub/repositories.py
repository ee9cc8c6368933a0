"""Bare git repositories with LFS pointers, as the Hub keeps them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
_REGULAR, _LINK = "100644", "120000"


class ConflictError(Exception):
    """The branch is no longer where the commit's parent was."""


@dataclass(frozen=True)
class Entry:
    """A file of a commit."""

    path: str
    blob: str
    """Git's sha1: of the pointer for a file in LFS."""
    size: int
    """Bytes of the content."""
    pointer_size: int
    lfs: str | None
    """The sha256 of the content of a file in LFS."""


class Repository:
    """One bare repository under `folder`; LFS objects lie in `objects`, by their sha256."""

    def __init__(self, folder: Path, objects: Path, *, private: bool, gated: bool) -> None:
        self.folder, self._objects = folder, objects
        self.private, self.gated = private, gated
        self._entries: dict[str, dict[str, Entry]] = {}
        self._git("init", "--bare", "--quiet", "--initial-branch=main", str(folder), at_home=False)
        self.commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit"
        )

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag, `refs/...` or full commit; None where there is none."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            found = subprocess.run(
                ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"],
                cwd=self.folder,
                capture_output=True,
                text=True,
                check=False,
            )
            if found.returncode == 0:
                return found.stdout.strip()
        return None

    def entries(self, commit: str) -> dict[str, Entry]:
        """The files of a commit by their paths."""
        if commit not in self._entries:
            found = {}
            for line in self._git("ls-tree", "-r", "-z", "-l", commit).split(b"\0"):
                if line:
                    description, _, path = line.partition(b"\t")
                    _, _, blob, size = description.decode().split()
                    found[path.decode()] = self._entry(path.decode(), blob, int(size))
            self._entries[commit] = found
        return self._entries[commit]

    def read(self, entry: Entry) -> bytes:
        """The content of a file."""
        return (
            self._git("cat-file", "blob", entry.blob) if entry.lfs is None else (self._objects / entry.lfs).read_bytes()
        )

    def history(self, revision: str) -> list[str]:
        """The commits of `revision`, newest first."""
        return self._git("rev-list", revision).decode().split()

    def tag(self, name: str, commit: str) -> None:
        """Let `name` mean `commit`."""
        self._git("update-ref", f"refs/tags/{name}", commit)

    def store(self, content: bytes) -> str:
        """Keep `content` as an LFS object; its sha256."""
        name = hashlib.sha256(content).hexdigest()
        partial = self._objects / f".{name}.{os.urandom(4).hex()}"
        partial.write_bytes(content)
        partial.replace(self._objects / name)
        return name

    def commit(
        self,
        branch: str,
        files: Mapping[str, bytes | None],
        message: str,
        *,
        lfs: Mapping[str, tuple[str, int]] | None = None,
        links: Mapping[str, str] | None = None,
        parent: str | None = None,
    ) -> str:
        """Add `files` (None removes one), files in LFS by sha256 and size, and symbolic links; the new commit.

        Raises `ConflictError` where `parent` is given and is not what `branch` is at.
        """
        tip = self.resolve(f"refs/heads/{branch}")
        if parent is not None and parent != tip:
            raise ConflictError(f"expected {parent}, {branch} is at {tip}")
        pointers = {path: _POINTER.format(*target).encode() for path, target in (lfs or {}).items()}
        with tempfile.TemporaryDirectory() as scratch:
            index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
            if tip is not None:
                self._git("read-tree", tip, more=index)
            lines = []
            for path, content in {**files, **pointers}.items():
                lines.append(
                    f"0 {'0' * 40}\t{path}" if content is None else f"{_REGULAR} {self._blob(content)}\t{path}"
                )
            lines += [f"{_LINK} {self._blob(target.encode())}\t{path}" for path, target in (links or {}).items()]
            self._git("update-index", "--add", "--index-info", stdin="\n".join(lines).encode() + b"\n", more=index)
            tree = self._git("write-tree", more=index).decode().strip()
        parents = [] if tip is None else ["-p", tip]
        made = self._git("commit-tree", tree, *parents, "-m", message or "no message").decode().strip()
        self._git("update-ref", f"refs/heads/{branch}", made, tip or "0" * 40)
        return made

    def _entry(self, path: str, blob: str, size: int) -> Entry:
        if size < 1024 and (content := self._git("cat-file", "blob", blob)).startswith(b"version https://git-lfs"):
            fields = dict(line.split(" ", 1) for line in content.decode().splitlines())
            return Entry(path, blob, int(fields["size"]), size, fields["oid"].removeprefix("sha256:"))
        return Entry(path, blob, size, size, None)

    def _blob(self, content: bytes) -> str:
        return self._git("hash-object", "-w", "--stdin", stdin=content).decode().strip()

    def _git(
        self, *arguments: str, stdin: bytes = b"", more: Mapping[str, str] | None = None, at_home: bool = True
    ) -> bytes:
        who = {
            f"GIT_{role}_{field}": value
            for role in ("AUTHOR", "COMMITTER")
            for field, value in (("NAME", "hub"), ("EMAIL", "hub@localhost"))
        }
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.folder if at_home else self.folder.parent,
            input=stdin,
            capture_output=True,
            env={**os.environ, **who, **(more or {})},
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.decode()}")
        return done.stdout
