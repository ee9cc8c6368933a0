"""Errors of models, checkpoints and photos; each is also the builtin it specialises.

PhantomGradError
├── ConfigError(ValueError)                    a config with an unknown key, or a value of another type or out of range
├── LabelError(ValueError)                     class names that are empty, repeated or too few
├── ImageError(ValueError)                     a photo that cannot be read
├── CheckpointError(ValueError)                a checkpoint that is incomplete, damaged, of another model or not writable
│   └── CheckpointNotFoundError(FileNotFoundError)
├── ExportError(ValueError)                    a model that cannot be exported, or not under this name
├── HubError(OSError)                          the Hugging Face Hub could not be reached or refused
└── MissingExtraError(ImportError)             an optional package is not installed
"""

from __future__ import annotations

from phantomgrad import PhantomGradError


class ConfigError(PhantomGradError, ValueError):
    """A config has an unknown key, or a value of another type or out of range."""


class LabelError(PhantomGradError, ValueError):
    """Class names are empty, repeated, or do not match the number of classes."""


class ImageError(PhantomGradError, ValueError):
    """A photo cannot be read."""


class CheckpointError(PhantomGradError, ValueError):
    """A checkpoint is incomplete, damaged, of another model, or cannot be written."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at this path or repository."""


class ExportError(PhantomGradError, ValueError):
    """A model cannot be exported, or not under this name."""


class HubError(PhantomGradError, OSError):
    """The Hugging Face Hub could not be reached or refused."""


class MissingExtraError(PhantomGradError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""
