"""Files of a run that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phantomgrad_hub.json_text import json_text


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it in its place in one step."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json_text(value, indent=2) + "\n"
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a folder, then swap it with `path`; `repair_folder` undoes a swap that was cut short."""
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def repair_folder(path: Path) -> None:
    """Put back the folder that `write_folder` had moved aside when the process was killed, and remove unfinished ones."""
    old = path.with_name(f".{path.name}.old")
    if old.is_dir() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    # A checkpoint is written in a folder of its own beside the partial one: that stays behind too.
    for left in path.parent.glob(f".*{path.name}.partial*"):
        shutil.rmtree(left, ignore_errors=True)
