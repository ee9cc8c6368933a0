"""How a model's block settles on one photo: every step of the solver as data, while it runs.

    with Settling(model, photo, settings) as settling:
        for steps in settling.batches():
            ...

The solve runs in a thread of its own and stops when the `with` is left. Its settings are its own: the attachment of the
shared model is neither assigned to nor overridden.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from phantomgrad import attachments, fixed_point
from phantomgrad_hub import MDEQ
from phantomgrad_hub.photos import ImageSource

from .settings import Settings, solver_of

SECONDS = 10.0
"""How long one solve may take."""
LARGEST_MAP = 32
"""Feature maps with longer sides are averaged down to this."""

Reason = Literal["settled", "steps", "time", "stopped", "diverged"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One evaluation of the block: where the state is, how far it moved, and what the head would say."""

    number: int
    """From 1 on."""
    seconds: float
    """Since the solve began."""
    residual: float
    """`||f(z) - z|| / ||f(z)||` over the whole state, which the tolerance is for."""
    residuals: tuple[float, ...]
    """The same within each resolution, the finest first."""
    probabilities: Tensor
    """Of every class (num_classes,), had the solver been stopped here: at the smallest residual so far."""
    maps: tuple[Tensor, ...]
    """For each resolution (H, W): the root mean square over channels of the state `f(z)`."""
    changes: tuple[Tensor, ...]
    """The same of `f(z) - z`: where the state still moves."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The steps of a solve so far, and once it has ended why."""

    settings: Settings
    steps: tuple[Step, ...]
    reason: Reason | None = None
    """None while it runs."""
    seconds: float = 0.0
    state: tuple[Tensor, ...] | None = None
    """The solution, one `(1, C, H, W)` for each resolution; None while it runs or where it was stopped."""

    @property
    def residual(self) -> float:
        """The smallest residual, which is that of the answer."""
        return min((step.residual for step in self.steps), default=math.nan)

    @property
    def probabilities(self) -> Tensor:
        """Of every class, as of the last step."""
        return self.steps[-1].probabilities


class Settling:
    """A solve under way for `photo`, from zero or from the state `start`.

    Raises `ImageError` where the photo cannot be read.
    """

    def __init__(
        self,
        model: MDEQ,
        photo: ImageSource,
        settings: Settings,
        *,
        start: tuple[Tensor, ...] | None = None,
        seconds: float = SECONDS,
    ) -> None:
        parameter = next(model.parameters())
        self._images = model.preprocess(photo).to(parameter.device, parameter.dtype)
        self._model, self._settings, self._start = model, settings, start
        self._limit = seconds
        self._news: queue.SimpleQueue[Step | Trajectory | BaseException] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="settling", daemon=True)
        self._steps: list[Step] = []
        self.trajectory = Trajectory(settings=settings, steps=())
        """All that is known so far."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Make the step that runs the last one."""
        self._stopping.set()

    def batches(self) -> Iterator[list[Step]]:
        """The steps that were made since the last batch, as soon as there is one; ends with the solve.

        `trajectory` is up to date with each batch, and complete after the last.
        """
        ended = False
        while not ended:
            news = [self._news.get()]
            while not self._news.empty():
                news.append(self._news.get())
            fresh: list[Step] = []
            for each in news:
                if isinstance(each, BaseException):
                    raise each
                if isinstance(each, Trajectory):
                    self.trajectory, ended = each, True
                else:
                    fresh.append(each)
            self._steps += fresh
            if not ended:
                self.trajectory = Trajectory(settings=self._settings, steps=tuple(self._steps))
            if fresh:
                yield fresh

    def run(self) -> Trajectory:
        """The whole solve."""
        with self:
            for _ in self.batches():
                pass
        return self.trajectory

    def _work(self) -> None:
        try:
            self._news.put(_solve(self._model, self._images, self._settings, self._start, self._watch()))
        except BaseException as error:  # handed to whoever iterates
            self._news.put(error)

    def _watch(self) -> _Watch:
        return _Watch(news=self._news, stopping=self._stopping, deadline=time.perf_counter() + self._limit)


