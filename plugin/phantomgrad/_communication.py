"""Modules inside a cell that communicate whenever they are evaluated.

Note [Communication]
An FSDP unit gathers its parameters, and SyncBatchNorm its statistics, in every evaluation. Processes that take different
numbers of steps would then wait for each other for ever, so they have to stop together: that is what `process_group` is for.
An FSDP2 unit that is the attached module itself gathers in its hooks, outside the solve, and needs nothing.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from phantomgrad._bound import module_path
from phantomgrad._errors import AttachError


def refuse_communication(module: nn.Module) -> None:
    """An AttachError if evaluations of `module` communicate between processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1:
        return
    for each in module.modules():
        if _communicates(each, inside=each is not module):
            raise AttachError(
                f"{module_path(each)} communicates in every evaluation, and processes that take different numbers of steps "
                "would wait for each other for ever. Pass process_group= to attach, so that they stop together."
            )


def _communicates(module: nn.Module, *, inside: bool) -> bool:
    if isinstance(module, nn.SyncBatchNorm):
        return module.training
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # where it was not imported, nothing is sharded
        return False
    return isinstance(module, fsdp.FullyShardedDataParallel) or (inside and isinstance(module, fsdp.FSDPModule))
