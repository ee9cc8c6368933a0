"""The first stage of torchvision's ResNet-18 as an equilibrium, batch norm included.

The task is small, and one application of the stage learns it too: what the example shows is what batch norm needs. It
tells in which of four directions the stripes of a noisy picture run.

    python examples/resnet_stage.py --steps 60
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from phantomgrad import Anderson, NeumannPhantom, attach


class Cell(nn.Module):
    """Adds the input to the state, since a stage has no second argument."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        # A residual stage adds what it is given to its result, so with all of z it would add up and never settle. With
        # 0.3 of it the solver took 8 steps in training, with 0.5 it took 10 to 15.
        return self.stage(0.3 * z + x)


class Stripes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        net = resnet18(weights=None)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.cell, self.head = Cell(net.layer1), nn.Linear(64, 4)
        # In training batch norm couples the samples, so they are one coupled state: batch_dim=None. Its running
        # statistics are updated once per call, not once per evaluation. They lag behind the weights, which early in
        # training makes evaluation the harder solve: hence its own solver. A residual of 1e-3 is enough for a class.
        self.equilibrium = attach(
            self.cell,
            NeumannPhantom(),
            solver=Anderson(rtol=1e-3),
            eval_solver=Anderson(rtol=1e-3, max_steps=100),
            batch_dim=None,
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return self.head(self.cell(torch.zeros_like(x), x).mean(dim=(2, 3)))


def pictures(count: int, size: int = 24) -> tuple[Tensor, Tensor]:
    """Noisy stripes of random width and phase, shape (count, 3, size, size), and their direction in 45 degrees."""
    labels, place = torch.randint(4, (count,)), torch.arange(size).float()
    angle, phase = (labels * torch.pi / 4).view(-1, 1, 1), 2 * torch.pi * torch.rand(count, 1, 1)
    along = angle.cos() * place + angle.sin() * place.unsqueeze(1)
    stripes = torch.sin((0.4 + 0.3 * torch.rand(count, 1, 1)) * along + phase)
    return stripes.unsqueeze(1) + 3 * torch.randn(count, 3, size, size), labels


def main(steps: int = 60) -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    model, (tests, answers) = Stripes(), pictures(200)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def evaluate() -> tuple[float, float]:
        with torch.no_grad():
            scores = model.eval()(tests)
        return cross_entropy(scores, answers).item(), (scores.argmax(-1) == answers).float().mean().item()

    before, _ = evaluate()
    for _ in range(steps):
        images, labels = pictures(16)
        optimizer.zero_grad()
        cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
    after, accuracy = evaluate()
    print(f"loss on unseen pictures: {before:.3f}, after {steps} training steps {after:.3f}; {accuracy:.1%} are right")
    print(model.equilibrium.solution)
    return model, {"before": before, "after": after, "accuracy": accuracy}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))
