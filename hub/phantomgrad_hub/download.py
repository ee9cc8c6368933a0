"""Where a checkpoint is: a folder, the one inside this package, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from phantomgrad_hub.errors import CheckpointNotFoundError, HubError
from phantomgrad_hub.extras import require

EMBEDDED = "embedded"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(path_or_repo: str | os.PathLike[str], revision: str | None, files: tuple[str, ...]) -> Path:
    """The local folder of a checkpoint, fetching `files` of one commit if it is a repository.

    `path_or_repo` is a folder, `embedded`, or a repository such as `name/model`; an existing folder comes first.
    `revision` is a branch, tag or commit of a repository.
    """
    if not isinstance(path_or_repo, str | os.PathLike):
        raise TypeError(f"a checkpoint is named by a str or a path, not {type(path_or_repo).__name__}")
    name = os.fspath(path_or_repo)
    folder = Path(__file__).parent / EMBEDDED if name == EMBEDDED else Path(os.path.expanduser(name))
    if name == EMBEDDED or folder.exists():
        if revision is not None:
            raise ValueError(f"revision is for repositories of the Hub, and {name} is a folder here")
        if not folder.is_dir():
            raise CheckpointNotFoundError(f"{name} is not a folder with a checkpoint")
        return folder
    if not isinstance(path_or_repo, str) or not _REPOSITORY.fullmatch(name):
        raise CheckpointNotFoundError(f"there is no checkpoint folder {name}")
    return _fetch(name, revision, files)


def _fetch(repository: str, revision: str | None, files: tuple[str, ...]) -> Path:
    hub, errors = require("huggingface_hub"), require("huggingface_hub.errors")
    httpx = require("httpx")
    wanted = f"{repository} at {revision}" if revision else repository
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except errors.RepositoryNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{repository} is neither a folder here nor a repository on the Hugging Face Hub that you may read"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"{repository} has no revision {revision} on the Hugging Face Hub") from error
    except (errors.HFValidationError, OSError, httpx.HTTPError) as error:
        lines = str(error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise HubError(
            f"{wanted} is no folder here and cannot be fetched from the Hugging Face Hub: {reason}"
        ) from error
