"""Photos in one subfolder a class, as people have them: what is used, what is left out, and what cannot be meant."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from phantomgrad_hub.photos import SUFFIXES
from phantomgrad_hub.text import summarise

from .errors import DataError

TABLE_FILE = "classes.json"
LAYOUT = "one subfolder of photos for each class"


@dataclass(frozen=True, kw_only=True)
class ClassFolders:
    """The photos below `root`, class by class in the order of their names."""

    names: tuple[str, ...]
    """The subfolders, sorted."""
    files: tuple[str, ...]
    targets: tuple[int, ...]
    """For each file, the index of its class."""
    ignored: tuple[str, ...]
    """Files, relative to `root`, that are no photos or lie beside the class folders."""


def scan_classes(root: Path, *, empty: bool = False) -> ClassFolders:
    """Find the photos in the subfolders of `root`; hidden files and folders (`.name`, `__name`) do not count.

    Raises `DataError` where `root` has no subfolders, where one has its photos further down, and, unless `empty`,
    where one has none.
    """
    folders, beside = _list(root)
    if not folders:
        photos = any(map(_is_photo, beside))
        found = "photos, but no subfolder" if photos else "no subfolder"
        raise DataError(f"{root} is not a dataset: it has {found}. Expected {LAYOUT}, or train-*.parquet.")
    files: list[str] = []
    targets: list[int] = []
    ignored = [name for name in beside if name != TABLE_FILE]
    for target, folder in enumerate(folders):
        inside, entries = _list(root / folder)
        for name in inside:
            _refuse_photos_below(root, Path(folder, name))
        photos = [name for name in entries if _is_photo(name)]
        others = [name for name in entries if not _is_photo(name)]
        if not photos and not empty:
            raise DataError(
                f"{root / folder} holds no photo{_kinds(others)}. Add some ({', '.join(SUFFIXES)}) or remove it."
            )
        files += [str(root / folder / name) for name in photos]
        targets += [target] * len(photos)
        ignored += [f"{folder}/{name}" for name in others]
    return ClassFolders(names=tuple(folders), files=tuple(files), targets=tuple(targets), ignored=tuple(ignored))


def has_subfolders(folder: Path) -> bool:
    """Whether `folder` is one, with subfolders that are not hidden."""
    return folder.is_dir() and bool(_list(folder)[0])


def split_folders(root: Path, names: Iterable[str]) -> tuple[Path | None, tuple[str, ...]]:
    """The first of the subfolders `names`, and what lies in `root` beside it and `train`.

    A `test` without subfolders is not meant: those who publish a dataset keep its classes to themselves.
    """
    folders, files = _list(root)
    chosen = next((name for name in names if name in folders and (name != "test" or has_subfolders(root / name))), None)
    beside = [f"{name}/" for name in folders if name not in ("train", chosen)]
    beside += [name for name in files if name != TABLE_FILE]
    return (None if chosen is None else root / chosen), tuple(beside)


def said_of(ignored: Iterable[str]) -> str:
    """How many entries were left out, and the first of them; empty where there are none."""
    listed = list(ignored)
    return f"; {len(listed)} ignored: {summarise(listed, 3)}" if listed else ""


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in `folder`, sorted, without the hidden ones; raises `DataError`."""
    folders: list[str] = []
    files: list[str] = []
    place = folder
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                place = folder / entry.name
                if not entry.name.startswith((".", "__")):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror}; make it readable, or remove it.") from error
    return sorted(folders), sorted(files)


def _refuse_photos_below(root: Path, folder: Path) -> None:
    """Raise `DataError` where `root / folder`, which lies in a class folder, holds photos at any depth."""
    folders, files = _list(root / folder)
    if photo := next(filter(_is_photo, files), None):
        group = root / folder.parts[0]
        raise DataError(
            f"{root / folder / photo} lies too deep: each folder in {root} is a class and holds its photos itself, as in "
            f"{group / photo}. Move them there, or give {group} if that holds the class folders (splits are named train "
            "and val)."
        )
    for name in folders:
        _refuse_photos_below(root, folder / name)


def _is_photo(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _kinds(names: Iterable[str]) -> str:
    """What other files there are, by their endings."""
    counts = Counter(Path(name).suffix.lower() or "no ending" for name in names)
    return (
        f", only other files ({', '.join(f'{count} {kind}' for kind, count in counts.most_common(3))})"
        if counts
        else ""
    )
