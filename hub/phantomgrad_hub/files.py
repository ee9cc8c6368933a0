"""The files of a checkpoint, and reading the small ones strictly.

config.json          the model config, with the gradient and solver it was trained with, and the release that wrote it
labels.json          one `{"id", "name"}` per class
preprocessor.json    how a photo becomes the model's input
model.safetensors    the weights, float32, or float16 or bfloat16 to be small
card.json            optional: results, training and terms, for the card
source.json          optional, in a local copy: the repository and commit it was fetched from
README.md            optional: the card
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import phantomgrad
from phantomgrad_hub.config import MDEQConfig
from phantomgrad_hub.errors import CheckpointError, ConfigError
from phantomgrad_hub.facts import Facts, Source
from phantomgrad_hub.text import printable

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / EMBEDDED
"""The checkpoint inside this package."""

CONFIG_FILE = "config.json"
LABELS_FILE = "labels.json"
PREPROCESSOR_FILE = "preprocessor.json"
WEIGHTS_FILE = "model.safetensors"
FILES = (CONFIG_FILE, LABELS_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE)
"""What every checkpoint has."""
FACTS_FILE = "card.json"
SOURCE_FILE = "source.json"
CARD_FILE = "README.md"

MAX_JSON_BYTES = 64 * 2**20
LIBRARY_VERSION = "library_version"
_PICKLES = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt")


def write_config(file: Path, config: MDEQConfig) -> None:
    """Write `config`, and the release that this is."""
    values = config.to_dict()
    version = {"format_version": values.pop("format_version"), LIBRARY_VERSION: phantomgrad.__version__}
    write_json(file, {**version, **values})


def read_config(file: Path) -> MDEQConfig:
    """The config in `file`; raises `ConfigError` or `CheckpointError`."""
    values = read_json(file)
    if isinstance(values, dict) and values.get("format_version") != 1:
        # The first format did not say which release wrote it.
        release = values.pop(LIBRARY_VERSION, None)
        if not isinstance(release, str) or not release.isprintable() or not 1 <= len(release) <= 60:
            raise ConfigError(_not_ours(values) or f"{LIBRARY_VERSION} must name a release, got {release!r:.60}")
    return MDEQConfig.from_dict(values)


def read_facts(folder: Path) -> Facts:
    """What `card.json` in `folder` tells, nothing where there is none; raises `CheckpointError`."""
    return _read_optional(folder / FACTS_FILE, Facts.from_dict) or Facts()


def write_facts(folder: Path, facts: Facts) -> None:
    """Write `facts` to `card.json` in `folder`, in one step; raises `CheckpointError`."""
    partial = folder / f".{FACTS_FILE}.partial"
    try:
        write_json(partial, facts.to_dict())
        partial.replace(folder / FACTS_FILE)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{folder / FACTS_FILE} cannot be written: {error.strerror}") from error


def read_source(folder: Path) -> Source | None:
    """The repository and commit that `folder` is a copy of, where it is one; raises `CheckpointError`."""
    return _read_optional(folder / SOURCE_FILE, Source.from_dict)


def _read_optional(file: Path, parse: Any) -> Any:
    if not file.exists():
        return None
    try:
        return parse(read_json(file))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def write_json(file: Path, value: Any) -> None:
    """Write `value`, indented."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    """The value in `file`; raises `CheckpointError` where it is too large, unreadable or not JSON."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file.name} is larger than {MAX_JSON_BYTES // 2**20} MiB")
        return json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} is not valid JSON: {printable(str(error), 300)}") from error


def foreign_kind(config_file: Path) -> str | None:
    """Whose model a `config.json` is that is not one of ours: `transformers`, `timm`, ...; None where it does not tell."""
    try:
        values = read_json(config_file)
    except CheckpointError:
        return None
    return _kind(values) if isinstance(values, dict) else None


def pickles_among(names: Iterable[str]) -> list[str]:
    """The names that are those of pickles, sorted."""
    return sorted(name for name in names if name.endswith(_PICKLES))


def _kind(values: dict[str, Any]) -> str | None:
    if "format_version" in values:
        return None
    if "model_type" in values or "architectures" in values:
        return "transformers"
    if "_class_name" in values:
        return "diffusers"
    return "timm" if "architecture" in values and "num_features" in values else None


def _not_ours(values: dict[str, Any]) -> str | None:
    kind = _kind(values)
    return None if kind is None else f"{CONFIG_FILE} is that of a {kind} model, not of an MDEQ"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of two with one name it is unclear which one is meant."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r:.60} is there twice")
    return values
