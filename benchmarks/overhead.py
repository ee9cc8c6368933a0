"""What attaching costs beside a hand-written loop: `python -m benchmarks.overhead`.

The loop does the same bookkeeping: it measures the relative residual of every sample at every step, keeps the best iterate
and freezes what has converged. Both run the same number of steps on the same weights, in turn, so that what else the machine does
hits them alike. Prints the ratios and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from phantomgrad import FixedPointIteration, NeumannPhantom, UnrolledPhantom, attach

RESULTS = Path(__file__).parent / "results"
STEPS = 50


class Cell(nn.Module):
    """`tanh(linear(z) + x)`, scaled so that it does not settle within the steps measured."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


@torch.no_grad()
def solve_by_hand(cell: Cell, z: Tensor, x: Tensor, rtol: float = 0.0, atol: float = 0.0) -> tuple[Tensor, Tensor]:
    """The best iterate of every sample and its image, by plain iteration with the same bookkeeping as the library's."""
    best_point = best_image = z
    best = torch.full((len(z),), torch.inf)
    converged = torch.zeros(len(z), dtype=torch.bool)
    steps = torch.zeros(len(z), dtype=torch.int64)
    for step in range(1, STEPS + 1):
        fz = cell(z, x)
        gap, scale = torch.linalg.vector_norm(fz - z, dim=1), torch.linalg.vector_norm(fz, dim=1)
        residual = gap / scale.clamp_min(1e-30)
        stopped = converged
        finite = torch.isfinite(gap + scale)
        converged = converged | ((gap <= atol + rtol * scale) & finite)
        steps = torch.where(stopped, steps, step)
        improved = (residual <= best) & finite & ~stopped
        flags = torch.stack((converged.all(), improved.all(), (~converged).all(), finite.all()))
        all_converged, all_improved, none_converged, _ = flags.tolist()
        if all_improved:
            best_point, best_image, best = z, fz, residual
        else:
            best_point = torch.where(improved[:, None], z, best_point)
            best_image = torch.where(improved[:, None], fz, best_image)
            best = torch.where(improved, residual, best)
        if all_converged:
            break
        z = fz if none_converged else torch.where(converged[:, None], best_point, fz)
    return best_point, best_image


def by_hand_unrolled(cell: Cell, z0: Tensor, x: Tensor, steps: int, damping: float) -> Tensor:
    """The unrolled phantom gradient as one writes it: damped steps from the detached solution."""
    _, h = solve_by_hand(cell, z0, x)
    for _ in range(steps):
        h = torch.lerp(h, cell(h, x), damping)
    return h


def by_hand_neumann(cell: Cell, z0: Tensor, x: Tensor, steps: int, damping: float) -> Tensor:
    """The Neumann phantom gradient as the authors' code does it: a hook on the output of one recorded evaluation."""
    point, _ = solve_by_hand(cell, z0, x)
    point = point.requires_grad_()
    image = cell(point, x)
    result = image.clone()

    def series(g: Tensor) -> Tensor:
        term = total = damping * g
        for _ in range(steps - 1):
            product = torch.autograd.grad(image, point, term, retain_graph=True)[0]
            term = torch.lerp(term, product, damping)
            total = total + term
        return total

    result.register_hook(series)
    return result


def measure(run: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """Median seconds of forward and of backward of a batch of calls."""
    forward, backward = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        z = run()
        middle = time.perf_counter()
        z.square().sum().backward()
        forward.append(middle - begin)
        backward.append(time.perf_counter() - middle)
    return statistics.median(forward), statistics.median(backward)


def compare(size: int, batch: int, repeats: int, rounds: int) -> dict[str, float]:
    """The library's time over the hand-written loop's, the median over `rounds` of interleaved runs."""
    torch.manual_seed(0)
    hand, ours = Cell(size), Cell(size)
    ours.load_state_dict(hand.state_dict())
    solver = FixedPointIteration(max_steps=STEPS, rtol=0.0, atol=0.0)
    attachment = attach(ours, solver=solver, on_failure="ignore")
    x, z0 = torch.randn(batch, size), torch.zeros(batch, size)
    pairs: dict[str, tuple[Callable[[], Tensor], UnrolledPhantom | NeumannPhantom]] = {
        "UPG k=5": (lambda: by_hand_unrolled(hand, z0, x, 5, 0.5), UnrolledPhantom()),
        "NPG k=5": (lambda: by_hand_neumann(hand, z0.clone(), x, 5, 0.5), NeumannPhantom(safeguard=False)),
    }
    ratios: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name, (by_hand, gradient) in pairs.items():
            attachment.gradient = gradient
            theirs = measure(by_hand, repeats)
            own = measure(lambda: ours(z0, x), repeats)
            if turn:  # the first round warms up
                for part, mine, other in zip(("forward", "backward"), own, theirs, strict=True):
                    ratios.setdefault(f"{name}, {part}", []).append(mine / other)
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        f"Linear({size}) + tanh, batch {batch}, {STEPS} steps": compare(size, batch, options.repeats, options.rounds)
        for size, batch in ((256, 64), (8, 32))
    }
    for name, ratios in rows.items():
        print(name)
        for part, ratio in ratios.items():
            print(f"  {part:<20} {ratio:.2f} of the hand-written loop")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    content = {"command": "python -m benchmarks.overhead", "torch": torch.__version__, "machine": machine}
    options.out.write_text(json.dumps({**content, "ratios": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
