"""What an exported checkpoint costs and keeps: accuracy by steps, size, time to export, and time per photo.

python -m benchmarks.export --data tiny-imagenet
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from phantomgrad import NotConvergedWarning, attachments
from phantomgrad_hub import MDEQ
from phantomgrad_hub.data import open_source
from phantomgrad_hub.evaluate import match_classes
from phantomgrad_hub.export import default_solver, export

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 16)
ROUNDS = 30
CHUNK = 50


def load_images(model: MDEQ, data: str, most: int) -> tuple[Tensor, Tensor]:
    """At most `most` validation images, spread evenly, as the model sees them, and their classes."""
    source = open_source(data)
    chosen = range(0, len(source.validation), -(-len(source.validation) // most))
    classes = torch.tensor(match_classes(model.classes, source.labels))
    images = torch.cat([model.preprocess(source.validation.image(index)) for index in chosen])
    return images, classes[torch.tensor(source.validation.targets)[list(chosen)]]


def predicted(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The best class of every image."""
    return torch.cat([run(chunk).argmax(1) for chunk in images.split(CHUNK)])


def milliseconds(runs: dict[str, Callable[[Tensor], Tensor]], images: Tensor) -> dict[str, dict[str, float]]:
    """Shortest time per photo of each run, by batch size; the runs take turns, so that other work meets all of them."""
    found: dict[str, dict[str, float]] = {name: {} for name in runs}
    for batch in BATCHES:
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(ROUNDS):
            chunk = images[turn * batch : (turn + 1) * batch]
            for name, run in runs.items():
                start = time.perf_counter()
                run(chunk)
                times[name].append(time.perf_counter() - start)
        for name, each in times.items():
            found[name][str(batch)] = 1e3 * min(each) / batch
    return found


def exported(model: MDEQ, path: Path) -> dict[str, Any]:
    """Export with the default steps, and what it took."""
    start = time.perf_counter()
    made = export(model, path)
    return {
        "steps": made.steps,
        "bytes": made.size,
        "seconds": time.perf_counter() - start,
        "difference": made.difference,
    }


def onnx_run(path: Path) -> Callable[[Tensor], Tensor]:
    """The file in onnxruntime, with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def accuracies(model: MDEQ, images: Tensor, targets: Tensor, steps: list[int]) -> dict[str, Any]:
    """Top-1 accuracy of the model's own solver and of exports by steps, and how often both name the same class."""
    own = predicted(model, images)
    own_top1 = float((own == targets).float().mean())
    print(f"own solver    top-1 {own_top1:.2%} of {len(images)}", flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in steps:
            path = Path(folder) / f"{count}.onnx"
            export(model, path, steps=count)
            best = predicted(onnx_run(path), images)
            same, right = float((best == own).float().mean()), float((best == targets).float().mean())
            row = {"steps": count, "top1": right, "same_class": same}
            rows.append(row)
            print(f"{count:>2} steps      top-1 {right:.2%}, the same class {same:.2%}", flush=True)
    return {"images": len(images), "own_top1": own_top1, "by_steps": rows}


def times(model: MDEQ, images: Tensor) -> dict[str, Any]:
    """Size and time of both formats, exported with the default steps, beside the model's."""
    [attachment] = attachments(model.block)
    solver = default_solver(model)

    def fixed(chunk: Tensor) -> Tensor:
        with attachment.using(solver=solver):
            return model(chunk)

    with tempfile.TemporaryDirectory() as folder:
        onnx, pt2 = Path(folder) / "model.onnx", Path(folder) / "model.pt2"
        made = {"onnx": exported(model, onnx), "pt2": exported(model, pt2)}
        program = torch.export.load(pt2).module()
        runs = {
            "onnxruntime": onnx_run(onnx),
            "pt2": program,
            "model, as many steps": fixed,
            "model, own solver": model,
        }
        found = milliseconds(runs, images)
    for name, each in found.items():
        print(f"{name:<22}" + "".join(f"{value:>8.1f} ms a photo at batch {batch}" for batch, value in each.items()))
    return {"default": made, "milliseconds_per_photo": found}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 8, 12, 16])
    parser.add_argument(
        "--part", choices=("accuracy", "time"), help="only this; the file keeps what it has of the other"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "export.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", NotConvergedWarning)
    model = MDEQ.from_pretrained(options.checkpoint)
    images, targets = load_images(model, options.data, options.images)
    content = json.loads(options.out.read_text(encoding="utf-8")) if options.part and options.out.exists() else {}
    content |= {
        "command": f"python -m benchmarks.export --checkpoint {options.checkpoint} --data FOLDER --images {options.images}",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }
    if options.part != "time":
        content |= accuracies(model, images, targets, options.steps)
    if options.part != "accuracy":
        content |= times(model, images)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
