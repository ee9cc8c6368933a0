"""Names of classes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from phantomgrad_hub.errors import LabelError
from phantomgrad_hub.text import summarise


@dataclass(frozen=True, kw_only=True)
class ClassLabel:
    """One class of a classifier."""

    name: str
    """What a reader sees; unique within a model."""
    id: str | None = None
    """The WordNet id, such as `n01443537`, where the class has one; unique within a model."""

    def __post_init__(self) -> None:
        for field, value in (("name", self.name), ("id", self.id)):
            if value is None and field == "id":
                continue
            if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 300:
                raise LabelError(f"the {field} of a class must be 1 to 300 printable characters, got {value!r:.60}")

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name} if self.id is None else {"id": self.id, "name": self.name}


LabelLike = str | ClassLabel | Mapping[str, Any]


def parse_labels(values: Iterable[LabelLike]) -> tuple[ClassLabel, ...]:
    """Class labels from names, `ClassLabel`s or `{"id", "name"}` objects; names and ids must be unique."""
    if isinstance(values, str | Mapping):
        raise LabelError("labels must be a sequence with one entry per class")
    labels = tuple(_parse(value) for value in values)
    _check_unique("names", [label.name for label in labels])
    _check_unique("ids", [label.id for label in labels if label.id is not None])
    return labels


@cache
def imagenet_labels() -> tuple[ClassLabel, ...]:
    """The 1000 classes of ImageNet-1k with their WordNet ids, in the usual order, that of the ids.

    The names are the short ones of anishathalye/imagenet-simple-labels (public domain).
    """
    text = (resources.files("phantomgrad_hub") / "imagenet_1k.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines())
    return parse_labels(ClassLabel(name=name, id=wnid) for wnid, name in rows)


def cifar10_labels() -> tuple[ClassLabel, ...]:
    """The classes of CIFAR-10 in the order of its files."""
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    return parse_labels(names)


def read_labels(path: str | os.PathLike[str]) -> tuple[ClassLabel, ...]:
    """The classes in a file, in order: JSON as in a checkpoint's `labels.json` or a list of names, else a name a line."""
    name = os.fspath(path)
    try:
        text = Path(name).read_text(encoding="utf-8")
        if not text.lstrip().startswith(("[", "{")):
            return parse_labels(line.strip() for line in text.splitlines() if line.strip())
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise LabelError("it must hold a list of classes")
        return parse_labels(entries)
    except OSError as error:
        raise LabelError(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LabelError(f"{name} names no classes: {error}") from error


def default_labels(count: int) -> tuple[ClassLabel, ...]:
    """Names for a model that was given none: `class 0`, `class 1`, ..."""
    return tuple(ClassLabel(name=f"class {index}") for index in range(count))


def plain_name(name: str) -> str:
    """A name as it is compared: without regard to case, and with `_` for a space."""
    return " ".join(name.replace("_", " ").split()).casefold()


def check_distinct(labels: Iterable[ClassLabel]) -> None:
    """Raise `LabelError` where the names of two classes differ only by case or `_` and no ids tell them apart."""
    seen: dict[str, ClassLabel] = {}
    for label in labels:
        other = seen.setdefault(plain_name(label.name), label)
        if other is not label and (other.id is None or label.id is None):
            raise LabelError(
                f"the classes {other.name!r} and {label.name!r} differ only by case or _. Rename one, or make them one class"
            )


def _parse(value: LabelLike) -> ClassLabel:
    if isinstance(value, ClassLabel):
        return value
    if isinstance(value, Mapping):
        if unknown := sorted(set(map(str, value)) - {"id", "name"}):
            raise LabelError(f"a class has an id and a name, not {summarise(unknown)}")
        if "name" not in value:
            raise LabelError(f"a class must have a name, got {dict(value)!r:.60}")
        return ClassLabel(**value)
    return ClassLabel(name=value)


def _check_unique(what: str, values: Sequence[str]) -> None:
    if repeated := sorted(value for value, count in Counter(values).items() if count > 1):
        raise LabelError(f"class {what} must be unique, repeated: {summarise(repeated)}")
