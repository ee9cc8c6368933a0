"""Names of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phantomgrad_hub.errors import LabelError


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


def default_labels(count: int) -> tuple[ClassLabel, ...]:
    """Names for a model that was given none: `class 0`, `class 1`, ..."""
    return tuple(ClassLabel(name=f"class {index}") for index in range(count))


def _parse(value: LabelLike) -> ClassLabel:
    if isinstance(value, ClassLabel):
        return value
    if isinstance(value, Mapping):
        if unknown := sorted(set(map(str, value)) - {"id", "name"}):
            raise LabelError(f"a class has an id and a name, not {', '.join(unknown)}")
        if "name" not in value:
            raise LabelError(f"a class must have a name, got {dict(value)!r:.60}")
        return ClassLabel(**value)
    return ClassLabel(name=value)


def _check_unique(what: str, values: Sequence[str]) -> None:
    if repeated := sorted(value for value, count in Counter(values).items() if count > 1):
        raise LabelError(f"class {what} must be unique, repeated: {', '.join(repeated[:5])}")
