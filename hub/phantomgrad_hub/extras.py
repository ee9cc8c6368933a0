"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from phantomgrad_hub.errors import MissingExtraError


def require(module: str, extra: str = "hub") -> ModuleType:
    """Import `module`, or raise `MissingExtraError` with the command that installs the extra it belongs to."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = module.split(".")[0]
        message = f"{package} is not installed; run: pip install 'phantomgrad[{extra}]'"
        raise MissingExtraError(message, name=package) from error
