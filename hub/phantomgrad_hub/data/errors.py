"""What goes wrong with datasets."""

from __future__ import annotations

from phantomgrad import PhantomGradError


class DataError(PhantomGradError, ValueError):
    """A dataset is missing, damaged, or of another shape than expected."""
