"""The parts of a run that the loop puts together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import phantomgrad
from phantomgrad import Backprop
from phantomgrad.diagnostics import jacobian_penalty
from phantomgrad_hub.data.seeds import derive_seed
from phantomgrad_hub.data.sources import Source
from phantomgrad_hub.extras import require
from phantomgrad_hub.facts import Facts
from phantomgrad_hub.files import EMBEDDED
from phantomgrad_hub.models.mdeq import MDEQ

from .config import OptimizerConfig, TrainConfig


def build_model(config: TrainConfig, source: Source, init: str | Path | None) -> MDEQ:
    """A model for the classes of `source`: new, or the checkpoint `init` with a new head and the options of `config.model`."""
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model_config = replace(config.model, num_classes=len(source.labels))
    if init is not None:
        model = MDEQ.from_pretrained(init, labels=list(source.labels))
        base = EMBEDDED if init == EMBEDDED else model.facts.base if model.source is None else str(model.source)
        # What was measured before does not hold for what will be trained.
        model.facts, model.source = Facts(base=base), None
        model.config, model.head.dropout.p = model_config, model_config.head_dropout
        [attachment] = phantomgrad.attachments(model.block)
        attachment.gradient, attachment.solver = model_config.gradient, model_config.solver
        attachment.eval_solver = model_config.eval_solver
        return model
    return MDEQ(model_config, labels=source.labels)


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, with weight decay for kernels and matrices only.

    Norms, biases and the magnitudes of weight-normalised kernels are vectors: decaying them changes what a layer
    computes rather than how large its redundant scale is.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in parameters if parameter.numel() == max(parameter.shape, default=1)]
    known = {id(parameter) for parameter in vectors}
    kernels = [parameter for parameter in parameters if id(parameter) not in known]
    groups: list[dict[str, Any]] = [
        {"params": kernels, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    if config.name == "lamb":
        # Clipping is the loop's.
        return require("timm.optim", "train").Lamb(groups, lr=config.lr, betas=config.betas, max_grad_norm=None)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


class TrainedModel(nn.Module):
    """What a training step calls: logits, and the Jacobian penalty of the block at their equilibrium."""

    def __init__(self, model: MDEQ, penalised: bool) -> None:
        super().__init__()
        self.model = model
        self._penalised = penalised

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits `(B, classes)` and the penalty, a scalar; None where it has no weight."""
        model = self.model
        if not self._penalised:
            return model(images), None
        injection = model.inject(images)
        inputs = model.block_inputs(injection)
        state = model.block(model.initial_state(injection), *inputs)
        return model.head(state), jacobian_penalty(model.block, state, *inputs)


def attach_for_training(model: MDEQ, config: TrainConfig) -> phantomgrad.Attachment:
    """Attach the block anew with the options of training: a solve that ends early is intended and stays silent."""
    [attachment] = phantomgrad.attachments(model.block)
    attachment.remove()
    return phantomgrad.attach(
        model.block,
        attachment.gradient,
        solver=attachment.solver,
        eval_solver=attachment.eval_solver,
        on_failure="ignore",
        compile=config.compile,
    )


@dataclass
class SolverSchedule:
    """Sets the attached block's number of steps, and the images' size, as training goes on."""

    config: TrainConfig
    attachment: phantomgrad.Attachment

    def __post_init__(self) -> None:
        self._solver, self._gradient = self.attachment.solver, self.attachment.gradient
        self._image_size: int | None = None

    def set_progress(self, progress: float) -> None:
        """Take the steps of the phase at `progress` in [0, 1]."""
        phase = self.config.phase(progress)
        if phase is None:
            return
        self._image_size = phase.image_size
        self.attachment.gradient = Backprop(steps=phase.solver_steps) if phase.unrolled else self._gradient
        self.attachment.solver = replace(self._solver, max_steps=phase.solver_steps)
        if phase.phantom_steps is not None:
            self.attachment.gradient = replace(self._gradient, steps=phase.phantom_steps)  # type: ignore[call-arg]

    def resized(self, images: Tensor) -> Tensor:
        """The images `(B, 3, H, W)`, normalised, at the size of the current phase."""
        if self._image_size is None or self._image_size == images.shape[-1]:
            return images
        size = (self._image_size, self._image_size)
        return functional.interpolate(images, size=size, mode="bilinear", antialias=True)


class StopRequest:
    """Whether the process was asked to stop, by SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:  # a second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.signal = number

    @contextmanager
    def listening(self) -> Generator[StopRequest, None, None]:
        """Note the signals instead of dying from them; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
