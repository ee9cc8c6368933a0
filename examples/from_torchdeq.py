"""An equilibrium model written for torchdeq, which tells two spirals apart; one word switches it to phantomgrad.

    python examples/from_torchdeq.py                 # torchdeq's own core
    python examples/from_torchdeq.py --core phantom  # ours

Needs `pip install 'phantomgrad[torchdeq]'`. Only the import of phantomgrad and the line below it are not torchdeq's.
"""

from __future__ import annotations

import argparse
import math

import torch
import torchdeq
from torch import Tensor, nn

import phantomgrad.torchdeq

phantomgrad.torchdeq.register()


class Cell(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.recurrent, self.inputs = nn.Linear(width, width), nn.Linear(2, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + self.inputs(x))


class Classifier(nn.Module):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.cell, self.head = Cell(args.width), nn.Linear(args.width, 2)
        torchdeq.apply_norm(self.cell, filter_out="inputs", args=args)
        self.deq = torchdeq.get_deq(args)

    def forward(self, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        torchdeq.reset_deq(self)
        states, info = self.deq(lambda z: self.cell(z, x), x.new_zeros(len(x), self.head.in_features))
        return [self.head(z) for z in states], info


def spirals(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 2
    turn = torch.rand(count) * 1.5 * math.pi
    angle = turn + math.pi * labels
    points = torch.stack((angle.cos(), angle.sin()), dim=1) * (0.2 + turn / 4).unsqueeze(1)
    return points + 0.02 * torch.randn(count, 2), labels


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser()
    torchdeq.add_deq_args(parser)
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=16)
    parser.set_defaults(f_solver="anderson", f_max_iter=40, f_tol=1e-2, grad=[5], tau=0.5, n_states=2)
    parser.set_defaults(norm_type="spectral_norm", norm_no_scale=True, norm_target_norm=0.9)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model, losses = Classifier(args), []
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    for step in range(args.steps):
        x, labels = spirals(64)
        logits, info = model(x)
        loss = torchdeq.fp_correction(nn.functional.cross_entropy, (logits, labels), gamma=args.gamma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 20 == 19:
            print(f"step {step + 1}: loss {losses[-1]:.3f}, residual {info['rel_lowest'].mean().item():.1e}")
    return losses


if __name__ == "__main__":
    main()
