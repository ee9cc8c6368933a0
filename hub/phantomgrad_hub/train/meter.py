"""What a run shows and logs about itself: loss, speed, and how far the block settles."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from phantomgrad import Solution
from phantomgrad_hub.extras import require


class Meter:
    """Averages since the last record, a progress bar in optimizer steps, and the time spent.

    Tensors are collected as they are and read only for a record: reading one waits for the device.
    """

    def __init__(self, step: int, total: int, *, shown: bool) -> None:
        self._bar = require("tqdm", "train").tqdm(
            initial=step, total=total, disable=not shown, unit="step", dynamic_ncols=True
        )
        self._shown: dict[str, str] = {}
        self._saved_at = time.perf_counter()
        self._clear()

    def _clear(self) -> None:
        self._losses: list[Tensor] = []
        self._unreadable: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._residuals: list[Tensor] = []
        self._images = 0
        self._since = time.perf_counter()
        self._elsewhere = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def add(self, loss: Tensor, images: int, solution: Solution | None, unreadable: Tensor) -> None:
        """Take in one batch; `unreadable` says which of its images stand for others."""
        self._losses.append(loss.detach())
        self._unreadable.append(unreadable.sum())
        self._images += images
        if solution is not None:
            self._steps.append(solution.steps)
            self._residuals.append(solution.residual)

    def step(self) -> None:
        """Count one optimizer step."""
        self._bar.update()

    def mean_loss(self) -> float:
        """The mean loss since the last record; 0 where there was no batch."""
        return float(torch.stack(self._losses).mean()) if self._losses else 0.0

    def record(self) -> dict[str, float]:
        """The averages since the last record, which are shown and start anew."""
        seconds = time.perf_counter() - self._since - self._elsewhere
        values = {"loss": self.mean_loss(), "images_per_s": round(self._images / seconds, 1)}
        if self._steps:
            values["solver_steps"] = float(torch.cat(self._steps).double().mean())
            values["residual"] = float(torch.cat(self._residuals).double().median())
        if unreadable := int(torch.stack(self._unreadable).sum()) if self._unreadable else 0:
            values["unreadable"] = unreadable
        self.show(
            loss=f"{values['loss']:.3f}",
            **{"img/s": f"{values['images_per_s']:.0f}"},
            **(
                {"steps": f"{values['solver_steps']:.1f}", "residual": f"{values['residual']:.1e}"}
                if self._steps
                else {}
            ),
        )
        self._clear()
        return values

    def show(self, **values: Any) -> None:
        """Put further figures behind the progress bar."""
        self._shown |= {name: str(value) for name, value in values.items()}
        self._bar.set_postfix(self._shown)

    @contextmanager
    def paused(self, what: str) -> Generator[None, None, None]:
        """Time that is not counted as training."""
        start = time.perf_counter()
        self._bar.set_description(what)
        try:
            yield
        finally:
            self._bar.set_description("")
            self._elsewhere += time.perf_counter() - start

    def minutes_since_save(self) -> float:
        """Minutes since the last call of `lap`."""
        return (time.perf_counter() - self._saved_at) / 60

    def lap(self) -> float:
        """Seconds since the last call of `lap`, which start anew."""
        now = time.perf_counter()
        seconds, self._saved_at = now - self._saved_at, now
        return seconds
