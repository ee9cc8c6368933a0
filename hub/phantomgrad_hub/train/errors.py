"""What goes wrong in training."""

from __future__ import annotations

from phantomgrad import PhantomGradError


class SettingError(PhantomGradError, ValueError):
    """A `KEY=VALUE` setting names no field of the config, or gives it a value it cannot take."""


class TrainingError(PhantomGradError, RuntimeError):
    """A run cannot start or go on."""
