"""What every gradient keeps for backward, and the most memory a training step takes: `python -m benchmarks.memory`.

On the block of MDEQ-Small: the Neumann gradient for several numbers of products and of solver steps, unrolled steps with and
without recomputation, torchdeq's phantom gradient. On a weight-tied transformer layer: the exact gradient against
backpropagation through 10, 50 and 200 steps. Every setting runs in a process of its own, since what a process has taken it
keeps: `saved` are the bytes of what the forward pass saved, weights included, `peak` is how far the process grew
in forward and backward, `seconds` the second of two steps. Prints both tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.peers import Contestant, ours, saved_mib, torchdeq, training_step
from benchmarks.workloads import WORKLOADS, Workload
from phantomgrad import Backprop, FixedPointIteration, Implicit, NeumannPhantom, NotConvergedWarning, UnrolledPhantom

RESULTS = Path(__file__).parent / "results"
BLOCK = [
    *(("mdeq-small-64", f"NPG k={k}", steps) for steps in (10, 26, 50) for k in (1, 5, 9)),
    ("mdeq-small-64", "UPG k=5", 26),
    ("mdeq-small-64", "UPG k=5, recomputed", 26),
    ("mdeq-small-64", "torchdeq, phantom k=5", 26),
]
EXACT = [("transformer", name, steps) for steps in (10, 50, 200) for name in ("exact", "backpropagation")]


def contestant(name: str, work: Workload) -> Contestant:
    """How the setting `name` solves with grad."""
    kind, _, products = name.partition(" k=")
    count, _, option = products.partition(", ")
    if kind == "torchdeq, phantom":
        return torchdeq(work, grad=int(count))
    solver = FixedPointIteration(max_steps=work.steps, rtol=0.0, atol=0.0, damping=work.damping)
    return ours(
        work,
        {
            "NPG": lambda: NeumannPhantom(steps=int(count), damping=work.damping),
            "UPG": lambda: UnrolledPhantom(steps=int(count), damping=work.damping, recompute=option == "recomputed"),
            "exact": lambda: Implicit(solver=solver),
            "backpropagation": lambda: Backprop(steps=work.steps),
        }[kind](),
    )


def measure(workload: str, name: str, steps: int) -> dict[str, float]:
    """In this process, which should have done nothing else."""
    torch.manual_seed(0)
    work = replace(WORKLOADS[workload](workload), steps=steps)
    solve = contestant(name, work)
    before = psutil.Process().memory_info().rss
    training_step(work, solve)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    seconds = training_step(work, solve)["step"]
    return {"saved_mib": saved_mib(solve), "peak_mib": peak / 2**20, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore", NotConvergedWarning)
        workload, name, steps = options.one
        print(json.dumps(measure(workload, name, int(steps))))
        return
    rows: list[dict[str, Any]] = []
    print(f"{'workload':<16}{'gradient':<24}{'steps':>6}{'saved MiB':>11}{'peak MiB':>10}{'seconds':>9}")
    for workload, name, steps in [*BLOCK, *EXACT]:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", workload, name, str(steps)]
        # One arena: with several, what a process takes depends on which thread asked.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"workload": workload, "gradient": name, "steps": steps, **found})
        print(
            f"{workload:<16}{name:<24}{steps:>6}{found['saved_mib']:>11.1f}{found['peak_mib']:>10.1f}{found['seconds']:>9.2f}",
            flush=True,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    content = {"command": "python -m benchmarks.memory", "torch": torch.__version__, "machine": machine}
    options.out.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
