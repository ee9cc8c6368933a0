"""What a checkpoint's card tells that its weights do not: data, results, training, terms, and where it comes from.

card.json      `Facts`, published with the checkpoint
source.json    `Source`, in a local copy only: the repository and the commit it was fetched from
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from phantomgrad_hub.errors import ConfigError
from phantomgrad_hub.evaluation import Evaluation
from phantomgrad_hub.text import summarise

_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_PART}/{_PART}", re.ASCII)
"""A repository of the Hub by its full name, `user/name`, as the Hub allows it."""
HELD_OUT = "a held-out tenth"
"""The `split` of data without a validation split."""
COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_TEXT = 2000
_LONG_TEXTS = ("terms", "details", "limits")
"""Those that may have several lines."""
_TEXTS = (
    *("title", "data", "data_id", "split", "terms", "license", "license_name", "license_link"),
    *("command", "machine", "details", "limits", "base"),
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The repository and the commit that a checkpoint was fetched from."""

    repository: str
    commit: str

    def __post_init__(self) -> None:
        if not isinstance(self.repository, str) or not REPOSITORY.fullmatch(self.repository):
            raise ConfigError(f"a source's repository is user/name, got {self.repository!r:.60}")
        if not isinstance(self.commit, str) or not COMMIT.fullmatch(self.commit):
            raise ConfigError(f"a source's commit is 40 hexadecimal digits, got {self.commit!r:.60}")

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit}"

    def to_dict(self) -> dict[str, str]:
        """Plain JSON values."""
        return {"repository": self.repository, "commit": self.commit}

    @classmethod
    def from_dict(cls, values: Any) -> Source:
        """The source that `to_dict` wrote; raises `ConfigError`."""
        if not isinstance(values, dict) or set(values) != {"repository", "commit"}:
            raise ConfigError("a source has a repository and a commit")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts on a card; None where they are not known, and the card then leaves them out. Raises `ConfigError`."""

    title: str | None = None
    data: str | None = None
    """The data it was trained on, by name: `Tiny ImageNet`."""
    data_id: str | None = None
    """The same as a dataset repository of the Hub, `user/name`."""
    split: str | None = None
    """What `evaluation` was measured on: `validation`."""
    held_out_seed: int | None = None
    """The seed that chose the tenth of the data which the training held out; None where it held out none."""
    terms: str | None = None
    """The terms of the data."""
    license: str | None = None
    """The licence of the weights, by its identifier on the Hub: `mit`, `cc-by-nc-4.0`, `other`."""
    license_name: str | None = None
    """What `other` is called."""
    license_link: str | None = None
    command: str | None = None
    """What trains it again."""
    machine: str | None = None
    hours: float | None = None
    details: str | None = None
    """Further sentences on the training."""
    limits: str | None = None
    base: str | None = None
    """The checkpoint that the training began with: `embedded`, or `user/name@commit`."""
    evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            if value is not None and not (_is_text(value) and (name in _LONG_TEXTS or "\n" not in value)):
                raise ConfigError(f"{name} must be a text of 1 to {_MAX_TEXT} printable characters, got {value!r:.60}")
        hours = self.hours
        if hours is not None and (type(hours) not in (int, float) or not 0 <= hours < 1e6):
            raise ConfigError(f"hours must be a number of at least 0, got {hours!r:.60}")
        seed = self.held_out_seed
        if seed is not None and (type(seed) is not int or seed < 0):
            raise ConfigError(f"held_out_seed must be an integer of at least 0, got {seed!r:.60}")
        if self.data_id is not None and not REPOSITORY.fullmatch(self.data_id):
            raise ConfigError(f"data_id must be a dataset repository, user/name, got {self.data_id!r:.60}")
        if self.base is not None and not _is_base(self.base):
            raise ConfigError(f"base must be embedded, user/name or user/name@commit, got {self.base!r:.60}")
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", self.license):
            raise ConfigError(f"license must be an identifier such as mit or cc-by-nc-4.0, got {self.license!r:.60}")
        if self.license_link is not None and not re.fullmatch(r"https?://[^\s<>\"']+", self.license_link):
            raise ConfigError(f"license_link must be an address, got {self.license_link!r:.60}")
        if self.evaluation is not None and type(self.evaluation) is not Evaluation:
            raise ConfigError("evaluation must be an Evaluation")

    def to_dict(self) -> dict[str, Any]:
        """What is known, as plain JSON values."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        if self.evaluation is not None:
            values["evaluation"] = self.evaluation.to_dict()
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Any) -> Facts:
        """The facts that `to_dict` wrote; raises `ConfigError` that names an unknown key or a value that cannot be."""
        if not isinstance(values, dict):
            raise ConfigError(f"the facts of a card are a JSON object, not {type(values).__name__}")
        if unknown := sorted(set(map(str, values)) - {option.name for option in fields(cls)}):
            raise ConfigError(f"unknown keys: {summarise(unknown)}; if a newer release wrote them, update phantomgrad")
        options = dict(values)
        if options.get("evaluation") is not None:
            options["evaluation"] = Evaluation.from_dict(options["evaluation"])
        return cls(**options)


def _is_base(value: str) -> bool:
    repository, at, commit = value.partition("@")
    return value == "embedded" or (
        REPOSITORY.fullmatch(repository) is not None and (not at or COMMIT.fullmatch(commit) is not None)
    )


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip() or len(value) > _MAX_TEXT:
        return False
    return all(character.isprintable() or character == "\n" for character in value)
