"""Checkpoints: a folder of JSON and safetensors, written atomically and read strictly; never a pickle."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phantomgrad_hub.config import MDEQConfig
from phantomgrad_hub.errors import CheckpointError, CheckpointNotFoundError
from phantomgrad_hub.extras import require
from phantomgrad_hub.facts import Facts, Source
from phantomgrad_hub.files import (
    CONFIG_FILE,
    FACTS_FILE,
    FILES,
    LABELS_FILE,
    PREPROCESSOR_FILE,
    SOURCE_FILE,
    WEIGHTS_FILE,
    pickles_among,
    read_config,
    read_facts,
    read_json,
    read_source,
    write_config,
    write_json,
)
from phantomgrad_hub.labels import ClassLabel, LabelLike, parse_labels
from phantomgrad_hub.preprocessing import Preprocessing
from phantomgrad_hub.text import printable, summarise

if TYPE_CHECKING:
    from phantomgrad_hub.models.mdeq import MDEQ

_LARGE = 2**26
_CLASSIFIER = "head.classifier."
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Description:
    """Everything a checkpoint says about its model, without the weights."""

    config: MDEQConfig
    labels: tuple[ClassLabel, ...]
    preprocessing: Preprocessing
    facts: Facts
    source: Source | None


def save_checkpoint(model: MDEQ, folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
    """Write `model` to `folder`, its floating-point weights as `dtype`.

    A new folder appears complete or not at all; in an existing one each file is replaced atomically, the weights
    last, and other files stay. Raises `CheckpointError` where it cannot be written.
    """
    if dtype not in _STORED_DTYPES.values():
        raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; a checkpoint is a folder")
    weights = _stored_weights(model, dtype)
    safetensors = require("safetensors")
    try:
        _write(model, weights, target)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"the checkpoint {target} cannot be written: {reason}") from error


def _write(model: MDEQ, weights: dict[str, Tensor], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        written = Path(scratch) / "checkpoint"
        written.mkdir()
        write_config(written / CONFIG_FILE, model.config)
        write_json(written / LABELS_FILE, [label.to_dict() for label in model.classes])
        write_json(written / PREPROCESSOR_FILE, model.preprocessing.to_dict())
        optional = {
            FACTS_FILE: model.facts.to_dict(),
            SOURCE_FILE: None if model.source is None else model.source.to_dict(),
        }
        for file, values in optional.items():
            if values:
                write_json(written / file, values)
        require("safetensors.torch").save_file(weights, written / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors makes its file readable by the owner alone; the others have the mode that the umask says.
        shutil.copymode(written / CONFIG_FILE, written / WEIGHTS_FILE)
        files = sorted((file.name for file in written.iterdir()), key=lambda name: name == WEIGHTS_FILE)
        for file in files:
            _flush(written / file)
        if not target.exists():
            os.rename(written, target)
            return
        for file in optional.keys() - set(files):
            # What was known of the weights that were here does not hold for those that follow.
            (target / file).unlink(missing_ok=True)
        for file in files:
            os.replace(written / file, target / file)


def read_description(folder: Path) -> Description:
    """Config, labels and preprocessing of the checkpoint in `folder`, checked against each other."""
    for file in FILES:
        if not (folder / file).is_file():
            for inside in ("best", "last"):
                if (folder / inside / file).is_file():
                    raise CheckpointNotFoundError(f"{folder} is a run folder; use {folder / inside}")
            raise CheckpointNotFoundError(f"{folder} has no {file}{_hint(folder)}")
    try:
        config = read_config(folder / CONFIG_FILE)
        preprocessing = Preprocessing.from_dict(read_json(folder / PREPROCESSOR_FILE))
        entries = read_json(folder / LABELS_FILE)
        if not isinstance(entries, list):
            raise CheckpointError(f"{LABELS_FILE} must hold a list of classes")
        labels = parse_labels(entries)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder}: {error}") from error
    if len(labels) != config.num_classes:
        raise CheckpointError(
            f"checkpoint {folder}: {LABELS_FILE} names {len(labels)} classes, {CONFIG_FILE} says {config.num_classes}"
        )
    return Description(
        config=config,
        labels=labels,
        preprocessing=preprocessing,
        facts=read_facts(folder),
        source=read_source(folder),
    )


def load_checkpoint(folder: Path, labels: Sequence[LabelLike] | None = None, source: Source | None = None) -> MDEQ:
    """The model in `folder`, in eval mode, float32; with other `labels`, a new random classifier for them.

    `source` is the repository and commit that the folder holds, where it is a copy that does not say so itself.

    Nothing is assigned unless every key, shape and dtype is as the config says and every weight is finite.
    """
    from phantomgrad_hub.models.mdeq import MDEQ

    description = read_description(folder)
    config, classes, fresh = description.config, description.labels, False
    if labels is not None:
        wanted = parse_labels(labels)
        fresh = [label.name for label in wanted] != [label.name for label in classes]
        classes = wanted if fresh else classes
        config = replace(config, num_classes=len(classes))
    _check_size(folder / WEIGHTS_FILE, description.config)
    model = MDEQ(config, labels=classes, preprocessing=description.preprocessing)
    origin = source or description.source
    if fresh:
        # What was measured, and where it was fetched from, does not hold for another classifier.
        model.facts = Facts(base=description.facts.base if origin is None else str(origin))
    else:
        model.source, model.facts = origin, description.facts
    expected = dict(model.state_dict())
    kept = {key: expected.pop(key) for key in list(expected) if fresh and key.startswith(_CLASSIFIER)}
    weights = _read_weights(folder / WEIGHTS_FILE, expected, ignored=kept)
    model.load_state_dict({**weights, **kept}, strict=True)
    return model.eval()


def _check_size(file: Path, config: MDEQConfig) -> None:
    """Refuse, before a model is made, a config that asks for a much larger one than the weights are of."""
    size = file.stat().st_size
    # A small one is made at once, and its weights are then compared one by one, which tells more.
    if size < config.smallest_file and config.smallest_file > _LARGE:
        raise CheckpointError(
            f"{file} has {size:,} bytes, too few for the model that its {CONFIG_FILE} describes; it is damaged, or of another one"
        )


def compare_keys(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One sentence on missing and one on unknown keys, where there are any."""
    problems = []
    if missing := sorted(set(expected) - set(found)):
        problems.append(f"missing {summarise(missing)}")
    if unknown := sorted(set(found) - set(expected)):
        problems.append(f"unknown {summarise(unknown)}")
    return problems


