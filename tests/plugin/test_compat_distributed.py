"""DistributedDataParallel and FSDP2 on two gloo processes, against one process; nothing waits for ever."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compat import Model, assert_same, attached, gradients, settings
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from phantomgrad import (
    AdaptivePhantom,
    AttachError,
    Attachment,
    DivergedError,
    FixedPointIteration,
    Gradient,
    Implicit,
    NeumannPhantom,
    NotConvergedWarning,
    UnrolledPhantom,
    attach,
    attachments,
)

GRADIENTS: list[Gradient] = [UnrolledPhantom(), UnrolledPhantom(recompute=True), NeumannPhantom(), Implicit(rtol=1e-10)]


class TwoLayers(nn.Module):
    """A cell of two layers, each of which can be a unit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.4 * self.second(self.first(z)) + x)


def _batch() -> Tensor:
    # The halves need different numbers of solver steps and, of Implicit, of products.
    scale = torch.tensor([0.01] * 4 + [3.0] * 4, dtype=torch.float64)[:, None]
    return scale * torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def _model() -> Model:
    torch.manual_seed(7)
    return Model(TwoLayers).double()


def _ddp(model: Model, options: dict[str, Any]) -> nn.Module:
    attach(model.cell, **options)
    return DistributedDataParallel(model)


def _ddp_static_graph(model: Model, options: dict[str, Any]) -> nn.Module:
    attach(model.cell, **options)
    return DistributedDataParallel(model, static_graph=True)


def _unit_attached_first(model: Model, options: dict[str, Any]) -> nn.Module:
    attach(model.cell, **options)
    fully_shard(model.cell)
    return fully_shard(model)


def _unit_attached_last(model: Model, options: dict[str, Any]) -> nn.Module:
    fully_shard(model.cell)
    fully_shard(model)
    attach(model.cell, **options)
    return model


def _inner_units_attached_first(model: Model, options: dict[str, Any]) -> nn.Module:
    attach(model.cell, **options, process_group=dist.group.WORLD)
    for unit in (model.cell.first, model.cell.second, model):
        fully_shard(unit)
    return model


def _inner_units_attached_last(model: Model, options: dict[str, Any]) -> nn.Module:
    for unit in (model.cell.first, model.cell.second, model):
        fully_shard(unit)
    attach(model.cell, **options, process_group=dist.group.WORLD)
    return model


WRAPPINGS = [
    _ddp,
    _ddp_static_graph,
    _unit_attached_first,
    _unit_attached_last,
    _inner_units_attached_first,
    _inner_units_attached_last,
]


def _full_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: grad.full_tensor() if isinstance(grad, torch.distributed.tensor.DTensor) else grad
        for name, grad in ((name, p.grad) for name, p in model.named_parameters())
        if grad is not None
    }


def _half(rank: int) -> Tensor:
    return _batch()[4 * rank : 4 * rank + 4]


def _refused(attachment: Attachment, rank: int) -> str:
    model = attachment.module
    with pytest.raises(AttachError) as refused:
        model(torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64))
    attachment.remove()
    return str(refused.value)


def _check_refusals(rank: int) -> None:
    """Communication within the cell is refused before it begins, at every rank."""
    model = _model()
    fully_shard(model.cell.second)
    text = _refused(attach(model.cell), rank)
    assert text.startswith("Model.cell.second (FSDPLinear) communicates in every evaluation"), text
    assert "Pass process_group= to attach" in text
    model = _model()
    model.cell.first = nn.SyncBatchNorm(4).double()
    assert _refused(attach(model.cell), rank).startswith("Model.cell.first (SyncBatchNorm) communicates")
    model.cell.first = nn.BatchNorm1d(4).double()
    attach(model.cell)
    model(_half(rank))  # what does not communicate is left alone


def _check_failing_together(rank: int) -> None:
    model = _model()
    attach(model.cell, process_group=dist.group.WORLD)
    x = _half(rank)
    here = "samples of another process of process_group are" if rank == 0 else "4 of 4 samples are"
    with pytest.raises(DivergedError, match=rf"{here} not finite after 1 step\."):
        model(x if rank == 0 else torch.full_like(x, torch.nan))
    model = _model()
    attach(model.cell, solver=FixedPointIteration(max_steps=2), process_group=dist.group.WORLD)
    with torch.no_grad():  # from a zero start without input or bias every step stays at zero
        for parameter in model.parameters():
            if rank == 0 and parameter.dim() == 1:
                parameter.zero_()
    with pytest.warns(NotConvergedWarning, match=rf"{here} above their tolerance after [12] steps?"):
        model(torch.zeros_like(x) if rank == 0 else x)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.distributed.init_device_mesh("cpu", (2,))
    results: dict[str, dict[str, Tensor]] = {}
    for gradient in GRADIENTS:
        for wrap in WRAPPINGS:
            model = _model()
            parallel = wrap(model, settings(gradient))
            for _ in range(2):  # the second step shows that nothing was left over from the first
                model.zero_grad()
                parallel(_half(rank)).square().mean().backward()
            results[f"{gradient} {wrap.__name__}"] = _full_gradients(model)
    _check_refusals(rank)
    _check_failing_together(rank)
    if rank == 0:
        torch.save(results, f"{folder}/gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.timeout(240)
def test_ddp_and_fsdp2_give_the_gradients_of_one_process(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    stored = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert len(stored) == len(GRADIENTS) * len(WRAPPINGS)
    for gradient in GRADIENTS:
        model = _model()
        attach(model.cell, **settings(gradient))
        model(_batch()).square().mean().backward()
        for wrap in WRAPPINGS:
            assert_same(stored[f"{gradient} {wrap.__name__}"], gradients(model), rtol=1e-6)


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "gradient",
    [
        Implicit(rtol=1e-10),
        AdaptivePhantom(),
    ],
    ids=repr,
)
def test_a_backward_whose_length_depends_on_values_is_agreed_upon(
    gradient: Gradient, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, attachment = attached(gradient, process_group=alone)
    value = model(_batch()).square().sum()
    votes: list[Tensor] = []
    all_reduce = dist.all_reduce

    @functools.wraps(all_reduce)
    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        votes.append(tensor)
        return all_reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", counted)
    value.backward()
    assert attachment.solution is not None
    assert attachment.solution.adjoint.steps is not None
    assert len(votes) >= attachment.solution.adjoint.steps - 1


def test_a_copy_shares_the_process_group_and_a_pickle_goes_without(alone: Any) -> None:
    model, _ = attached(NeumannPhantom(), process_group=alone)
    [copied] = attachments(copy.deepcopy(model).cell)
    assert copied._settings.process_group is alone
    [loaded] = attachments(pickle.loads(pickle.dumps(model)))
    assert loaded._settings.process_group is None
