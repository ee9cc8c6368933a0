"""Fetch a checkpoint: one commit of a repository, every file verified, or nothing.

The revision is resolved once, to a commit, and everything comes from there. What is known before the weights is checked
before them: that the repository holds a checkpoint of this library, what its config asks for, and that the weights are no
larger than such a model's. Files lie in the cache of `huggingface_hub`, shared with every other library.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantomgrad_hub.errors import CheckpointError, CheckpointNotFoundError, HubError
from phantomgrad_hub.extras import require
from phantomgrad_hub.facts import COMMIT, REPOSITORY, Source
from phantomgrad_hub.files import (
    CARD_FILE,
    CONFIG_FILE,
    FACTS_FILE,
    FILES,
    MAX_JSON_BYTES,
    WEIGHTS_FILE,
    foreign_kind,
    pickles_among,
    read_config,
)

from .checksums import discard, of_cached, of_sibling
from .client import hub, is_unreachable, retried
from .explain import explaining, not_cached

_OPTIONAL = (FACTS_FILE, CARD_FILE)
_REVISION = re.compile(r"[\w][\w.+/-]{0,199}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Access:
    """How the Hub and the cache are used; the defaults are the client's own.

    `token`: a token, True for the stored one, False for none. `cache_dir`: where files are kept. `local_files_only`: ask
    nobody, take what is there.
    """

    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A whole checkpoint in the cache."""

    folder: Path
    source: Source


def pull(repository: str, revision: str | None = None, access: Access | None = None) -> Snapshot:
    """The checkpoint of `repository` at `revision`, a branch, tag or commit, `main` by default.

    A commit that is whole in the cache is taken from there without a request. Where the Hub cannot be reached the last
    commit fetched for `revision` stands in, with a warning. Raises `CheckpointNotFoundError`, `CheckpointError` or
    `HubError`, each one line.
    """
    access = access or Access()
    if not REPOSITORY.fullmatch(repository):
        raise CheckpointNotFoundError(f"{repository!r:.100} is no repository of the Hub; they are called user/name")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        raise CheckpointNotFoundError(f"{revision!r:.100} is no branch, tag or commit")
    here = _cached(repository, revision, access)
    offline = access.local_files_only or require("huggingface_hub.constants").HF_HUB_OFFLINE
    if here is not None and (offline or here.source.commit == revision):
        return here
    if offline:
        raise not_cached(f"{repository} at {revision}" if revision else repository)
    with explaining(repository, revision):
        try:
            return _fetch(repository, revision, access, tries=2 if here else None)
        except Exception as error:
            if here is None or not is_unreachable(error):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
    warnings.warn(
        f"the Hugging Face Hub cannot be reached ({reason[0]}); {repository} is the copy in the cache, commit "
        f"{here.source.commit[:12]}",
        UserWarning,
        stacklevel=2,
    )
    return here


def _fetch(repository: str, revision: str | None, access: Access, tries: int | None) -> Snapshot:
    api = hub().HfApi(token=access.token)
    info = retried(lambda: api.model_info(repository, revision=revision, files_metadata=True), tries=tries)
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise HubError(f"{repository}: the Hub names no commit; is HF_ENDPOINT a Hugging Face Hub?")
    source = Source(repository=repository, commit=info.sha)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    fetch = _Fetcher(source, access, siblings)
    if missing := [file for file in FILES if file not in siblings]:
        raise CheckpointNotFoundError(_no_checkpoint(fetch, missing))
    config = fetch(CONFIG_FILE, MAX_JSON_BYTES)
    folder = config.parent
    try:
        largest = read_config(config).largest_file
    except ValueError as error:
        raise CheckpointError(f"{source.repository} at {source.commit[:12]}: {error}") from error
    for file in (*FILES[1:], *(name for name in _OPTIONAL if name in siblings)):
        fetch(file, largest if file == WEIGHTS_FILE else MAX_JSON_BYTES)
    _remember(folder, revision or "main", source.commit)
    return Snapshot(folder=folder, source=source)


class _Fetcher:
    """Fetches files of one commit and verifies them."""

    def __init__(self, source: Source, access: Access, siblings: Mapping[str, Any]) -> None:
        self.source, self.siblings, self._access = source, siblings, access

    def __call__(self, name: str, largest: int) -> Path:
        """The verified file `name`, of at most `largest` bytes, in the cache."""
        repository, expected = self.source.repository, of_sibling(self.siblings[name])
        if expected is None:
            raise HubError(f"{repository}: the Hub gives no checksum of {name}; it was not fetched")
        if expected.size is not None and expected.size > largest:
            raise CheckpointError(
                f"{repository}: {name} has {expected.size:,} bytes, more than the {largest:,} that this model can have; "
                "it was not fetched"
            )
        for _ in range(2):
            file = retried(lambda: self._download(name))
            if expected.matches(file):
                return file
            discard(file)
        raise HubError(
            f"{repository}: {name} arrived damaged twice (its {expected.algorithm} differs); it was removed, try again"
        )

    def _download(self, name: str) -> Path:
        source, access = self.source, self._access
        return Path(
            hub().hf_hub_download(
                source.repository, name, revision=source.commit, token=access.token, cache_dir=access.cache_dir
            )
        )


def _cached(repository: str, revision: str | None, access: Access) -> Snapshot | None:
    """The last commit fetched for `revision`, where all its files are in the cache and are what they should be."""

    def find(name: str, commit: str | None) -> Path | None:
        found = hub().try_to_load_from_cache(repository, name, cache_dir=access.cache_dir, revision=commit)
        return Path(found) if isinstance(found, str) else None

    config = find(CONFIG_FILE, revision)
    if config is None or not COMMIT.fullmatch(config.parent.name):
        return None
    source = Source(repository=repository, commit=config.parent.name)
    for name in (*FILES, *_OPTIONAL):
        file = find(name, source.commit)
        if file is None:
            if name in FILES:
                return None
            continue
        expected = of_cached(file)
        if expected is not None and not expected.matches(file):
            discard(file)
            return None
    return Snapshot(folder=config.parent, source=source)


def _remember(folder: Path, revision: str, commit: str) -> None:
    """Note in the cache which commit `revision` was, once all of it is here; offline it is found by this."""
    if COMMIT.fullmatch(revision):
        return
    note = folder.parent.parent / "refs" / revision
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f".{note.name}.{os.getpid()}")
        partial.write_text(commit, encoding="utf-8")
        partial.replace(note)
    except OSError:
        # A cache that may only be read serves all the same.
        return


def _no_checkpoint(fetch: _Fetcher, missing: Sequence[str]) -> str:
    """Why a repository is no checkpoint of this library."""
    start = f"{fetch.source.repository} is no checkpoint of phantomgrad: it has no {', '.join(missing)}"
    if CONFIG_FILE in fetch.siblings and (kind := foreign_kind(fetch(CONFIG_FILE, MAX_JSON_BYTES))):
        return f"{start}; its {CONFIG_FILE} is that of a {kind} model"
    if pickles := pickles_among(fetch.siblings):
        return f"{start}; {pickles[0]} is a pickle, which is never loaded: download it and run `phantomgrad convert`"
    return start
