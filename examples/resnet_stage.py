"""The first stage of torchvision's ResNet-18 as an equilibrium, batch norm included.

It tells in which of four directions the stripes of a noisy picture run. (So small a task one plain stage learns too.)

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
        # A residual stage adds its input to its result: with all of z no solve of the first 15 training steps settled.
        return self.stage(0.3 * z + x)


class Stripes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        net = resnet18(weights=None)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.cell, self.head = Cell(net.layer1), nn.Linear(64, 4)
        # Batch norm couples the samples in training: batch_dim=None. Its running statistics are updated once per call. They
        # lag behind the weights, so early evaluation is the harder solve: hence an eval_solver with more steps.
        solver, patient = Anderson(rtol=1e-3), Anderson(rtol=1e-3, max_steps=100)
        self.equilibrium = attach(self.cell, NeumannPhantom(), solver=solver, eval_solver=patient, batch_dim=None)

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
    before = cross_entropy(model.eval()(tests), answers).item()
    for _ in range(steps):
        images, labels = pictures(16)
        optimizer.zero_grad()
        cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        scores = model.eval()(tests)
    after, accuracy = cross_entropy(scores, answers).item(), (scores.argmax(-1) == answers).float().mean().item()
    print(f"loss on unseen pictures: {before:.3f}, after {steps} training steps {after:.3f}; {accuracy:.1%} are right")
    print(model.equilibrium.solution)
    return model, {"before": before, "after": after, "accuracy": accuracy}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))
