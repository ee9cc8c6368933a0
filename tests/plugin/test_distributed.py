"""Two gloo processes give the gradients of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from phantomgrad import FixedPointIteration, Gradient, Implicit, NeumannPhantom, OneStep, UnrolledPhantom, attach

GRADIENTS: list[Gradient] = [
    UnrolledPhantom(),
    UnrolledPhantom(recompute=True),
    NeumannPhantom(),
    OneStep(),
    Implicit(rtol=1e-12),
]
SOLVER = FixedPointIteration(max_steps=200, rtol=1e-13)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.inputs = nn.Linear(3, 6)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.4 * self.recurrent(z) + self.inputs(x))


class Classifier(nn.Module):
    def __init__(self, gradient: Gradient) -> None:
        super().__init__()
        self.cell = Cell()
        self.head = nn.Linear(6, 2)
        self.unused = nn.Linear(2, 2)
        attach(self.cell, gradient, solver=SOLVER)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.new_zeros(len(x), 6), x))


def _model(gradient: Gradient) -> Classifier:
    torch.manual_seed(7)
    return Classifier(gradient).double()


def _batch() -> Tensor:
    # The halves need different numbers of solver steps.
    scale = torch.tensor([0.01] * 4 + [3.0] * 4, dtype=torch.float64)[:, None]
    return scale * torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def _gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for gradient in GRADIENTS:
        model = _model(gradient)
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):  # the second step shows that buckets were reset
            model.zero_grad()
            parallel(_batch()[4 * rank : 4 * rank + 4]).square().mean().backward()
        results.append(_gradients(model))
    if rank == 0:
        torch.save(results, f"{folder}/gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.timeout(180)
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    stored = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for gradient, grads in zip(GRADIENTS, stored, strict=True):
        model = _model(gradient)
        model(_batch()).square().mean().backward()
        for name, grad, expected in zip(dict(model.named_parameters()), grads, _gradients(model), strict=True):
            torch.testing.assert_close(
                grad, expected, rtol=1e-6, atol=1e-9, msg=lambda m, where=(gradient, name): f"{where}: {m}"
            )
            assert name.startswith("unused") or grad.abs().max() > 0