@dataclass(frozen=True, kw_only=True)
class _Watch:
    """Where a solve's steps go, and when it must end."""

    news: queue.SimpleQueue[Any]
    stopping: threading.Event
    deadline: float

    def reason_to_end(self) -> Reason | None:
        if self.stopping.is_set():
            return "stopped"
        return "time" if time.perf_counter() > self.deadline else None


class _Ended(Exception):
    """Leaves a solve before its end."""

    def __init__(self, reason: Reason) -> None:
        self.reason: Reason = reason


class WatchedBlock(nn.Module):
    """One evaluation of the attached block of `model`, whose last argument is kept."""

    def __init__(self, model: MDEQ) -> None:
        super().__init__()
        self.block = model.block  # a submodule, so that its parametrized weights are computed once per solve
        [attachment] = attachments(model.block)
        self._step = attachment.step
        self.last: tuple[Tensor, ...] = ()

    def forward(self, z: tuple[Tensor, ...], *inputs: Any) -> tuple[Tensor, ...]:
        self.last = z
        return self._step(z, *inputs)


@torch.no_grad()
def _solve(
    model: MDEQ, images: Tensor, settings: Settings, start: tuple[Tensor, ...] | None, watch: _Watch
) -> Trajectory:
    began = time.perf_counter()
    injection = model.inject(images)
    block = WatchedBlock(model)
    steps: list[Step] = []
    best = math.inf
    probabilities = torch.empty(0)

    def on_step(number: int, image: tuple[Tensor, ...], residual: Tensor) -> None:
        nonlocal best, probabilities
        value = float(residual)
        if not math.isfinite(value):
            return
        if value < best or not steps:
            best = value
            probabilities = model.head(image).float().softmax(dim=1)[0].cpu()
        moved = tuple(new - old for new, old in zip(image, block.last, strict=True))
        step = Step(
            number=number,
            seconds=time.perf_counter() - began,
            residual=value,
            residuals=tuple(_ratio(each, new) for each, new in zip(moved, image, strict=True)),
            probabilities=probabilities,
            maps=tuple(map(_over_channels, image)),
            changes=tuple(map(_over_channels, moved)),
        )
        steps.append(step)
        watch.news.put(step)
        reason = watch.reason_to_end()
        if reason is not None and value > settings.tolerance and number < settings.max_steps:
            raise _Ended(reason)

    try:
        solution = fixed_point(
            block,
            model.initial_state(injection) if start is None else start,
            *model.block_inputs(injection),
            solver=settings.build(solver_of(model)),
            on_failure="ignore",
            on_step=on_step,
        )
    except _Ended as ended:
        return Trajectory(
            settings=settings, steps=tuple(steps), reason=ended.reason, seconds=time.perf_counter() - began
        )
    if bool(solution.converged):
        reason: Reason = "settled"
    else:
        reason = "steps" if int(solution.steps) == settings.max_steps else "diverged"
    return Trajectory(
        settings=settings,
        steps=tuple(steps),
        reason=reason,
        seconds=time.perf_counter() - began,
        state=solution.value,
    )


def _ratio(moved: Tensor, image: Tensor) -> float:
    """The relative residual of one resolution; 0 where there is nothing at all."""
    size = float(image.norm())
    return float(moved.norm()) / size if size > 0 else 0.0


def _over_channels(features: Tensor) -> Tensor:
    """The root mean square over channels of `(1, C, H, W)` as `(H, W)`, at most `LARGEST_MAP` a side."""
    power = features.float().square().mean(dim=1, keepdim=True)
    height, width = power.shape[-2:]
    if max(height, width) > LARGEST_MAP:
        power = functional.adaptive_avg_pool2d(power, (min(height, LARGEST_MAP), min(width, LARGEST_MAP)))
    return power.sqrt()[0, 0].cpu()
