"""What makes two calls the same run: the recipe, the settings, the checkpoint it begins with, and the data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phantomgrad_hub.data.sources import ImageSplit, Source
from phantomgrad_hub.data.streaming import StreamedImages
from phantomgrad_hub.files import EMBEDDED

from .config import TrainConfig
from .settings import differing_keys, to_json

HARMLESS = {f"config.{name}" for name in ("workers", "log_every", "trackers", "checkpoint_minutes")}
"""Settings that change no weight, nor which ones are best. The workers of a stream do: each reads a share of its own."""
SPLITS = {"train": "training", "validation": "validation"}


def run_identity(config: TrainConfig, source: Source, recipe: str, init: str | Path | None) -> dict[str, Any]:
    """The identity of a run, as JSON values; `differences` compares two."""
    data: dict[str, Any] = {"train": len(source.train), "validation": len(source.validation)}
    data |= {"classes": len(source.labels), "class_names": [label.id or label.name for label in source.labels]}
    data["streamed"] = isinstance(source.train, StreamedImages)
    for name in SPLITS:
        split: ImageSplit = getattr(source, name)
        if not isinstance(split, StreamedImages):  # of a stream, the class indices mean reading all of it
            data[f"{name}_sha256"] = _digest(split)
    return {"recipe": recipe, "init": None if init is None else str(init), "data": data, "config": to_json(config)}


def _digest(split: ImageSplit) -> str:
    """SHA-256 of the class indices of `split`, with the names of its files where it has some."""
    files = getattr(split, "files", None)
    names = [""] * len(split) if files is None else [file.replace("\\", "/").rpartition("/")[2] for file in files]
    lines = "\n".join(f"{target}/{name}" for target, name in zip(split.targets, names, strict=True))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def differences(stored: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The dotted keys at which a stored identity and that of a call differ in what a run comes to.

    What an earlier release left out is no difference, nor is `HARMLESS`.
    """
    known = stored.get("data")
    data = (
        {key: value for key, value in new["data"].items() if key in known} if isinstance(known, dict) else new["data"]
    )
    keys = differing_keys(stored, {**new, "data": data})
    if "init" in keys and _is_same_folder(stored.get("init"), new["init"]):
        keys.remove("init")
    earlier = stored.get("init") is not None and data.keys() < new["data"].keys()
    if "init" in keys or earlier:
        # Another checkpoint is another model. In an earlier release the recipe's was stored, which had no part in the run.
        keys = [key for key in keys if not key.startswith("config.model.")]
    harmless = HARMLESS - {"config.workers"} if new["data"].get("streamed") else HARMLESS
    return [key for key in keys if key not in harmless]


def harmless_changes(stored: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings among `HARMLESS` that differ, each with its value before and now."""
    names = [key.removeprefix("config.") for key in differing_keys(stored, new) if key in HARMLESS]
    return {f"config.{name}": [stored["config"].get(name), new["config"].get(name)] for name in names}


def _is_same_folder(one: Any, other: Any) -> bool:
    """Whether two names of a checkpoint are spellings of one folder that is here."""
    if not (isinstance(one, str) and isinstance(other, str)) or EMBEDDED in (one, other):
        return False
    folders = [Path(name).expanduser() for name in (one, other)]
    return folders[0].is_dir() and folders[0].resolve() == folders[1].resolve()


def data_difference(stored: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In words, in what the data of two identities differ; empty where they do not."""
    pairs = {key: (stored[key], new[key]) for key in new if key in stored and stored[key] != new[key]}
    if "classes" in pairs:
        return "it had {} classes, now {}".format(*pairs["classes"])
    if "class_names" in pairs:
        renamed = [
            f"class {index} was {old!r}, now {name!r}"
            for index, (old, name) in enumerate(zip(*pairs["class_names"], strict=True))
            if old != name
        ]
        return renamed[0] + (f" and {len(renamed) - 1} more" if renamed[1:] else "")
    if counts := [
        f"{pairs[key][0]} {word} images, now {pairs[key][1]}" for key, word in SPLITS.items() if key in pairs
    ]:
        return f"it had {' and '.join(counts)}"
    if changed := [word for key, word in SPLITS.items() if f"{key}_sha256" in pairs]:
        return f"the {' and '.join(changed)} images have other file names or classes"
    return "it was read as a stream" if stored.get("streamed") else "it was not read as a stream" if pairs else ""
