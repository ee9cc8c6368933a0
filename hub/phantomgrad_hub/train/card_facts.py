"""What a finished run tells on the card of its best checkpoint."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from phantomgrad_hub.config import MDEQConfig
from phantomgrad_hub.data.sources import Source
from phantomgrad_hub.evaluation import Evaluation
from phantomgrad_hub.facts import HELD_OUT, REPOSITORY, Facts

from .config import TrainConfig
from .recipes import RECIPES
from .settings import differing_keys, to_json


def training_facts(
    config: TrainConfig,
    source: Source,
    evaluation: Evaluation,
    *,
    recipe: str,
    base: str | None,
    hours: float,
    machine: str,
    model: MDEQConfig | None = None,
) -> Facts:
    """The facts of a run of `config`, which took so many hours on `machine`. No folder of the machine is named.

    `model` is the config of the checkpoint it began with, if it did.
    """
    on_hub = REPOSITORY.fullmatch(source.name) is not None
    split = HELD_OUT if source.held_out else "validation"
    return Facts(
        data=source.name or None,
        data_id=source.name if on_hub else None,
        split=split,
        held_out_seed=config.seed if source.held_out else None,
        command=_command(config, recipe, base, source.name if on_hub else "FOLDER", model),
        machine=machine,
        hours=float(f"{hours:.3g}"),
        details=f"{config.epochs} epoch{'' if config.epochs == 1 else 's'} of {len(source.train)} photos.",
        base=base,
        evaluation=evaluation,
    )


def _command(config: TrainConfig, recipe: str, base: str | None, data: str, model: MDEQConfig | None) -> str | None:
    """The command that does the same; None for a configuration that was made in Python."""
    if recipe not in RECIPES:
        return None
    init = "" if base is None else f" --init {base}"
    known, tree = to_json(RECIPES[recipe]()), to_json(config)
    if model is not None:
        known["model"] = to_json(replace(model, num_classes=config.model.num_classes))
    # A choice of another class names all its options in one setting.
    keys = sorted({_whole(tree, known, key) for key in differing_keys(known, tree)})
    changes = [f" --set {shlex.quote(f'{key}={_spelled(_at(tree, key))}')}" for key in keys]
    return f"phantomgrad train {recipe} --data {data}{init} --out RUN{''.join(changes)}"


def _whole(tree: Any, known: Any, key: str) -> str:
    """`key`, or the key above it whose class is another one than in the recipe."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        above = ".".join(parts[:count])
        new, old = _at(tree, above), _at(known, above)
        if isinstance(new, dict) != isinstance(old, dict) or (isinstance(new, dict) and new["type"] != old["type"]):
            return above
    return key


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _spelled(value: Any) -> str:
    """A value as `--set` reads it."""
    if isinstance(value, dict):
        options = ", ".join(f"{name}={_spelled(entry)}" for name, entry in value.items() if name != "type")
        return f"{value['type']}({options})"
    if isinstance(value, list):
        # In a list a record is the tuple of its values.
        entries = [
            [part for name, part in entry.items() if name != "type"] if isinstance(entry, dict) else entry
            for entry in value
        ]
        return f"({', '.join(map(_spelled, entries))}{',' if len(entries) == 1 else ''})"
    return repr(value)
