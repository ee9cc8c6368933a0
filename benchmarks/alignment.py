"""How close each phantom gradient is to the exact one on a trained block: `python -m benchmarks.alignment --data FOLDER`.

The gradient of the cross entropy with respect to all weights of the block, batch by batch of labelled validation photos,
after the same solve to a small residual; the exact one solves the adjoint equation to a tolerance. Prints a table, and writes it
as JSON and as a picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from phantomgrad import (
    Anderson,
    Attachment,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    UnrolledPhantom,
    attachments,
)
from phantomgrad_hub import MDEQ
from phantomgrad_hub.data import open_source

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "alignment.svg"
STEPS = (1, 3, 5, 9)
DAMPINGS = (0.5, 1.0)
EXACT = Implicit(solver=Anderson(max_steps=200, rtol=1e-4))


def candidates() -> dict[str, dict[int, Gradient]]:
    """The gradients compared, by family and number of products."""
    table: dict[str, dict[int, Gradient]] = {}
    for steps, damping in itertools.product(STEPS, DAMPINGS):
        table.setdefault(f"UPG, damping {damping}", {})[steps] = UnrolledPhantom(steps=steps, damping=damping)
        table.setdefault(f"NPG, damping {damping}", {})[steps] = NeumannPhantom(steps=steps, damping=damping)
    table["Krylov"] = {steps: KrylovPhantom(steps=steps) for steps in STEPS}
    table["one step"] = {1: OneStep()}
    return table


def block_gradient(model: MDEQ, attachment: Attachment, gradient: Gradient, images: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the loss with respect to all weights of the block, as one vector."""
    model.zero_grad()
    with attachment.using(gradient=gradient):
        functional.cross_entropy(model(images), targets).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.block.parameters() if parameter.grad is not None])


def measure(
    model: MDEQ, images: Tensor, targets: Tensor, batch: int
) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Cosine with the exact gradient, and ratio of the norms, of every candidate on every batch."""
    [attachment] = attachments(model.block)
    attachment.solver = Anderson(max_steps=100, rtol=1e-5)
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for start in range(0, len(images), batch):
        part = images[start : start + batch], targets[start : start + batch]
        exact = block_gradient(model, attachment, EXACT, *part)
        for family, by_steps in candidates().items():
            for steps, gradient in by_steps.items():
                other = block_gradient(model, attachment, gradient, *part)
                pair = functional.cosine_similarity(other, exact, dim=0).item(), (other.norm() / exact.norm()).item()
                found.setdefault(family, {}).setdefault(steps, []).append(pair)
        print(f"\r{min(start + batch, len(images))} of {len(images)} photos", end="", flush=True)
    print("\r" + " " * 40, end="\r")
    return found


def summarise(found: dict[str, dict[int, list[tuple[float, float]]]]) -> list[dict[str, Any]]:
    """One row a family and number of products: mean and least cosine, mean ratio of norms."""
    rows = []
    for family, by_steps in found.items():
        for steps, pairs in by_steps.items():
            cosines, ratios = torch.tensor(pairs, dtype=torch.float64).T
            row = {"cosine": cosines.mean().item(), "least": cosines.min().item(), "norm_ratio": ratios.mean().item()}
            rows.append({"gradient": family, "steps": steps, **row})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Cosine against the number of products, one line a family."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "phantomgrad"
    from matplotlib import pyplot

    colours = ["#0072B2", "#0072B2", "#D55E00", "#D55E00", "#009E73", "#000000"]
    styles = ["--", "-", "--", "-", "-", "none"]
    markers = ["o", "o", "s", "s", "^", "*"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0))
    families = list(dict.fromkeys(row["gradient"] for row in rows))
    for family, colour, style, marker in zip(families, colours, styles, markers, strict=True):
        points = [(row["steps"], row["cosine"]) for row in rows if row["gradient"] == family]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker=marker, label=family)
    axes.set_xticks(STEPS)
    axes.set_xlabel("vector-Jacobian products in backward, k")
    axes.set_ylabel("cosine with the exact gradient")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="labelled photos of the checkpoint's classes")
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--photos", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "alignment.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()

    model = MDEQ.from_pretrained(options.checkpoint)
    validation = open_source(options.data).validation
    photos = [validation.image(index) for index in range(options.photos)]
    images = torch.cat([model.preprocess(photo) for photo in photos])
    rows = summarise(measure(model, images, torch.tensor(validation.targets[: options.photos]), options.batch))

    print(f"{'gradient':<20}{'k':>3}{'cosine':>9}{'least':>9}{'norm ratio':>12}")
    for row in rows:
        values = f"{row['cosine']:>9.4f}{row['least']:>9.4f}{row['norm_ratio']:>12.3f}"
        print(f"{row['gradient']:<20}{row['steps']:>3}{values}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"checkpoint": options.checkpoint, "photos": options.photos, "batch": options.batch}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    content = {"command": "python -m benchmarks.alignment --data FOLDER", "torch": torch.__version__}
    options.out.write_text(
        json.dumps({**content, "settings": settings, "machine": machine, "rows": rows}, indent=1) + "\n"
    )
    draw(rows, options.picture)


if __name__ == "__main__":
    main()
