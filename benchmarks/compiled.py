"""The fastest that each library does on a CPU: a compiled cell in bfloat16, `python -m benchmarks.compiled`.

On the block of MDEQ-Small at 64 pixels: torchdeq as its users run it today (eager, float32), torchdeq driving the cell that
`torch.compile` made, in bfloat16 by autocast and channels last, and this library with the same cell; all with the same 26
evaluations and 5 of the phantom gradient. One process, run by run in turn. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import STEPS, Contestant, matrix_rate, ours, torchdeq, training_step
from benchmarks.workloads import WORKLOADS, Workload
from phantomgrad import FixedPointIteration, Gradient, NeumannPhantom, NotConvergedWarning, UnrolledPhantom, attach

RESULTS = Path(__file__).parent / "results"
BASE = "torchdeq, phantom, eager float32"
SAME_CELL = "torchdeq, phantom, compiled bfloat16"


def fast(work: Workload) -> Workload:
    """A copy of the workload with everything channels last."""
    cell = copy.deepcopy(work.cell).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = work.x.detach().to(memory_format=torch.channels_last).requires_grad_()
    start = tuple(leaf.to(memory_format=torch.channels_last) for leaf in work.start)
    made = Workload(f"{work.name}-fast", cell, x, start, work.steps, work.damping)
    made.share_loss(work)
    return made


def torchdeq_compiled(work: Workload) -> Contestant:
    """torchdeq driving the cell that `torch.compile` made."""
    compiled: Any = torch.compile(work.cell)
    work.step = lambda state: compiled(state, work.x)  # type: ignore[method-assign]
    return torchdeq(work, grad=STEPS)


def ours_compiled(work: Workload, gradient: Gradient) -> Contestant:
    """This library attached to the cell with `compile=True`."""
    solver = FixedPointIteration(max_steps=work.steps, rtol=0.0, atol=0.0, damping=work.damping)
    attach(work.cell, gradient, solver=solver, on_failure="ignore", compile=True)
    return lambda: work.cell(work.start, work.x)


def entrants(work: Workload) -> dict[str, tuple[Workload, Contestant, bool]]:
    """Workload, solve and whether it runs in bfloat16, by name."""
    upg, npg = (kind(steps=STEPS, damping=work.damping) for kind in (UnrolledPhantom, NeumannPhantom))
    theirs, first, second = fast(work), fast(work), fast(work)
    return {
        BASE: (work, torchdeq(work, grad=STEPS), False),
        SAME_CELL: (theirs, torchdeq_compiled(theirs), True),
        "ours, UPG, eager float32": (work, ours(work, upg), False),
        "ours, NPG, eager float32": (work, ours(work, npg), False),
        "ours, UPG, compiled bfloat16": (first, ours_compiled(first, upg), True),
        "ours, NPG, compiled bfloat16": (second, ours_compiled(second, npg), True),
    }


def compare(work: Workload, rounds: int) -> list[dict[str, Any]]:
    """Median seconds of each entrant, its ratios to torchdeq's, and the cosine of its gradient with that of `BASE`."""
    found = entrants(work)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
    for done in range(rounds + 2):
        for name, (used, solve, low) in found.items():
            with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
                result = training_step(used, solve)
            if done >= 2:  # the first ones compile
                runs[name].append(result)
            print(f"\r{done + 1} of {rounds + 2}: {name:<60}", end="", flush=True)
    print("\r" + " " * 80, end="\r")
    reference = runs[BASE][-1]["grads"].double()
    rows = []
    for name, results in runs.items():
        cosine = torch.nn.functional.cosine_similarity(results[-1]["grads"].double(), reference, dim=0).item()
        row: dict[str, Any] = {"name": name, "cosine": cosine}
        for key in ("forward", "backward", "step"):
            seconds = sorted(result[key] for result in results)
            row[f"{key}_s"], row[f"{key}_range_s"] = statistics.median(seconds), [seconds[0], seconds[-1]]
        rows.append(row)
    steps = {row["name"]: row["step_s"] for row in rows}
    for row in rows:
        row["of_eager"], row["of_same_cell"] = row["step_s"] / steps[BASE], row["step_s"] / steps[SAME_CELL]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "compiled.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", NotConvergedWarning)
    torch.manual_seed(0)
    work = WORKLOADS["mdeq-small-64"]("mdeq-small-64")
    rates = [matrix_rate()]
    rows = compare(work, options.rounds)
    rates.append(matrix_rate())
    print(f"{'':<40}{'forward s':>11}{'backward s':>11}{'step s':>9}{'of eager':>10}{'of same cell':>14}{'cosine':>8}")
    for row in rows:
        print(
            f"{row['name']:<40}{row['forward_s']:>11.3f}{row['backward_s']:>11.3f}{row['step_s']:>9.3f}{row['of_eager']:>10.2f}"
            f"{row['of_same_cell']:>14.2f}{row['cosine']:>8.3f}"
        )
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
    }
    content = {"command": "python -m benchmarks.compiled", "rounds": options.rounds, "torch": torch.__version__}
    content |= {"machine": machine, "matrix_rate": max(rates), "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
