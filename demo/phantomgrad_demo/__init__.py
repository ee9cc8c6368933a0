"""The demo page: a photo, its class, and the steps in which the network settled on it.

    from phantomgrad_demo import build_app
    build_app("embedded").launch()

The page is imported at its first use, so that inference and figures need no Gradio.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Read by Gradio and huggingface_hub at their import: no request leaves the machine.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

if TYPE_CHECKING:
    from .app import build_app as build_app

__all__ = ["build_app"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import app

    return getattr(app, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
