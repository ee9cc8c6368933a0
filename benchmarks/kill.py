"""Kills a training with SIGKILL at random moments and resumes it: `python -m benchmarks.kill`.

A small MDEQ with dropout and augmentation is trained on the CPU once without interruption, then again and again with one to
three kills at random moments, each followed by the same command. The final weights must be those of the first run, bit by
bit. Prints one line a trial, then how many runs were lost and how many differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import load_file

RESULTS = Path(__file__).parent / "results"
SETTINGS = (
    "model.channels=(8,8)", "model.head_channels=(2,4)", "model.final_channels=16", "model.image_size=16",
    "model.solver.max_steps=4", "model.gradient.steps=2", "epochs=30", "batch_size=8", "workers=0", "ema_decay=0.9",
    "augmentation.rand_augment=9", "augmentation.mixup=0.2", "checkpoint_minutes=0.005", "trackers=()", "log_every=1",
)  # fmt: skip


def write_photos(folder: Path) -> None:
    """Coloured noise, 96 images to train on and 16 to validate with."""
    pixels = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 8)):
        for kind in ("dark", "light"):
            (folder / split / kind).mkdir(parents=True)
            for index in range(count):
                values = pixels.integers(0, 128, (16, 16, 3)) + (0 if kind == "dark" else 100)
                Image.fromarray(values.astype(np.uint8)).save(folder / split / kind / f"{index:03}.png")


def start(data: Path, out: Path, processes: int) -> subprocess.Popen[bytes]:
    """The training, in so many processes."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    command = [*launch, "phantomgrad_hub.cli.main", "train", "cifar10_tiny", "--data", str(data), "--out", str(out)]
    command += ["--device", "cpu", "--no-progress"]
    for setting in SETTINGS:
        command += ["--set", setting]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=subprocess.PIPE, env=environment)


def finish(data: Path, out: Path, processes: int) -> str:
    """Run the command to its end; the last line of its errors where it fails."""
    process = start(data, out, processes)
    errors = process.communicate()[1].decode(errors="replace").strip().splitlines()
    return "" if process.returncode == 0 else (errors or ["no message"])[-1]


def kill_at(data: Path, out: Path, processes: int, seconds: float) -> bool:
    """Start, and kill after `seconds`; whether it was still running."""
    process = start(data, out, processes)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # The processes of a launch are in sessions of their own.
        for victim in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        process.communicate()
        return True
    return False


def step_of(out: Path) -> int:
    """The optimizer step of the last line logged."""
    log = out / "metrics.jsonl"
    try:
        return int(json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError):
        return 0


def check_processes(out: Path, processes: int) -> None:
    """Exit unless every session of the run had so many processes."""
    sessions = json.loads((out / "environment.json").read_text(encoding="utf-8"))["sessions"]
    if any(session["processes"] != processes for session in sessions):
        sys.exit(f"{out.name} ran in {[session['processes'] for session in sessions]} processes, not in {processes}.")


def same(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "last" / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kill.json")
    options = parser.parse_args()
    chance, results = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "photos"
        write_photos(data)
        for processes in options.processes:
            whole = Path(scratch) / f"whole-{processes}"
            begin = time.perf_counter()
            if failed := finish(data, whole, processes):
                sys.exit(f"The run that nothing interrupts failed: {failed}")
            check_processes(whole, processes)
            duration, lost, different, kills = time.perf_counter() - begin, 0, 0, 0
            for trial in range(options.trials):
                out = Path(scratch) / f"{processes}-{trial}"
                steps = []
                for _ in range(chance.randint(1, 3)):
                    if kill_at(data, out, processes, chance.uniform(0.2, 1.0) * duration):
                        kills += 1
                        steps.append(step_of(out))
                failed = finish(data, out, processes)
                if not failed:
                    check_processes(out, processes)
                equal = not failed and same(whole, out)
                lost, different = lost + bool(failed), different + (not failed and not equal)
                outcome = f"lost: {failed}" if failed else "equal" if equal else "DIFFERENT"
                print(f"{processes} processes, trial {trial + 1}: killed at steps {steps}: {outcome}", flush=True)
            row = {
                "processes": processes,
                "trials": options.trials,
                "kills": kills,
                "lost": lost,
                "different": different,
            }
            print(row, flush=True)
            results.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": "python -m benchmarks.kill", "torch": torch.__version__, "rows": results}
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
