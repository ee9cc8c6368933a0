"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
import importlib.util
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
        raise _missing(package, package, extra) from error


def require_installed(module: str, distribution: str, extra: str) -> None:
    """Raise `MissingExtraError` unless `module`, which `distribution` brings, can be imported; it is not imported."""
    if importlib.util.find_spec(module) is None:
        raise _missing(module, distribution, extra)


def _missing(module: str, distribution: str, extra: str) -> MissingExtraError:
    return MissingExtraError(f"{distribution} is not installed; run: pip install 'phantomgrad[{extra}]'", name=module)
