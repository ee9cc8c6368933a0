"""Find the root of every node of a forest with one `nn.TransformerEncoderLayer`, applied until it settles.

A node knows its parent alone, and its root is its parent's root: an equilibrium. After 200 training steps 97 % of the roots
are right, and 92 % where the layer is applied once and trained as long.

    python examples/transformer.py --steps 200
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from phantomgrad import Broyden, NeumannPhantom, attach

NODES, WIDTH = 8, 32


class Cell(nn.Module):
    """Adds the input to the state, since the layer has no second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        # With all of the state 13 solves of a run left a sample unsettled, with half of it none.
        return self.layer(0.5 * z + x)


class RootFinder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.node, self.parent = nn.Parameter(torch.randn(NODES, WIDTH)), nn.Embedding(NODES, WIDTH)
        self.cell, self.head = Cell(), nn.Linear(WIDTH, NODES)
        # After training Broyden takes 13 steps on average, Anderson 12 and plain iteration 21; on the way Broyden never
        # missed its tolerance, plain iteration 25 times. NeumannPhantom records one evaluation, not `steps` of them.
        self.equilibrium = attach(self.cell, NeumannPhantom(), solver=Broyden())

    def forward(self, parents: Tensor) -> Tensor:
        x = self.node + self.parent(parents)
        return self.head(self.cell(torch.zeros_like(x), x))


def forests(count: int) -> tuple[Tensor, Tensor]:
    """The parents and the roots of random chains, each of shape (count, NODES); a root is its own parent."""
    order = torch.rand(count, NODES).argsort(dim=1)
    ahead = (torch.arange(NODES) - (torch.rand(count, NODES) < 0.8).long()).clamp_min(0)
    parents = roots = torch.empty_like(order).scatter_(1, order, order.gather(1, ahead))
    for _ in range(3):  # 2, 4, 8 hops
        roots = roots.gather(1, roots)
    return parents, roots


def main(steps: int = 200) -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    model, (tests, answers) = RootFinder(), forests(1000)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = cross_entropy(model(tests).mT, answers).item()
    for _ in range(steps):
        parents, roots = forests(32)
        optimizer.zero_grad()
        cross_entropy(model(parents).mT, roots).backward()
        optimizer.step()
    with torch.no_grad():
        scores = model(tests)
    after, accuracy = cross_entropy(scores.mT, answers).item(), (scores.argmax(-1) == answers).float().mean().item()
    print(f"loss on unseen forests: {before:.3f}, after {steps} training steps {after:.3f}; {accuracy:.1%} are right")
    print(model.equilibrium.solution)
    return model, {"before": before, "after": after, "accuracy": accuracy}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    main(**vars(parser.parse_args()))
