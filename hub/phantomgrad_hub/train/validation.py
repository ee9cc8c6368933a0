"""Validation during a run, shared by its processes and ended early by a signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phantomgrad_hub.data.errors import DataError
from phantomgrad_hub.data.sources import ImageSplit, Source, Subset
from phantomgrad_hub.evaluate import Evaluation, check_unreadable, default_steps, evaluate_images, summarise
from phantomgrad_hub.extras import require
from phantomgrad_hub.models.mdeq import MDEQ

from .build import StopRequest
from .config import TrainConfig
from .processes import agreed
from .run import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator


def spread(targets: Sequence[int], count: int) -> list[int]:
    """Where `count` images lie, in order, that are evenly spaced over all of them sorted by class; all where there are fewer.

    The same in every process and at every time: it depends on the class indices alone. A class has its share to within one.
    """
    # Not over the list as it is: where the classes take turns in it, equal steps could meet one class only.
    by_class = sorted(range(len(targets)), key=targets.__getitem__)
    count = min(count, len(targets))
    return sorted(by_class[position * len(targets) // count] for position in range(count))


class ValidationStoppedError(Exception):
    """A signal came while validating."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Evaluates models on the validation split, every process taking its share of the images."""

    accelerator: Accelerator
    config: TrainConfig
    source: Source
    stop: StopRequest

    def measure(self, model: MDEQ) -> Evaluation:
        """The evaluation of `validation_images` images, those that `spread` gives; raises `ValidationStoppedError`."""
        split, count = self.source.validation, self.config.validation_images
        chosen = split if count is None or count >= len(split) else Subset(split, spread(split.targets, count))
        return self._evaluate(model, chosen, ())

    def measure_best(self, run: RunFolder) -> Evaluation:
        """The best checkpoint on all images, as `evaluate` measures it; kept in `result.json`.

        Raises `ValidationStoppedError`.
        """
        stored = run.load_result()
        if stored is not None:
            return Evaluation.from_dict(stored)
        self.accelerator.wait_for_everyone()
        best = MDEQ.from_pretrained(run.best).to(self.accelerator.device)
        evaluation = self._evaluate(best, self.source.validation, default_steps(best))
        run.save_result(evaluation.to_dict())
        return evaluation

    def _evaluate(self, model: MDEQ, split: ImageSplit, steps: Sequence[int]) -> Evaluation:
        processes = self.accelerator.num_processes
        share = range(self.accelerator.process_index, len(split), processes)
        records, failure, stopped = dict[str, Tensor](), None, False
        try:
            # There may be fewer images than processes.
            if share or not len(split):
                records = evaluate_images(
                    model,
                    Subset(split, share),
                    self.source.labels,
                    steps=steps,
                    batch_size=self.config.validation_batch_size,
                    progress=self._check,
                    whole=self.source.count,
                )
        except ValidationStoppedError:
            stopped = True
        except DataError as error:
            failure = str(error)
        # A signal to one process, or an error in one, ends it in all: the others would wait for its records.
        if agreed(self.accelerator, stopped):
            raise ValidationStoppedError
        shares = require("accelerate.utils", "train").gather_object([(records, failure)])
        if failures := [reason for _, reason in shares if reason is not None]:
            raise DataError(failures[0])
        check_unreadable(
            {
                first + processes * place: split.name(first + processes * place)
                for first, (part, _) in enumerate(shares)
                for place in (part["readable"].logical_not().nonzero().flatten().tolist() if part else ())
            },
            split,
            self.source.count,
        )
        filled = [part for part, _ in shares if part]
        return summarise({name: torch.cat([part[name] for part in filled]) for name in filled[0]})

    def _check(self, done: int, total: int) -> None:
        if self.stop.signal is not None and done < total:
            raise ValidationStoppedError
