"""What resuming needs, and when it may be stored."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from phantomgrad_hub.models.mdeq import MDEQ
from phantomgrad_hub.typed_fields import check_types

from .average import WeightAverage
from .errors import TrainingError
from .processes import agreed, load_optimizer, load_weights, own_part, whole
from .run import Position, RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class TrainingState:
    """Weights, their average, the optimizer and the position of a run; loaded from the run's folder when made.

    Every process calls every method, and the main one writes.
    """

    run: RunFolder
    accelerator: Accelerator
    model: MDEQ
    average: WeightAverage
    optimizer: Any
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        stored = self.run.load_state()
        if stored is not None:
            with self.run.restoring():
                self.position = Position(**stored["position"])
                check_types(self.position)
                load_weights(self.model, stored["model"])
                self.average.load(stored["average"])
                load_optimizer(self.optimizer, stored["optimizer"])
                if self.accelerator.scaler is not None and stored["scaler"] is not None:
                    self.accelerator.scaler.load_state_dict(stored["scaler"])
            self.run.restored(self.position)
        self.run.rewind_log(self.position)
        self.run.log_resume(self.position.step)
        self.run.log_environment(self.accelerator.device, self.accelerator.num_processes, self.position.step)

    def save(self, seconds: float) -> None:
        """Store everything, and the averaged model as `RUN/last`; `seconds` have passed since the last time."""
        finite = all(bool(torch.isfinite(own_part(parameter)).all()) for parameter in self.model.parameters())
        self.check_finite(0.0 if finite else math.nan)
        self.position.seconds += seconds
        self.average.follow()
        scaler = self.accelerator.scaler
        stored = {
            "position": asdict(self.position),
            "model": whole(self.model.state_dict()),
            "average": self.average.model.state_dict(),
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        self.run.save(stored, self.average.model)
        self.accelerator.wait_for_everyone()

    def check_finite(self, loss: float) -> None:
        """Raise `TrainingError` in all processes where the loss, or a weight, has become infinite or NaN in one of them."""
        if agreed(self.accelerator, not math.isfinite(loss)):
            shown = math.nan if math.isfinite(loss) else loss  # in another process
            raise TrainingError(
                f"the loss became {shown} by step {self.position.step}; {self.run.path} {self.run.held()}. Start another run "
                "with a lower optimizer.lr or a lower clip."
            )
