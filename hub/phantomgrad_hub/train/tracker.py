"""The metrics of a run in the trackers that Accelerate knows: TensorBoard, Weights & Biases and others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from phantomgrad_hub.extras import require

from .errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "phantomgrad"


def check_trackers(names: Sequence[str]) -> None:
    """Raise `TrainingError` unless every one of `names` is a tracker that is installed."""
    known = sorted(require("accelerate.tracking", "train").LOGGER_TYPE_TO_CLASS)
    if unknown := sorted(set(names) - set(known)):
        raise TrainingError(f"trackers: there is no {', '.join(unknown)}; Accelerate has {', '.join(known)}.")
    installed = [str(name) for name in require("accelerate.tracking", "train").get_available_trackers()]
    if missing := sorted(set(names) - set(installed)):
        raise TrainingError(f"trackers: {missing[0]} is not installed; run: pip install {missing[0]}")


class Tracker:
    """Sends the numbers of a record, by name, to every tracker of `accelerator` while its context lasts."""

    def __init__(self, accelerator: Accelerator, config: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        self._config = config
        self._used = bool(accelerator.log_with)

    def __enter__(self) -> Self:
        if self._used:
            self._accelerator.init_trackers(PROJECT, config=dict(_flat(self._config)))
        return self

    def __exit__(self, *exc: object) -> None:
        # Accelerate's own `end_training` would end the process group too, which belongs to the caller.
        for tracker in self._accelerator.trackers if self._used else ():
            tracker.finish()

    def log(self, kind: str, record: Mapping[str, Any], step: int) -> None:
        """Log the numbers in `record` as `kind/name`."""
        if self._used:
            numbers = {f"{kind}/{name}": value for name, value in record.items() if isinstance(value, int | float)}
            self._accelerator.log(numbers, step=step)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """The entries of a nested config as `a.b.c`, with values of the kinds that trackers take."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str | int | float | bool) else str(value)
