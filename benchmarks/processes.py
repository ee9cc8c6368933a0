"""Images per second in one process and in two, copied (DDP) and sharded (FSDP2): `python -m benchmarks.processes`.

Every run trains a narrow MDEQ-Tiny on noise through `phantomgrad train`, each process on one thread, and its speed is what
`metrics.jsonl` says after a warm-up. The runs take turns. That a run had the processes it was asked to have is read from its
`environment.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

RESULTS = Path(__file__).parent / "results"
SETTINGS = (
    "batch_size=32",
    "workers=0",
    "trackers=()",
    "log_every=2",
    "epochs=1",
    "validation_images=8",
    "ema_decay=0.9",
)
KINDS = {"one process": (1, False), "two, copied": (2, False), "two, sharded": (2, True)}


def write_photos(folder: Path, count: int) -> None:
    """Noise of 32 pixels in two classes."""
    pixels = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 8)):
        for kind in ("a", "b"):
            (folder / split / kind).mkdir(parents=True)
            for index in range(images // 2):
                values = pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(values).save(folder / split / kind / f"{index:04}.png")


def images_per_second(data: Path, out: Path, processes: int, shard: bool) -> float:
    """The median over the records of a run, but for the first."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command = [*launch, "phantomgrad_hub.cli.main", "train", "cifar10_tiny", "--data", str(data), "--out", str(out)]
    command += ["--device", "cpu", "--no-progress"]
    for setting in (*SETTINGS, f"shard={shard}"):
        command += ["--set", setting]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    sessions = json.loads((out / "environment.json").read_text(encoding="utf-8"))["sessions"]
    if [session["processes"] for session in sessions] != [processes]:
        sys.exit(f"The run had {sessions[0]['processes']} processes and not {processes}.")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median([record["images_per_s"] for record in records if record["type"] == "train"][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=RESULTS / "processes.json")
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "photos"
        write_photos(data, options.images)
        for turn in range(options.rounds):
            for name, (processes, shard) in KINDS.items():
                found[name].append(images_per_second(data, Path(scratch) / f"{name}-{turn}", processes, shard))
    single = statistics.median(found["one process"])
    rows = {
        name: {
            "images_per_s": statistics.median(speeds),
            "of_one_process": statistics.median(speeds) / single,
            "all": speeds,
        }
        for name, speeds in found.items()
    }
    for name, row in rows.items():
        print(f"{name:<14}{row['images_per_s']:>8.1f} images/s{row['of_one_process']:>7.2f} of one process")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": "python -m benchmarks.processes", "torch": torch.__version__, "cores": os.cpu_count()}
    options.out.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
