"""Everything a training run depends on, as one frozen record that is checked when it is made.

A value of another type or out of range raises `ConfigError`, a `ValueError`, that names the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from phantomgrad_hub.config import MDEQConfig
from phantomgrad_hub.data.transforms import AugmentationConfig
from phantomgrad_hub.errors import ConfigError
from phantomgrad_hub.typed_fields import check_types


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer; norms and biases are never decayed."""

    name: Literal["sgd", "adamw", "lamb"] = "sgd"
    """`lamb`, for batches of thousands, is timm's (You et al., "Large Batch Optimization for Deep Learning", 2020)."""
    lr: float = 0.1
    """Learning rate at the top of the schedule; float32 holds what an optimizer makes of at most 1e30."""
    weight_decay: float = 1e-4
    momentum: float = 0.9
    """For `sgd`."""
    nesterov: bool = True
    """For `sgd`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """For `adamw` and `lamb`."""

    def __post_init__(self) -> None:
        check_types(self)
        _choice("name", self.name, ("sgd", "adamw", "lamb"))
        _positive("lr", self.lr, most=1e30)
        _not_negative("weight_decay", self.weight_decay, most=1e6)
        _fraction("momentum", self.momentum)
        for beta in self.betas:
            _fraction("betas", beta)
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov needs a momentum above 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over training: a linear rise, then half a cosine."""

    warmup: float = 0.02
    """Fraction of all steps in which the rate rises, from one part to all of it: no step has a rate of 0."""
    final: float = 0.0
    """The rate at the end, as a fraction of the top."""

    def __post_init__(self) -> None:
        check_types(self)
        _fraction("warmup", self.warmup)
        _fraction("final", self.final)

    def factor(self, step: int, total: int) -> float:
        """The rate of optimizer step `step`, counted from 0, of `total`, as a fraction of the top."""
        rising = self.warmup * total
        if step < rising:
            return min((step + 1) / rising, 1.0)
        cosine = (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2
        return self.final + (1 - self.final) * cosine


@dataclass(frozen=True, kw_only=True)
class SolverPhase:
    """How long the block is solved, in part of training.

    Few solver steps are enough while the weights are far from their values, and much cheaper; more at the end make the
    trained block settle.
    """

    until: float
    """The phase ends at this fraction of training; the last one's is 1."""
    solver_steps: int
    """`max_steps` of the block's solver."""
    phantom_steps: int | None = None
    """`steps` of the gradient; None keeps the model's."""
    unrolled: bool = False
    """Backpropagate through the `solver_steps` iterations instead, as MDEQ's pre-training does: few of them train fast while
    the weights are far from settling. `phantom_steps` then has no part."""
    image_size: int | None = None
    """Side, in pixels, to which training images are shrunk; None keeps the model's. Small images first cost less."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.until <= 1:
            raise ConfigError(f"until must be above 0 and at most 1, not {self.until}")
        _at_least("solver_steps", self.solver_steps, 1)
        if self.phantom_steps is not None:
            _at_least("phantom_steps", self.phantom_steps, 1)
        if self.image_size is not None:
            _at_least("image_size", self.image_size, 8)
        if self.unrolled and self.phantom_steps is not None:
            raise ConfigError("phantom_steps has no part in an unrolled phase")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. `num_classes` of the model is replaced by that of the data."""

    model: MDEQConfig
    """With `init`: that of the checkpoint, of which gradient, solvers and dropout may be others."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    solver_schedule: tuple[SolverPhase, ...] = ()
    """Phases in order of `until`; empty keeps the model's own solver and gradient."""
    epochs: int = 10
    batch_size: int = 128
    """Images of one process between two calls of the model."""
    accumulation: int = 1
    """Batches whose mean gradient makes one optimizer step; the last step of an epoch may have fewer. BatchNorm sees each batch
    alone."""
    clip: float | None = None
    """Largest norm of the gradient of all parameters."""
    label_smoothing: float = 0.0
    jacobian_penalty: float = 0.0
    """Weight of `phantomgrad.diagnostics.jacobian_penalty` at the equilibrium in the loss; 0 turns it off."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    shard: bool = False
    """Shard weights, gradients and optimizer over the processes (FSDP2) instead of copying them (DDP)."""
    channels_last: bool = False
    compile: bool = False
    """Compile the block with `torch.compile`."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is what is validated and saved; 0 turns it off."""
    workers: int = 1
    """Processes that decode and augment; 0 does it in the training process."""
    memory_gib: float = 4.0
    """Decoded training images are kept in memory up to this size; above, they are decoded every epoch."""
    seed: int = 0
    log_every: int = 20
    """Optimizer steps between two lines of metrics."""
    validate_every: int = 1
    """Epochs between two validations; the last epoch is always validated."""
    validation_images: int | None = None
    """How many validation images, evenly spaced over the classes, are used during training; None takes all. All are used at
    the end."""
    validation_batch_size: int = 100
    checkpoint_minutes: float = 10.0
    """A checkpoint is written at least this often, and after every epoch."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where Accelerate sends the metrics besides `metrics.jsonl`: names of its trackers; TensorBoard's files lie in the run."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "batch_size", "accumulation", "log_every", "validate_every", "validation_batch_size"):
            _at_least(name, getattr(self, name), 1)
        for name in ("workers", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.validation_images is not None:
            _at_least("validation_images", self.validation_images, 1)
        if self.clip is not None:
            _positive("clip", self.clip)
        _fraction("label_smoothing", self.label_smoothing)
        _fraction("ema_decay", self.ema_decay)
        _not_negative("memory_gib", self.memory_gib)
        _not_negative("jacobian_penalty", self.jacobian_penalty)
        _positive("checkpoint_minutes", self.checkpoint_minutes)
        _choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        if self.shard and self.mixed_precision == "fp16":
            raise ConfigError("shard has no loss scaling: take mixed_precision 'bf16' or 'no'")
        ends = [phase.until for phase in self.solver_schedule]
        if ends and (ends != sorted(set(ends)) or ends[-1] != 1):
            raise ConfigError(
                f"the phases of solver_schedule must end at increasing fractions, the last at 1, not {ends}"
            )
        if any(phase.phantom_steps is not None for phase in self.solver_schedule) and not hasattr(
            self.model.gradient, "steps"
        ):
            raise ConfigError(
                f"solver_schedule sets phantom_steps, but {type(self.model.gradient).__name__} has no steps; take another "
                "model.gradient, or solver_schedule=()"
            )

    def phase(self, progress: float) -> SolverPhase | None:
        """The solver phase at `progress` in [0, 1] of training; None where the model's own options hold."""
        return next((phase for phase in self.solver_schedule if progress < phase.until or phase.until == 1), None)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")


def _positive(name: str, value: float, *, most: float = math.inf) -> None:
    if not (0 < value <= most and math.isfinite(value)):
        raise ConfigError(f"{name} must be a finite number above 0{_and_at_most(most)}, not {value}")


def _not_negative(name: str, value: float, *, most: float = math.inf) -> None:
    if not (0 <= value <= most and math.isfinite(value)):
        raise ConfigError(f"{name} must be a finite number of at least 0{_and_at_most(most)}, not {value}")


def _and_at_most(most: float) -> str:
    return f" and at most {most:g}" if math.isfinite(most) else ""


def _fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name} must be at least 0 and below 1, not {value}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}")
