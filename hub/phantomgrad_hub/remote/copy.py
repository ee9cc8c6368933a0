"""A folder of one's own with a fetched checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from phantomgrad_hub.checkpoint import load_checkpoint
from phantomgrad_hub.errors import CheckpointError
from phantomgrad_hub.files import CARD_FILE, FACTS_FILE, FILES, SOURCE_FILE, write_json

from .card import with_source
from .pull import Snapshot


def copy_snapshot(snapshot: Snapshot, folder: Path) -> list[str]:
    """Copy a checkpoint to `folder`, which appears whole or not at all; the names of its files.

    `source.json` and the last lines of the card say which commit it is. Raises `CheckpointError` where the checkpoint cannot be
    loaded or the folder cannot be written.
    """
    load_checkpoint(snapshot.folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            partial = Path(scratch) / "checkpoint"
            partial.mkdir()
            for name in (*FILES, FACTS_FILE, CARD_FILE):
                if (snapshot.folder / name).is_file():
                    shutil.copyfile(snapshot.folder / name, partial / name)
            write_json(partial / SOURCE_FILE, snapshot.source.to_dict())
            card = partial / CARD_FILE
            if card.is_file():
                card.write_bytes(with_source(card.read_bytes(), snapshot.source))
            os.rename(partial, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    return sorted(file.name for file in folder.iterdir())
