"""A graph network at its equilibrium tells the nodes of a chain what is written on its first one, twenty nodes away.

All are told right; with `--layers 3`, the same cell applied three times and trained as usual, 47 % are.

    python examples/graph.py --steps 60
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.utils.parametrizations import spectral_norm

from phantomgrad import Broyden, UnrolledPhantom, attach, attachments

CHAIN, WIDTH = 20, 16


class Cell(nn.Module):
    """One round of messages between neighbours. With both norms at most 1, 0.9 keeps it a contraction."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = spectral_norm(nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, z: Tensor, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.tanh(0.9 * torch.sparse.mm(adjacency, self.messages(z)) + x)


class Classifier(nn.Module):
    def __init__(self, layers: int | None) -> None:
        super().__init__()
        self.layers, self.encoder, self.cell = layers or 1, nn.Linear(2, WIDTH, bias=False), Cell()
        self.head = nn.Sequential(nn.LayerNorm(WIDTH, eps=1e-12), nn.Linear(WIDTH, 2))  # reads also a faded message
        if layers is None:
            # Nodes depend on each other: batch_dim=None. One norm over all of them hardly sees the faint far ones, so
            # rtol is small: with the default 94 % were right. Broyden takes 27 steps, plain iteration 71.
            attach(self.cell, UnrolledPhantom(), solver=Broyden(rtol=1e-6, max_steps=100), batch_dim=None)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        x = self.encoder(features)
        z = torch.zeros_like(x)
        for _ in range(self.layers):
            z = self.cell(z, x, adjacency)
        return self.head(z)


def chains(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (nodes, 2), zero but on first nodes, the sparse normalised adjacency, and every node's class."""
    links = torch.ones(CHAIN, CHAIN).tril(1).triu(-1)
    links = links / (links.sum(0) * links.sum(1, keepdim=True)).sqrt()
    labels, first = torch.randint(2, (count,)).repeat_interleave(CHAIN), torch.eye(CHAIN, 1).repeat(count, 1)
    return one_hot(labels, 2) * first, torch.block_diag(*[links] * count).to_sparse(), labels


def main(steps: int = 60, layers: int | None = None) -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    model, (*inputs, labels), (*tests, answers) = Classifier(layers), chains(20), chains(50)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = cross_entropy(model(*tests), answers).item()
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(*inputs), labels).backward()
        optimizer.step()
    scores = model(*tests).detach()
    after, accuracy = cross_entropy(scores, answers).item(), (scores.argmax(-1) == answers).float().mean().item()
    print(f"loss on unseen chains: {before:.3f}, after {steps} training steps {after:.3f}; {accuracy:.1%} are right")
    print(*(attachment.solution for attachment in attachments(model)))
    return model, {"before": before, "after": after, "accuracy": accuracy}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int)
    main(**vars(parser.parse_args()))
