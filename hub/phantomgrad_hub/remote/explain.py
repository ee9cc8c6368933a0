"""Every failure of the network, of rights and of content in one line that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager

from phantomgrad import PhantomGradError
from phantomgrad_hub.errors import CheckpointNotFoundError, HubError
from phantomgrad_hub.extras import require

from .client import chain, errors, hub, is_forbidden, is_unreachable, seconds_to_wait, status, transport_error

LOG_IN = "log in (`hf auth login`, or set HF_TOKEN)"


@contextmanager
def explaining(
    repository: str, revision: str | None = None, *, token: str | bool | None = None, writing: bool = False
) -> Generator[None, None, None]:
    """Raise what the client raises as `HubError` or `CheckpointNotFoundError`; `writing` says that this is a push."""
    try:
        yield
    except PhantomGradError:
        raise
    except Exception as error:
        told = explain(error, repository, revision, token=token, writing=writing)
        if told is None:
            raise
        raise told from error


def explain(
    error: Exception,
    repository: str,
    revision: str | None,
    *,
    token: str | bool | None = None,
    writing: bool = False,
) -> PhantomGradError | None:
    """One line on `error`; None where it is not the client's."""
    kinds = errors()
    found = list(chain(error))
    wanted = f"{repository} at {revision}" if revision else repository

    def has(kind: type[BaseException]) -> bool:
        return any(isinstance(entry, kind) for entry in found)

    if (full := _unwritable(found)) is not None:
        return HubError(full)
    if has(kinds.HFValidationError):
        return CheckpointNotFoundError(f"{repository} is no name of a repository: {_first_line(found)}")
    if has(kinds.OfflineModeIsEnabled):
        return _offline(wanted, writing)
    if has(kinds.GatedRepoError):
        return HubError(
            f"{repository} is gated: ask for access at {page(repository)}, then {LOG_IN} with the account that has it"
        )
    if has(kinds.DisabledRepoError):
        return HubError(
            f"{repository} has been disabled by the Hugging Face Hub; its page says why: {page(repository)}"
        )
    if has(kinds.RevisionNotFoundError):
        return CheckpointNotFoundError(
            f"{repository} has no revision {revision or 'main'} on the Hugging Face Hub; {page(repository)}/tree/main "
            "lists its branches and tags"
        )
    answered = 403 if writing and is_forbidden(error) else status(error)
    if (has(kinds.RepositoryNotFoundError) and answered != 403) or answered in (401, 404):
        return _not_found(repository, answered, token, writing)
    if answered is not None:
        return HubError(_refused(error, answered, wanted, writing))
    if is_unreachable(error):
        return HubError(
            f"the Hugging Face Hub cannot be reached for {wanted}: {_first_line(found)}; check the connection and try again"
        )
    if has(kinds.LocalEntryNotFoundError) or has(transport_error()) or has(OSError) or has(ValueError):
        doing = "pushed to" if writing else "fetched from"
        return HubError(f"{wanted} cannot be {doing} the Hugging Face Hub: {_first_line(found)}")
    if _is_raised_by_client(error):
        return HubError(f"the Hugging Face Hub's answer for {wanted} makes no sense ({_first_line(found)}); try again")
    return None


def not_cached(wanted: str) -> HubError:
    """That a checkpoint asked for offline is not in the cache, or not whole."""
    return HubError(
        f"{wanted} is not in the cache and the Hugging Face Hub may not be asked (HF_HUB_OFFLINE, or local_files_only): "
        "fetch it once with a connection, or give a folder"
    )


def _offline(wanted: str, writing: bool) -> HubError:
    if writing:
        return HubError(f"nothing can be pushed to {wanted} offline; unset HF_HUB_OFFLINE")
    return not_cached(wanted)


def _not_found(repository: str, answered: int | None, token: str | bool | None, writing: bool) -> PhantomGradError:
    used = token if isinstance(token, str) else token is not False and hub().get_token()
    if answered == 401 and used:
        return HubError(f"the Hugging Face Hub does not accept your token (401); {LOG_IN} anew")
    if writing:
        return HubError(f"you may not write to {repository}, or it is not there; {LOG_IN} with an account that may")
    more = (
        f"check the name; if it is private, {LOG_IN}"
        if not used
        else "check the name, and that your account may read it"
    )
    return CheckpointNotFoundError(
        f"{repository} is neither a folder here nor a repository on the Hugging Face Hub that you may read; {more}"
    )


def _refused(error: Exception, answered: int, wanted: str, writing: bool) -> str:
    if answered == 429:
        wait = seconds_to_wait(error)
        when = f"in {wait:.0f} seconds" if wait is not None else "in some minutes"
        return f"the Hugging Face Hub limits your requests (429); try again {when}, or {LOG_IN} for a higher limit"
    if answered == 403:
        may = "write to" if writing else "read"
        return f"your token may not {may} {wanted} (403): {_server_message(error)}; take one with that right"
    if answered in (409, 412) and writing:
        return f"{wanted} was changed by somebody else at the same time ({answered}); look at it, then push again"
    if answered >= 500:
        return f"the Hugging Face Hub is out of order ({answered}) for {wanted}; try again later: https://status.huggingface.co"
    return f"the Hugging Face Hub refuses {wanted} ({answered}): {_server_message(error)}"


def _is_raised_by_client(error: Exception) -> bool:
    """Whether it is the client that stumbled, such as over an answer that lacks what it looks for."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("huggingface_hub")


def _server_message(error: Exception) -> str:
    for entry in chain(error):
        message = getattr(entry, "server_message", None)
        if isinstance(message, str) and message.strip():
            return " ".join(message.split())[:300].rstrip(".")
    return "no reason given"


def _unwritable(found: list[BaseException]) -> str | None:
    for entry in found:
        if isinstance(entry, OSError) and entry.errno in (errno.ENOSPC, errno.EDQUOT):
            cache = require("huggingface_hub.constants").HF_HUB_CACHE
            return f"the disk is full: {entry.filename or cache}; free some space, or set HF_HOME to a folder with more of it"
        if isinstance(entry, PermissionError) and entry.filename:
            return f"{entry.filename} cannot be written: {entry.strerror}; set HF_HOME to a folder of yours"
    return None


def _first_line(found: list[BaseException]) -> str:
    """The innermost error that says something."""
    for entry in reversed(found):
        for line in str(entry).splitlines():
            if line.strip():
                return line.strip().rstrip(".")[:300]
    return type(found[0]).__name__


def page(repository: str) -> str:
    """The address of a repository."""
    return f"{require('huggingface_hub.constants').ENDPOINT}/{repository}"
