"""Multiscale deep equilibrium image classifiers: models, checkpoints, data, training and the command line.

    from phantomgrad_hub import MDEQ
    model = MDEQ.from_pretrained("embedded")
    model.classify("photo.jpg")  # [(label, probability), ...]

Names are imported at their first use, so that importing the package needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phantomgrad_hub.config import MDEQConfig as MDEQConfig
    from phantomgrad_hub.convert import convert_official as convert_official
    from phantomgrad_hub.early_exit import EarlyAnswer as EarlyAnswer
    from phantomgrad_hub.early_exit import classify_early as classify_early
    from phantomgrad_hub.errors import CheckpointError as CheckpointError
    from phantomgrad_hub.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from phantomgrad_hub.errors import ConfigError as ConfigError
    from phantomgrad_hub.errors import ExportError as ExportError
    from phantomgrad_hub.errors import HubError as HubError
    from phantomgrad_hub.errors import ImageError as ImageError
    from phantomgrad_hub.errors import LabelError as LabelError
    from phantomgrad_hub.errors import MissingExtraError as MissingExtraError
    from phantomgrad_hub.labels import ClassLabel as ClassLabel
    from phantomgrad_hub.models.builders import mdeq_cifar_large as mdeq_cifar_large
    from phantomgrad_hub.models.builders import mdeq_cifar_tiny as mdeq_cifar_tiny
    from phantomgrad_hub.models.builders import mdeq_imagenet_small as mdeq_imagenet_small
    from phantomgrad_hub.models.builders import mdeq_imagenet_xl as mdeq_imagenet_xl
    from phantomgrad_hub.models.mdeq import MDEQ as MDEQ
    from phantomgrad_hub.preprocessing import Preprocessing as Preprocessing

_MODULES = {
    "MDEQ": "models.mdeq",
    "CheckpointError": "errors",
    "CheckpointNotFoundError": "errors",
    "ClassLabel": "labels",
    "ConfigError": "errors",
    "EarlyAnswer": "early_exit",
    "ExportError": "errors",
    "HubError": "errors",
    "ImageError": "errors",
    "LabelError": "errors",
    "MDEQConfig": "config",
    "MissingExtraError": "errors",
    "Preprocessing": "preprocessing",
    "classify_early": "early_exit",
    "convert_official": "convert",
    "mdeq_cifar_large": "models.builders",
    "mdeq_cifar_tiny": "models.builders",
    "mdeq_imagenet_small": "models.builders",
    "mdeq_imagenet_xl": "models.builders",
}

__all__ = [
    "MDEQ",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClassLabel",
    "ConfigError",
    "EarlyAnswer",
    "ExportError",
    "HubError",
    "ImageError",
    "LabelError",
    "MDEQConfig",
    "MissingExtraError",
    "Preprocessing",
    "classify_early",
    "convert_official",
    "mdeq_cifar_large",
    "mdeq_cifar_tiny",
    "mdeq_imagenet_small",
    "mdeq_imagenet_xl",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
