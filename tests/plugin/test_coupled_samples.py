"""Maps whose samples are coupled, or lie along another dimension, against loops written by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phantomgrad import Anderson, FixedPointIteration, Implicit, NeumannPhantom, attach, fixed_point

DTYPE = torch.float64


def test_a_chain_of_nodes_is_one_sample_and_converges_as_a_loop_does() -> None:
    # What the first node knows reaches the last of 30 after 30 steps: a node that is quiet has not settled.
    nodes = 30
    adjacency = torch.diag(torch.ones(nodes - 1, dtype=DTYPE), -1)
    x = torch.zeros(nodes, 1, dtype=DTYPE)
    x[0] = 1.0

    def cell(z: Tensor) -> Tensor:
        return 0.95 * adjacency @ z + x

    rtol = 1e-8
    z, steps = torch.zeros_like(x), 0
    while True:
        image, steps = cell(z), steps + 1
        if (image - z).norm() <= rtol * (0.01 + image.norm()):
            break
        z = image
    solution = fixed_point(cell, torch.zeros_like(x), batch_dim=None, solver=FixedPointIteration(rtol=rtol))
    assert solution.steps.tolist() == [steps]
    torch.testing.assert_close(solution.value, image, rtol=0, atol=0)
    torch.testing.assert_close(solution.value[-1, 0], torch.tensor(0.95 ** (nodes - 1), dtype=DTYPE))


def test_nodes_taken_for_samples_would_stop_at_once_which_is_why_batch_dim_exists() -> None:
    adjacency = torch.diag(torch.ones(29, dtype=DTYPE), -1)
    x = torch.zeros(30, 1, dtype=DTYPE)
    x[0] = 1.0
    wrong = fixed_point(lambda z: 0.95 * adjacency @ z + x, torch.zeros_like(x), batch_dim=0)
    assert wrong.converged.all()
    assert wrong.value[-1, 0] == 0.0


class SequenceFirst(nn.Module):
    """A transformer layer on states `(length, batch, width)`, scaled so that it settles."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.4 * self.layer(z) + x


def test_a_sequence_first_transformer_layer_is_solved_per_sequence_as_a_loop_does() -> None:
    cell = SequenceFirst().double()
    x = torch.cat([scale * torch.randn(5, 1, 8, dtype=DTYPE) for scale in (0.1, 1.0, 4.0)], dim=1)
    rtol = 1e-6
    expected, counts = [], []
    with torch.no_grad():
        for i in range(3):
            z, steps = torch.zeros(5, 1, 8, dtype=DTYPE), 0
            while True:
                image, steps = cell(z, x[:, i : i + 1]), steps + 1
                if (image - z).norm() <= rtol * (0.01 + image.norm()):
                    break
                z = image
            expected.append(image)
            counts.append(steps)
    attachment = attach(cell, NeumannPhantom(), solver=FixedPointIteration(rtol=rtol, max_steps=200), batch_dim=1)
    z = cell(torch.zeros_like(x), x)
    torch.testing.assert_close(z, torch.cat(expected, dim=1), rtol=1e-10, atol=1e-10)
    assert attachment.solution is not None
    assert attachment.solution.steps.tolist() == counts
    assert len(set(counts)) > 1


def test_the_exact_gradient_of_a_coupled_map_is_the_dense_one() -> None:
    torch.manual_seed(1)
    adjacency = torch.rand(6, 6, dtype=DTYPE)
    adjacency = 0.8 * adjacency / adjacency.sum(dim=1, keepdim=True)
    weight = torch.linalg.qr(torch.randn(3, 3, dtype=DTYPE))[0].requires_grad_()
    x = torch.randn(6, 3, dtype=DTYPE, requires_grad=True)
    solution = fixed_point(
        lambda z: adjacency @ z @ weight + x,
        torch.zeros(6, 3, dtype=DTYPE),
        batch_dim=None,
        solver=Anderson(max_steps=300, rtol=1e-13),
        gradient=Implicit(),
    )
    # vec(A Z W) = (A kron W^T) vec(Z), row by row.
    dense = torch.linalg.solve(torch.eye(18, dtype=DTYPE) - torch.kron(adjacency, weight.T.contiguous()), x.reshape(18))
    torch.testing.assert_close(solution.value.reshape(18), dense, rtol=1e-9, atol=1e-9)
    g = torch.randn(18, dtype=DTYPE)
    ours = torch.autograd.grad((solution.value.reshape(18) * g).sum(), (weight, x))
    for found, truth in zip(ours, torch.autograd.grad((dense * g).sum(), (weight, x)), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-8)
