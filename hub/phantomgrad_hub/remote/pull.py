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
    CONFIG_FILE,
    FILES,
    MAX_JSON_BYTES,
    WEIGHTS_FILE,
    foreign_kind,
    pickles_among,
    read_config,
)

from .cache import OPTIONAL, Cache
from .checksums import Checksum, discard, of_sibling
from .client import hub, is_unreachable, retried
from .explain import explaining, not_cached

_NO_REVISION = re.compile(r"\.\.|//|@\{|[\s~^:?*\[\\]|^[-/.]|[/.]$|\.lock$")
"""What git does not allow in a name."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How the Hub and the cache are used; the defaults are the client's own.

    `token`: a token, True for the stored one, False for none. `cache_dir`: where files are kept. `local_files_only`: ask
    nobody, take what is there.
    """

    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        if self.token == "":
            raise ValueError("token is an empty text; leave it out, or pass False for none")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A whole checkpoint in the cache."""

    folder: Path
    source: Source


def check_repository(repository: str) -> None:
    """Raise `CheckpointNotFoundError` unless the Hub allows such a name."""
    if not isinstance(repository, str):
        raise TypeError(f"a repository is named by a str, user/name, not {type(repository).__name__}")
    if not REPOSITORY.fullmatch(repository):
        raise CheckpointNotFoundError(f"{repository!r:.100} is no repository of the Hub; they are called user/name")


def check_revision(revision: str | None) -> None:
    """Raise `CheckpointNotFoundError` unless git allows such a branch, tag or commit."""
    if revision is None:
        return
    if not isinstance(revision, str):
        raise TypeError(f"a revision is a str, a branch, tag or commit, not {type(revision).__name__}")
    if not 1 <= len(revision) <= 200 or not revision.isprintable() or _NO_REVISION.search(revision):
        raise CheckpointNotFoundError(f"{revision!r:.100} is no branch, tag or commit")


def pull(repository: str, revision: str | None = None, access: Access | None = None) -> Snapshot:
    """The checkpoint of `repository` at `revision`, a branch, tag or commit, `main` by default.

    A commit that is whole in the cache is taken from there without a request. Where the Hub cannot be reached the last
    commit fetched for `revision` stands in, with a warning. Raises `CheckpointNotFoundError`, `CheckpointError` or
    `HubError`, each one line.
    """
    access = access or Access()
    check_repository(repository)
    check_revision(revision)
    offline = access.local_files_only or require("huggingface_hub.constants").HF_HUB_OFFLINE
    with explaining(repository, revision, token=access.token):
        cache = Cache(repository, access.cache_dir)
        commit = cache.commit_of(revision or "main")
        if offline:
            folder = None if commit is None else cache.folder(commit, listed=False)
            if commit is None or folder is None:
                raise not_cached(f"{repository} at {revision}" if revision else repository)
            return Snapshot(folder=folder, source=Source(repository=repository, commit=commit))
        if commit is not None and commit == revision and (folder := cache.folder(commit, listed=True)) is not None:
            return Snapshot(folder=folder, source=Source(repository=repository, commit=commit))
        try:
            return _fetch(repository, revision, access, cache, tries=None if commit is None else 2)
        except Exception as error:
            folder = cache.folder(commit, listed=True) if commit is not None and is_unreachable(error) else None
            if commit is None or folder is None:
                raise
            here = Snapshot(folder=folder, source=Source(repository=repository, commit=commit))
            reason = str(error).strip().splitlines() or [type(error).__name__]
    warnings.warn(
        f"the Hugging Face Hub cannot be reached ({reason[0]}); {repository} is the copy in the cache, commit "
        f"{here.source.commit[:12]}",
        UserWarning,
        stacklevel=2,
    )
    return here


def _fetch(repository: str, revision: str | None, access: Access, cache: Cache, tries: int | None) -> Snapshot:
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
    try:
        largest = read_config(config).largest_file
    except ValueError as error:
        raise CheckpointError(f"{source.repository} at {source.commit[:12]}: {error}") from error
    # The weights come last: what is cut short is short of them.
    names = [
        *FILES[1:-1],
        *(name for name in OPTIONAL if name in siblings and not fetch.is_too_large(name)),
        WEIGHTS_FILE,
    ]
    for name in names:
        fetch(name, largest if name == WEIGHTS_FILE else MAX_JSON_BYTES)
    cache.remember(revision or "main", source.commit, fetch.verified)
    return Snapshot(folder=config.parent, source=source)


class _Fetcher:
    """Fetches files of one commit and verifies them."""

    def __init__(self, source: Source, access: Access, siblings: Mapping[str, Any]) -> None:
        self.source, self.siblings, self._access = source, siblings, access
        self.verified: dict[str, Checksum] = {}

    def is_too_large(self, name: str) -> bool:
        """Whether an optional file is too large to be one of ours; it is then left out."""
        size = self.siblings[name].size
        return size is not None and size > MAX_JSON_BYTES

    def __call__(self, name: str, largest: int) -> Path:
        """The verified file `name`, of at most `largest` bytes, in the cache."""
        repository, expected = self.source.repository, of_sibling(self.siblings[name])
        if expected is None:
            raise HubError(f"{repository}: the Hub gives no checksum of {name}; it was not fetched")
        if expected.size is not None and expected.size > largest:
            raise CheckpointError(
                f"{repository}: {name} has {expected.size:,} bytes, more than the {largest:,} that it can have; "
                "it was not fetched"
            )
        for _ in range(2):
            file = retried(lambda: self._download(name))
            if expected.matches(file):
                self.verified[name] = expected
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


def _no_checkpoint(fetch: _Fetcher, missing: Sequence[str]) -> str:
    """Why a repository is no checkpoint of this library."""
    start = f"{fetch.source.repository} is no checkpoint of phantomgrad: it has no {', '.join(missing)}"
    if CONFIG_FILE in fetch.siblings and (kind := foreign_kind(fetch(CONFIG_FILE, MAX_JSON_BYTES))):
        return f"{start}; its {CONFIG_FILE} is that of a {kind} model"
    if pickles := pickles_among(fetch.siblings):
        return f"{start}; {pickles[0]} is a pickle, which is never loaded: download it and run `phantomgrad convert`"
    return start
