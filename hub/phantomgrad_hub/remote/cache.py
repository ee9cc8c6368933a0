"""What lies in the client's cache of a repository, and whether it is whole.

The client's cache does not say which files a commit has, nor, where it keeps plain copies, what they must hash to. So
beside its own folders there is `phantomgrad/`: a list of files and checksums for every commit that was fetched whole, and the
commit that each revision was last. A checkpoint that another program fetched has no list; it serves offline, as far as
the client's names of its files, which are checksums, are right.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from phantomgrad_hub.extras import require
from phantomgrad_hub.facts import COMMIT
from phantomgrad_hub.files import CARD_FILE, CONFIG_FILE, FACTS_FILE, FILES

from .checksums import Checksum, discard, of_cached
from .client import hub

OPTIONAL = (FACTS_FILE, CARD_FILE)


class Cache:
    """The cache of one repository."""

    def __init__(self, repository: str, cache_dir: str | os.PathLike[str] | None) -> None:
        self._repository = repository
        self._root = cache_dir
        constants = require("huggingface_hub.constants")
        base = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self._notes = base / f"models--{repository.replace('/', '--')}" / "phantomgrad"

    def commit_of(self, revision: str) -> str | None:
        """The commit that `revision` was when it was last fetched, None if it never was."""
        if COMMIT.fullmatch(revision):
            return revision
        try:
            commit = self._note(revision).read_text(encoding="utf-8")
        except (OSError, ValueError):
            config = self._find(CONFIG_FILE, revision)
            commit = "" if config is None else config.parent.name
        return commit if COMMIT.fullmatch(commit) else None

    def folder(self, commit: str, *, listed: bool) -> Path | None:
        """The folder with all files of `commit`, verified; None where one is missing or damaged.

        `listed` asks for a list of the commit's files, without which optional ones may be missing. Damaged files are removed.
        """
        expected = self._list(commit)
        if expected is None:
            if listed:
                return None
            names = [*FILES, *(name for name in OPTIONAL if self._find(name, commit) is not None)]
            expected = dict.fromkeys(names)
        folder = None
        for name, checksum in expected.items():
            file = self._find(name, commit)
            if file is None:
                return None
            checksum = checksum or of_cached(file)
            if checksum is not None and not checksum.matches(file):
                discard(file)
                return None
            folder = file.parent
        return folder

    def remember(self, revision: str, commit: str, files: Mapping[str, Checksum]) -> None:
        """Note that all `files` of `commit` are here, and that it is what `revision` is now."""
        rows = {name: [entry.algorithm, entry.digest, entry.size] for name, entry in files.items()}
        try:
            self._notes.mkdir(parents=True, exist_ok=True)
            self._write(self._notes / f"{commit}.json", json.dumps(rows))
            if revision != commit:
                self._write(self._note(revision), commit)
        except OSError:
            # A cache that may only be read serves all the same, online.
            return

    def _note(self, revision: str) -> Path:
        return self._notes / f"{quote(revision, safe='')}.revision"

    def _list(self, commit: str) -> dict[str, Checksum | None] | None:
        try:
            rows = json.loads((self._notes / f"{commit}.json").read_text(encoding="utf-8"))
            found: dict[str, Checksum | None] = {name: Checksum(*rows[name]) for name in rows}
        except (OSError, ValueError, TypeError):
            return None
        return found if set(FILES) <= set(found) <= {*FILES, *OPTIONAL} else None

    def _find(self, name: str, revision: str) -> Path | None:
        found = hub().try_to_load_from_cache(self._repository, name, cache_dir=self._root, revision=revision)
        return Path(found) if isinstance(found, str) else None

    @staticmethod
    def _write(file: Path, text: str) -> None:
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
