"""What the safeguard of `NeumannPhantom` is worth on random blocks: `python -m benchmarks.safeguard`.

Dense Gaussian Jacobians, which are far from normal, scaled to spectral radii between 0.3 and 1.5, and a random cotangent
each, in float64. Each adjoint is compared with the exact one. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from phantomgrad._samples import Samples
from phantomgrad._state import Leaves
from phantomgrad.gradients._krylov import minimal_residual
from phantomgrad.gradients._neumann import guarded_neumann_series, neumann_series

RESULTS = Path(__file__).parent / "results"


def adjoints(J: Tensor, g: Tensor, steps: int, damping: float) -> dict[str, Tensor]:
    """What each gradient takes for `(I - J)^-T g`."""
    samples = Samples((g,), 0)

    def vjp(v: Leaves) -> Leaves:
        return (v[0] @ J,)

    return {
        "one step": g,
        "NPG, plain": neumann_series(vjp, (g,), steps=steps, damping=damping, samples=samples)[0],
        "NPG, guarded": guarded_neumann_series(vjp, (g,), steps=steps, damping=damping, samples=samples)[0],
        "Krylov": minimal_residual(vjp, (g,), steps=steps, samples=samples)[0],
    }


def measure(blocks: int, size: int, steps: int, damping: float) -> list[dict[str, Any]]:
    """One row a gradient and side of `rho(B) = 1`."""
    generator = torch.Generator().manual_seed(0)
    identity = torch.eye(size, dtype=torch.float64)
    found: dict[bool, list[dict[str, tuple[float, float]]]] = {False: [], True: []}
    for _ in range(blocks):
        J = torch.randn(size, size, dtype=torch.float64, generator=generator)
        J *= (0.3 + 1.2 * torch.rand((), generator=generator)) / torch.linalg.eigvals(J).abs().max()
        g = torch.randn(1, size, dtype=torch.float64, generator=generator)
        exact = torch.linalg.solve((identity - J).T, g.T).T
        expands = bool(torch.linalg.eigvals(damping * J + (1 - damping) * identity).abs().max() > 1)
        found[expands].append(
            {
                name: (functional.cosine_similarity(v, exact).item(), ((v - exact).norm() / exact.norm()).item())
                for name, v in adjoints(J, g, steps, damping).items()
            }
        )
    rows = []
    for expands, cases in found.items():
        for name in cases[0]:
            cosines, errors = zip(*(case[name] for case in cases), strict=True)
            worse = sum(case[name][1] > case["one step"][1] + 1e-12 for case in cases)
            row = {"damping": damping, "expands": expands, "blocks": len(cases), "gradient": name}
            row |= {"cosine": statistics.mean(cosines), "median_error": statistics.median(errors)}
            rows.append({**row, "worse_than_one_step": worse / len(cases)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "safeguard.json")
    options = parser.parse_args()
    rows = [row for damping in (0.5, 1.0) for row in measure(options.blocks, options.size, options.steps, damping)]
    print(
        f"{'damping':>7} {'rho(B)':>6} {'blocks':>6}  {'gradient':<14}{'cosine':>8}{'median error':>14}{'worse than g':>14}"
    )
    for row in rows:
        print(
            f"{row['damping']:>7g} {'> 1' if row['expands'] else '< 1':>6} {row['blocks']:>6}  {row['gradient']:<14}"
            f"{row['cosine']:>8.3f}{row['median_error']:>14.3f}{row['worse_than_one_step']:>14.1%}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"blocks": options.blocks, "size": options.size, "steps": options.steps}
    content = {"command": "python -m benchmarks.safeguard", "settings": settings, "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