def _read_weights(file: Path, expected: Mapping[str, Tensor], ignored: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of `file`, floating-point ones as float32, checked against the tensors they are for."""
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            headers = {key: handle.get_slice(key) for key in handle.keys() if key not in set(ignored)}  # noqa: SIM118
            problems = compare_keys(headers, expected)
            for key in sorted(set(headers) & set(expected)):
                problems += _compare_tensor(key, headers[key], expected[key])
            if problems:
                raise CheckpointError(f"{file} does not fit its {CONFIG_FILE}: {summarise(problems)}")
            weights = {key: handle.get_tensor(key) for key in expected}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {printable(str(error), 300)}") from error
    weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    if bad := [key for key, value in weights.items() if not torch.isfinite(value).all()]:
        raise CheckpointError(f"{file} holds infinite or NaN weights: {summarise(bad)}")
    return weights


def _compare_tensor(key: str, header: Any, expected: Tensor) -> list[str]:
    shape, dtype = tuple(header.get_shape()), header.get_dtype()
    problems = []
    if shape != tuple(expected.shape):
        problems.append(f"{key} has shape {shape} instead of {tuple(expected.shape)}")
    if dtype not in (_STORED_DTYPES if expected.is_floating_point() else ("I64",)):
        problems.append(f"{key} has dtype {dtype}")
    return problems


def _stored_weights(model: MDEQ, dtype: torch.dtype) -> dict[str, Tensor]:
    weights = {}
    for key, value in model.state_dict().items():
        value = value.detach().cpu()
        weights[key] = (value.to(dtype) if value.is_floating_point() else value).contiguous().clone()
        if not torch.isfinite(weights[key]).all():
            raise CheckpointError(f"the weight {key} is infinite or NaN as {dtype}; the checkpoint was not written")
    return weights


def _flush(file: Path) -> None:
    """Have the file on disk before its name points to it."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _hint(folder: Path) -> str:
    pickles = pickles_among(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return f"; {pickles[0]} is a pickle, which is never loaded: convert it with convert_official" if pickles else ""
