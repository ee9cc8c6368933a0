"""What it saves that converged photos leave the batch: `python -m benchmarks.compaction --data FOLDER`.

The checkpoint classifies validation photos in batches, each once with its block attached as it is, which names the inputs that
carry the batch, and once attached without; in turn, so that what else the machine does hits both alike. Prints photos a second
and the ratio of the two, medians over the batches, with block evaluations a photo, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phantomgrad import Anderson, FixedPointIteration, NotConvergedWarning, Solver, attach, attachments
from phantomgrad_hub import MDEQ
from phantomgrad_hub.data import open_source

RESULTS = Path(__file__).parent / "results"
SOLVERS: dict[str, Solver] = {
    "Anderson": Anderson(max_steps=32, rtol=1e-3),
    "damped iteration": FixedPointIteration(damping=0.7, max_steps=32, rtol=1e-3),
}
VARIANTS: dict[str, tuple[str, ...] | None] = {"whole batch": None, "dropped": ("injection", "masks")}


def measure(model: MDEQ, images: Tensor, batch: int, solver: Solver) -> dict[str, Any]:
    """Seconds of each batch, evaluations a photo and the largest difference in a logit."""
    found: dict[str, Any] = {name: {"seconds": [], "evaluations": 0} for name in VARIANTS}
    found["largest_difference"] = 0.0
    for number, start in enumerate(range(0, len(images), batch)):
        part, logits = images[start : start + batch], {}
        order = list(VARIANTS) if number % 2 else list(reversed(VARIANTS))
        for name in order:
            [attachment] = attachments(model.block)
            attachment.remove()
            attach(model.block, solver=solver, batched_inputs=VARIANTS[name])
            rows: list[int] = []
            hook = model.block.branches[0][0].conv1.register_forward_pre_hook(
                lambda _, x, rows=rows: rows.append(len(x[0]))
            )
            begin = time.perf_counter()
            with torch.inference_mode():
                logits[name] = model(part)
            found[name]["seconds"].append(time.perf_counter() - begin)
            found[name]["evaluations"] += sum(rows)
            hook.remove()
        difference = (logits["dropped"] - logits["whole batch"]).abs().max().item()
        found["largest_difference"] = max(found["largest_difference"], difference)
        print(f"\r{start + len(part)} of {len(images)} photos", end="", flush=True)
    print("\r" + " " * 40, end="\r")
    for name in VARIANTS:
        row = found[name]
        row["photos_per_second"] = min(batch, len(images)) / statistics.median(row["seconds"])
        row["evaluations"] /= len(images)
    ratios = [whole / dropped for whole, dropped in zip(*(found[name]["seconds"] for name in VARIANTS), strict=True)]
    found["speedup"] = statistics.median(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="photos")
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rtol", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=RESULTS / "compaction.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", NotConvergedWarning)

    model = MDEQ.from_pretrained(options.checkpoint)
    validation = open_source(options.data).validation
    images = torch.cat([model.preprocess(validation.image(index)) for index in range(options.photos)])
    with torch.inference_mode():
        model(images[: options.batch])  # warm up
    rows = {}
    for name, solver in SOLVERS.items():
        row = rows[name] = measure(model, images, options.batch, replace(solver, rtol=options.rtol))
        for variant in VARIANTS:
            found = row[variant]
            print(
                f"{name:<18}{variant:<13}{found['photos_per_second']:>8.1f} photos/s"
                f"{found['evaluations']:>7.1f} evaluations a photo"
            )
        print(f"{'':<18}{row['speedup']:.2f} times as fast", flush=True)
    content = {
        "command": "python -m benchmarks.compaction --data FOLDER",
        "torch": torch.__version__,
        "settings": {
            "checkpoint": options.checkpoint,
            "photos": options.photos,
            "batch": options.batch,
            "rtol": options.rtol,
        },
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "solvers": rows,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
