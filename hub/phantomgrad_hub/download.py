"""Where a checkpoint is: a folder, the one inside this package, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from phantomgrad_hub.errors import CheckpointNotFoundError
from phantomgrad_hub.facts import REPOSITORY, Source
from phantomgrad_hub.files import EMBEDDED, EMBEDDED_FOLDER
from phantomgrad_hub.remote.pull import Access, pull


@dataclass(frozen=True, kw_only=True)
class Located:
    """A checkpoint on this machine."""

    folder: Path
    source: Source | None = None
    """The repository and commit it was fetched from."""


def locate(path_or_repo: str | os.PathLike[str], revision: str | None = None, access: Access | None = None) -> Located:
    """The local folder of a checkpoint, fetched if it is a repository.

    `path_or_repo` is a folder, `embedded`, or a repository such as `user/name` or `user/name@revision`; an existing folder
    comes first. `revision` is a branch, tag or commit of a repository.
    """
    if not isinstance(path_or_repo, str | os.PathLike):
        raise TypeError(f"a checkpoint is named by a str or a path, not {type(path_or_repo).__name__}")
    name = os.fspath(path_or_repo)
    if not name:
        raise CheckpointNotFoundError(
            "a checkpoint is named by a folder, `embedded` or user/name, not by an empty text"
        )
    if name == EMBEDDED or Path(os.path.expanduser(name)).exists():
        if revision is not None:
            raise ValueError(f"revision is for repositories of the Hub, and {name} is a folder here")
        return Located(folder=locate_folder(path_or_repo))
    repository, at, named = name.partition("@")
    if not isinstance(path_or_repo, str) or not REPOSITORY.fullmatch(repository) or bool(at) != bool(named):
        alike = name.count("/") == 1 and not name.startswith(("/", ".", "~"))
        hint = (
            "; a repository of the Hugging Face Hub is given as a str, user/name or user/name@revision" if alike else ""
        )
        raise CheckpointNotFoundError(f"there is no checkpoint folder {name}{hint}")
    if named and revision not in (None, named):
        raise ValueError(f"{name} and revision={revision!r} name two revisions")
    snapshot = pull(repository, named or revision, access)
    return Located(folder=snapshot.folder, source=snapshot.source)


def locate_folder(path: str | os.PathLike[str]) -> Path:
    """The folder `path`, or that of the embedded checkpoint; raises `CheckpointNotFoundError` where there is none."""
    name = os.fspath(path)
    folder = EMBEDDED_FOLDER if name == EMBEDDED else Path(os.path.expanduser(name))
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{name} is not a folder with a checkpoint")
    return folder
