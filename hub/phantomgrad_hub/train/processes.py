"""What the processes of one run share: decisions, and with `shard` the weights.

Note [Sharding]
With FSDP2 every process keeps a part of each parameter, of its gradient and of the optimizer's state; a forward pass gathers
the parameters, which stay whole until backward is done. So the block's solver may take another number of steps in every
process: no evaluation of the block communicates. What is stored is always whole, so that a run goes on with any
number of processes, sharded or not.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from phantomgrad import PhantomGradError
from phantomgrad_hub.extras import require

from .errors import TrainingError
from .run import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def own_state() -> Generator[None, None, None]:
    """Forget afterwards what Accelerate keeps for the whole process, where nothing was kept before: the next run may then differ.

    Where processes share a group it is the launch's, and stays.
    """
    state = require("accelerate.state", "train")
    kept, partial = bool(state.AcceleratorState._shared_state), bool(state.PartialState._shared_state)
    try:
        yield
    finally:
        # Accelerate has no public way.
        if not (kept or (distributed.is_available() and distributed.is_initialized())):
            state.AcceleratorState._reset_state(reset_partial_state=not partial)


@contextmanager
def others_may_end(accelerator: Accelerator, run: RunFolder) -> Generator[None, None, None]:
    """Turn what the back end says where another process has gone into a `TrainingError` of one line."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
        if accelerator.num_processes == 1 or isinstance(error, PhantomGradError) or not lost:
            raise
        raise TrainingError(
            f"another process of this run has ended (it, or its launcher, says why); {run.path} {run.held()}. "
            "The same command goes on."
        ) from error


def precision_in_force() -> str | None:
    """The mixed precision of an Accelerator that this process already has; None where it has none."""
    state = require("accelerate.state", "train").AcceleratorState
    return str(state().mixed_precision) if state._shared_state else None


def agreed(accelerator: Accelerator, wanted: bool) -> bool:
    """Whether any process wants it, so that all of them do the same."""
    return bool(highest(accelerator, int(wanted)))


def highest(accelerator: Accelerator, number: int) -> int:
    """The largest of the numbers that the processes give."""
    if accelerator.num_processes == 1:
        return number
    numbers: Any = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(numbers.max())


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Keep only this process's part of every parameter of `model`, which moves to the run's device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    fully_shard(model.to(accelerator.device), mesh=mesh)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any) -> Any:
    """A state dict, or any part of one, with every sharded tensor whole; all processes must ask for it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(part) for part in value]
    return value


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor in parts like those of `other`; itself where that is not sharded."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def load_weights(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Load a whole state dict into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({name: sharded_like(tensor, own[name]) for name, tensor in stored.items()})


def load_optimizer(optimizer: Any, stored: dict[str, Any]) -> None:
    """Load a whole state dict into an optimizer, whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: sharded_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in entries.items()
        }
        for index, entries in stored["state"].items()
    }
    optimizer.load_state_dict({**stored, "state": state})
