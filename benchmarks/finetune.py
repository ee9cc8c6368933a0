"""Fine-tunes a checkpoint on a folder of photos, and trains a network like it from scratch: `python -m benchmarks.finetune DATA`.

`DATA` is a dataset as `phantomgrad train --data` takes it, of other classes than the checkpoint's; the folder gets the first
photos of each class. The trainings are the command line's, with one thread: fine-tuning by the recipe `finetune`, and from
scratch by `tiny_imagenet` with its own learning rate, for as many epochs and for twice as many. `phantomgrad evaluate` then
measures each best checkpoint. Prints the commands and what they print, and writes accuracies and minutes as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from phantomgrad_hub.data import ImageSplit, open_source
from phantomgrad_hub.train import finetune, tiny_imagenet

RESULTS = Path(__file__).parent / "results"
SAME = ("epochs", "batch_size", "ema_decay", "validate_every", "log_every")
"""Settings of the fine-tuning that hold from scratch too."""


def write_photos(split: ImageSplit, names: list[str], folder: Path, per_class: int) -> int:
    """The first `per_class` photos of each class as PNG files, one subfolder a class; how many there are."""
    written: Counter[int] = Counter()
    for index, target in enumerate(split.targets):
        if written[target] == per_class:
            continue
        file = folder / names[target] / f"{written[target]:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        split.image(index).save(file)
        written[target] += 1
    return written.total()


def run(*arguments: str) -> tuple[str, float, float]:
    """What the command prints, and the minutes it took: of the clock and of one core."""
    print("$ phantomgrad", shlex.join(arguments), flush=True)
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "phantomgrad_hub.cli.main", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        sys.exit(done.stderr)
    after = os.times()
    print(done.stdout, flush=True)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, (time.perf_counter() - start) / 60, cpu / 60


def train_and_evaluate(name: str, folder: Path, photos: Path, arguments: list[str]) -> dict[str, Any]:
    out = folder / name
    common = ["--data", str(photos), "--out", str(out), "--device", "cpu", "--no-progress"]
    _, minutes, core_minutes = run("train", *arguments, *common)
    run("evaluate", str(out / "best"), "--data", str(photos), "--device", "cpu", "--no-progress")
    text, _, _ = run("evaluate", str(out / "best"), "--data", str(photos), "--device", "cpu", "--no-progress", "--json")
    found = json.loads(text)
    figures = {
        key: found[key] for key in ("count", "top1", "top5", "steps_mean", "residual_median", "accuracy_by_steps")
    }
    return {"name": name, "arguments": arguments, "minutes": minutes, "core_minutes": core_minutes, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a dataset as `phantomgrad train --data` takes it")
    parser.add_argument("--init", default="embedded", help="the checkpoint to fine-tune (embedded)")
    parser.add_argument("--train", type=int, default=100, help="training photos of each class (100)")
    parser.add_argument("--val", type=int, default=50, help="validation photos of each class (50)")
    parser.add_argument("--set", action="append", default=[], help="a setting of both trainings")
    parser.add_argument("--folder", type=Path, help="where photos and runs are kept; else they are deleted")
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune.json")
    options = parser.parse_args()

    recipe, scratch = finetune(), tiny_imagenet()
    shared = [f"--set={setting}" for setting in options.set]
    same = [f"--set={field}={getattr(recipe, field)}" for field in SAME]
    own = [*same, "--set=solver_schedule=()", "--set=validation_images=None"]
    trainings = {
        "fine-tuned": ["finetune", "--init", options.init, *shared],
        "from scratch": ["tiny_imagenet", *own, *shared],
        "from scratch, twice as long": ["tiny_imagenet", *own, f"--set=epochs={2 * recipe.epochs}", *shared],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        photos, source = folder / "photos", open_source(options.data)
        names = [label.name for label in source.labels]
        counts = {
            name: write_photos(split, names, photos / name, per_class)
            for name, split, per_class in (
                ("train", source.train, options.train),
                ("val", source.validation, options.val),
            )
        }
        rows = [
            train_and_evaluate(name.replace(", ", "-").replace(" ", "-"), folder, photos, arguments) | {"name": name}
            for name, arguments in trainings.items()
        ]
        started = json.loads((folder / "fine-tuned" / "environment.json").read_text(encoding="utf-8"))["sessions"][0]
        machine = f"{started['device']}, {started['threads']} thread"
    for row in rows:
        minutes = f"{row['core_minutes']:.1f} minutes of one core, {row['minutes']:.1f} by the clock"
        print(f"{row['name']}: top-1 {row['top1']:.1%}, {minutes}")
    content = {
        "command": f"python -m benchmarks.finetune DATA --train {options.train} --val {options.val}",
        "init": options.init,
        "torch": torch.__version__,
        "machine": machine,
        "classes": names,
        "photos": counts,
        "learning_rates": {"fine-tuned": recipe.optimizer.lr, "from scratch": scratch.optimizer.lr},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
