"""`phantomgrad pull`: fetch a checkpoint from the Hugging Face Hub into a folder."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from .common import UsageError, add_command, print_json


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "pull",
        summary="Fetch a checkpoint from the Hugging Face Hub: one commit, every file verified, no pickle.",
        notes="A folder is for keeping: every command takes user/name, or user/name@revision, as a checkpoint too.",
        example="phantomgrad pull user/name --out checkpoint",
    )
    parser.add_argument("repository", metavar="REPO", help="user/name, or user/name@revision")
    parser.add_argument("--revision", default=None, help="a branch, tag or commit; by default main")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a folder that is not there yet")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fetch, check that the model loads, copy."""
    from phantomgrad_hub.remote.copy import copy_snapshot
    from phantomgrad_hub.remote.pull import pull

    repository, at, named = options.repository.partition("@")
    if at and (not named or options.revision not in (None, named)):
        raise UsageError(f"{options.repository}: give one revision, after @ or as --revision")
    out = Path(options.out)
    if not options.out or out.exists() or out.is_symlink():
        raise UsageError(f"--out {out} is there already; give a folder that is not")
    snapshot = pull(repository, named or options.revision)
    files = copy_snapshot(snapshot, out)
    if options.json:
        print_json({"checkpoint": str(out), **snapshot.source.to_dict(), "files": files})
        return 0
    print(f"{out}: {repository} at commit {snapshot.source.commit}")
    print(f"classify with it: phantomgrad predict PHOTO --checkpoint {shlex.quote(str(out))}")
    return 0
