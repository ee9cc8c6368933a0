"""The checkpoint that a run begins with, and what may be set beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

from phantomgrad_hub.checkpoint import read_description
from phantomgrad_hub.config import MDEQConfig
from phantomgrad_hub.download import locate

from .config import TrainConfig
from .errors import SettingError, TrainingError
from .recipes import RECIPES
from .settings import apply_settings

OPTIONS = ("gradient", "solver", "eval_solver", "dropout", "head_dropout")
"""What changes how a model is solved and trained, but none of its weights."""
_LISTED = f"{', '.join(OPTIONS[:-1])} and {OPTIONS[-1]}"


def checkpoint_config(init: str | Path) -> MDEQConfig:
    """The model config of the checkpoint `init`; raises `CheckpointError` or `HubError`."""
    return read_description(locate(init).folder).config


def edit_for_checkpoint(config: TrainConfig, settings: Iterable[str], init: str | Path) -> TrainConfig:
    """`config` with the model of the checkpoint `init`, edited by `settings` as `apply_settings` does.

    Raises `SettingError` where one of them is about what the checkpoint decides.
    """
    settings = list(settings)
    for setting in settings:
        key = setting.partition("=")[0].strip()
        first, _, rest = key.partition(".")
        if first == "model" and rest in {entry.name for entry in fields(MDEQConfig)} - set(OPTIONS):
            raise SettingError(
                f"--set {key}: the checkpoint of --init decides it; of the model only {_LISTED} can be set"
            )
    return apply_settings(config, settings, given={"model": checkpoint_config(init)})


def with_checkpoint(config: TrainConfig, recipe: str, init: str | Path, classes: int) -> TrainConfig:
    """`config` with the model config that a run from `init` trains: the checkpoint's, with the `OPTIONS` of `config.model`
    and a head for so many classes.

    The model of a recipe that was left as it is says nothing about the checkpoint, which then decides the options too.
    Raises `TrainingError` where `config` asks for another model.
    """
    own = checkpoint_config(init)
    names = [entry.name for entry in fields(own) if entry.name not in (*OPTIONS, "num_classes")]
    other = [name for name in names if getattr(config.model, name) != getattr(own, name)]
    untouched = config.model in [made().model for made in RECIPES.values()]
    if untouched and (other or recipe not in RECIPES):
        model = own
    elif other:
        asked, found = getattr(config.model, other[0]), getattr(own, other[0])
        raise TrainingError(
            f"model.{other[0]} is {asked}, and {found} in the checkpoint {init}, which decides it: give its own config, of which "
            f"{_LISTED} may differ."
        )
    else:
        model = replace(own, **{name: getattr(config.model, name) for name in OPTIONS})
    try:
        return replace(config, model=replace(model, num_classes=classes))
    except ValueError as error:
        raise TrainingError(str(error)) from error
