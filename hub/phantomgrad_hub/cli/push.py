"""`phantomgrad push`: publish a checkpoint on the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_command, print_json, table


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "push",
        summary="Publish a checkpoint on the Hugging Face Hub: one commit, with a model card.",
        notes="needs an account: `hf auth login`, or HF_TOKEN. A repository that is not there is made.",
        example="phantomgrad push run/best user/name --private",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint, such as the best of a run; or embedded")
    parser.add_argument("repository", metavar="REPO", help="user/name")
    visible = parser.add_mutually_exclusive_group()
    visible.add_argument("--private", action="store_true", default=None, help="make the new repository private")
    visible.add_argument("--public", dest="private", action="store_false", help="make the new repository public")
    parser.add_argument("--revision", metavar="BRANCH", default=None, help="a branch that is there; by default main")
    parser.add_argument("--message", default=None, help="the commit's message")
    parser.add_argument(
        "--overwrite-card", action="store_true", help="replace README.md on the Hub although somebody edited it"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent, and send nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Push, and say what was sent."""
    from phantomgrad_hub.download import locate_folder
    from phantomgrad_hub.remote.push import plan, push

    folder: Path = locate_folder(options.folder)
    if options.dry_run:
        planned = plan(folder, options.repository)
        if options.json:
            print_json({"repository": options.repository, "files": planned.sizes, "card": planned.card})
            return 0
        print(f"{options.repository} would get, where it does not have them already:")
        print(table([(f"  {name}", f"{size:,} bytes") for name, size in planned.sizes.items()]))
        print("README.md is " + ("rendered from the template." if planned.rendered else "the folder's own."))
        return 0
    done = push(
        folder,
        options.repository,
        private=options.private,
        revision=options.revision,
        message=options.message,
        overwrite_card=options.overwrite_card,
    )
    if options.json:
        print_json({"url": done.url, "commit": done.commit, "sent": list(done.sent), "kept_card": done.kept_card})
        return 0
    sent = f"sent {', '.join(done.sent)}" if done.sent else "everything was there, no commit made"
    print(f"{done.url} at {done.commit[:12]}: {sent}")
    if done.kept_card:
        print(
            "README.md on the Hub differs and somebody wrote or edited it, so it stays; --overwrite-card replaces it."
        )
    return 0
