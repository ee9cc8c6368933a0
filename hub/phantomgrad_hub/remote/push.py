"""Publish a checkpoint: one commit with all of it, or none.

Before anything is sent the checkpoint is loaded as a reader will load it. The commit is made on top of what was looked at; where
somebody else was faster, everything is looked at again. What is there already makes no commit, so that a push
whose answer was lost can be repeated.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantomgrad_hub.checkpoint import load_checkpoint, read_description
from phantomgrad_hub.errors import CheckpointError, HubError
from phantomgrad_hub.facts import COMMIT
from phantomgrad_hub.files import CARD_FILE, FACTS_FILE, FILES, WEIGHTS_FILE

from .card import is_free, render_card, without_source
from .checksums import Checksum, of_sibling
from .client import errors, hub, retried, status
from .explain import LOG_IN, explaining, page
from .pull import check_repository, check_revision

_MAX_CARD_BYTES = 2**20
_ROUNDS = 5
"""How often a push looks again because somebody else has pushed meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a push would send."""

    files: Mapping[str, Path | bytes]
    """Every file of the checkpoint by its name in the repository; the card as its text."""
    rendered: bool
    """Whether the card is rendered from the template, and not one that somebody wrote."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }

    @property
    def card(self) -> str:
        """The text of the card."""
        content = self.files[CARD_FILE]
        assert isinstance(content, bytes)
        return content.decode()


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push did."""

    url: str
    commit: str
    sent: tuple[str, ...]
    """The files that were new or different; empty where all of it was there and no commit was made."""
    kept_card: bool
    """Whether an edited card on the Hub was left as it is."""


def plan(folder: Path, repository: str) -> Plan:
    """What a push of the checkpoint in `folder` to `repository` would send; nothing is asked of the Hub.

    A card of the template, or none, is rendered for `repository`; one that somebody wrote or edited is taken as it is.
    Raises `CheckpointError` where the checkpoint cannot be loaded.
    """
    check_repository(repository)
    description = read_description(folder)
    model = load_checkpoint(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    files: dict[str, Path | bytes] = {name: folder / name for name in FILES}
    if (folder / FACTS_FILE).exists():
        files[FACTS_FILE] = folder / FACTS_FILE
    written = _read_card(folder)
    rendered = written is None or is_free(written)
    card = (
        render_card(description, repository, parameters).encode()
        if written is None or rendered
        else without_source(written)
    )
    files[CARD_FILE] = card
    return Plan(files=files, rendered=rendered)


def push(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    overwrite_card: bool = False,
    token: str | bool | None = None,
) -> Pushed:
    """Publish the checkpoint in `folder` as `repository`, which is made if it is not there.

    `private` decides who may see a new repository (None: as the account says) and refuses to push to one that differs.
    `revision` is a branch that is there. A card that somebody edited on the Hub stays, unless `overwrite_card`. Raises
    `CheckpointError` where the checkpoint cannot be loaded, `HubError` where the Hub cannot be reached or refuses.
    """
    check_repository(repository)
    check_revision(revision)
    if revision is not None and COMMIT.fullmatch(revision):
        raise HubError(f"{revision} is a commit, and a push goes to a branch; leave out the revision, or name a branch")
    if token == "":
        raise ValueError("token is an empty text; leave it out")
    # What is loaded is what is sent, whatever becomes of the folder meanwhile.
    with tempfile.TemporaryDirectory(prefix="phantomgrad-push-") as scratch:
        with explaining(repository, revision, token=token, writing=True):
            planned = plan(_copy(folder, Path(scratch) / folder.resolve().name), repository)
        return _push(planned, repository, private, revision, message, overwrite_card, token)


def _push(
    planned: Plan,
    repository: str,
    private: bool | None,
    revision: str | None,
    message: str | None,
    overwrite_card: bool,
    token: str | bool | None,
) -> Pushed:
    api = hub().HfApi(token=token)
    if token is False or (token is None and hub().get_token() is None):
        raise HubError(f"nobody is logged in, so nothing can be pushed to {repository}; {LOG_IN}")
    attempted: tuple[str, ...] = ()

    def once() -> Pushed:
        nonlocal attempted
        info = _look(api, repository, revision, private)
        sent, kept_card = _compare(repository, planned, info, token, overwrite_card)
        commit = info.sha
        if sent:
            attempted = sent
            operations = [
                hub().CommitOperationAdd(path_in_repo=name, path_or_fileobj=_content(planned.files[name]))
                for name in sent
            ]
            commit = api.create_commit(
                repository,
                operations,
                commit_message=message or _message(info),
                revision=revision,
                parent_commit=info.sha,
            ).oid
        # Where the answer to an earlier try was lost, what it sent is there now.
        return Pushed(url=page(repository), commit=commit, sent=sent or attempted, kept_card=kept_card)

    with explaining(repository, revision, token=token, writing=True):
        for attempt in range(_ROUNDS):
            try:
                return retried(once)
            except errors().HfHubHTTPError as error:
                if status(error) not in (409, 412) or attempt + 1 == _ROUNDS:
                    raise
    raise AssertionError("unreachable")


def _look(api: Any, repository: str, revision: str | None, private: bool | None) -> Any:
    """The repository as it is now, made if need be."""

    def ask() -> Any:
        return api.model_info(repository, revision=revision, files_metadata=True)

    info = None
    with suppress(errors().RepositoryNotFoundError):
        info = ask()
    # Not while the error is handled: what goes wrong from here on has nothing to do with it.
    if info is None and revision not in (None, "main"):
        raise HubError(
            f"{repository} is not there, so it has no branch {revision}; push to it without --revision first"
        )
    if info is None:
        # Also where it is there and this account may not see it: making it then fails for want of the right.
        api.create_repo(repository, private=private, exist_ok=True)
        info = ask()
    if private is not None and info.private is not None and bool(info.private) != private:
        raise HubError(
            f"{repository} is there already and is {'private' if info.private else 'public'}; its settings page changes that, "
            f"or push without --{'private' if private else 'public'}"
        )
    return info


def _compare(
    repository: str, planned: Plan, info: Any, token: str | bool | None, overwrite_card: bool
) -> tuple[tuple[str, ...], bool]:
    """The files that must be sent, and whether an edited card stays."""
    siblings = {sibling.rfilename: of_sibling(sibling) for sibling in info.siblings or ()}
    different = [name for name, content in planned.files.items() if not _is_there(siblings.get(name), content)]
    if CARD_FILE not in different or CARD_FILE not in siblings or overwrite_card:
        return tuple(different), False
    # The commit that was looked at, whatever has happened since.
    with tempfile.TemporaryDirectory() as scratch:
        card = hub().hf_hub_download(repository, CARD_FILE, revision=info.sha, token=token, cache_dir=scratch)
        kept = not is_free(Path(card).read_bytes())
    return tuple(name for name in different if name != CARD_FILE or not kept), kept


def _is_there(known: Checksum | None, content: Path | bytes) -> bool:
    if known is None:
        return False
    return known.matches_bytes(content) if isinstance(content, bytes) else known.matches(content)


def _content(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _copy(folder: Path, target: Path) -> Path:
    """A copy of the checkpoint's files; raises as `read_description` does where one is missing."""
    read_description(folder)
    target.mkdir()
    for name in (*FILES, FACTS_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    written = _read_card(folder)
    if written is not None:
        (target / CARD_FILE).write_bytes(written)
    return target


def _read_card(folder: Path) -> bytes | None:
    """The card in `folder`; None where there is none. Raises `CheckpointError` for one that is not to be published."""
    file = folder / CARD_FILE
    if not file.exists():
        return None
    if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{file} is no file of this folder; put the card itself there, or remove it")
    content = file.read_bytes()
    if len(content) > _MAX_CARD_BYTES:
        raise CheckpointError(f"{file} has {len(content):,} bytes, more than the {_MAX_CARD_BYTES:,} of a card")
    try:
        content.decode()
    except ValueError as error:
        raise CheckpointError(f"{file} is no UTF-8 text ({error}); save it as UTF-8") from error
    return content


def _message(info: Any) -> str:
    known = {sibling.rfilename for sibling in info.siblings or ()}
    return "Update the checkpoint" if WEIGHTS_FILE in known else "Add the checkpoint"
