"""The fastest that each library does: a compiled cell in bfloat16, `python -m benchmarks.compiled`.

On the block of MDEQ-Small at 64 pixels: torchdeq as its users run it today (eager, in float32 and by autocast), torchdeq driving
the cell that `torch.compile` made, in bfloat16 by autocast and channels last, and this library with the same cells; all with the
same 26 evaluations and 5 of the phantom gradient. What is not compiled is laid out plainly, which is faster for all. One process,
run by run in turn. Prints a table and writes JSON. With `--device cuda` also with CUDA graphs of the solve; `--workload` and
`--batch` take another block.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import STEPS, Contestant, flops, matrix_rate, ours, torchdeq, training_step
from benchmarks.workloads import WORKLOADS, Workload
from phantomgrad import FixedPointIteration, Gradient, NeumannPhantom, NotConvergedWarning, UnrolledPhantom, attach

RESULTS = Path(__file__).parent / "results"
BASE = "torchdeq, phantom, eager float32"
SAME_CELL = "torchdeq, phantom, compiled bfloat16"
BLOCKS = [name for name in WORKLOADS if name.startswith("mdeq")]


def copied(work: Workload, layout: torch.memory_format) -> Workload:
    """A copy of the workload with everything in this layout."""
    cell = copy.deepcopy(work.cell).to(memory_format=layout)  # type: ignore[call-overload]
    x = work.x.detach().to(memory_format=layout, copy=True).requires_grad_()
    start = tuple(leaf.to(memory_format=layout) for leaf in work.start)
    made = Workload(work.name, cell, x, start, work.steps, work.damping)
    made.share_loss(work)
    return made


def torchdeq_compiled(work: Workload) -> Contestant:
    """torchdeq driving the cell that `torch.compile` made."""
    compiled: Any = torch.compile(work.cell)
    work.step = lambda state: compiled(state, work.x)  # type: ignore[method-assign]
    return torchdeq(work, grad=STEPS)


def ours_compiled(work: Workload, gradient: Gradient, *, mode: bool | str = True) -> Contestant:
    """This library attached to the cell with `compile=`."""
    solver = FixedPointIteration(max_steps=work.steps, rtol=0.0, atol=0.0, damping=work.damping)
    attach(work.cell, gradient, solver=solver, on_failure="ignore", compile=mode)
    return lambda: work.cell(work.start, work.x)


def entrants(work: Workload) -> dict[str, tuple[Workload, Contestant, bool]]:
    """Workload, solve and whether it runs in bfloat16, by name."""
    upg, npg = (kind(steps=STEPS, damping=work.damping) for kind in (UnrolledPhantom, NeumannPhantom))

    def plain(make: Callable[..., Contestant], *args: Any, **options: Any) -> tuple[Workload, Contestant, bool]:
        own = copied(work, torch.contiguous_format)
        return own, make(own, *args, **options), True

    def last(make: Callable[..., Contestant], *args: Any, **options: Any) -> tuple[Workload, Contestant, bool]:
        own = copied(work, torch.channels_last)
        return own, make(own, *args, **options), True

    found = {
        BASE: (work, torchdeq(work, grad=STEPS), False),
        "torchdeq, phantom, eager bfloat16": plain(torchdeq, grad=STEPS),
        SAME_CELL: last(torchdeq_compiled),
        "ours, UPG, eager float32": (work, ours(work, upg), False),
        "ours, NPG, eager float32": (work, ours(work, npg), False),
        "ours, UPG, eager bfloat16": plain(ours, upg),
        "ours, NPG, eager bfloat16": plain(ours, npg),
        "ours, UPG, compiled bfloat16": last(ours_compiled, upg),
        "ours, NPG, compiled bfloat16": last(ours_compiled, npg),
    }
    if work.x.is_cuda:
        found["ours, UPG, CUDA graphs, bfloat16"] = last(ours_compiled, upg, mode="reduce-overhead")
        found["ours, NPG, CUDA graphs, bfloat16"] = last(ours_compiled, npg, mode="reduce-overhead")
    return found


def compare(work: Workload, rounds: int) -> list[dict[str, Any]]:
    """Median seconds of each entrant, its ratios to torchdeq's, and the cosine of its gradient with that of `BASE`."""
    found = entrants(work)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
    for done in range(rounds + 2):
        for name, (used, solve, low) in found.items():
            with torch.autocast(work.x.device.type, torch.bfloat16) if low else nullcontext():
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
    parser.add_argument("--workload", choices=BLOCKS, default=BLOCKS[0])
    parser.add_argument("--batch", type=int, help="samples; as in benchmarks.peers by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "compiled.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", NotConvergedWarning)
    torch.manual_seed(0)
    size = {} if options.batch is None else {"batch": options.batch}
    work = WORKLOADS[options.workload](options.workload, **size).to(options.device)
    low = torch.float32 if options.device == "cpu" else torch.bfloat16
    rates = [matrix_rate(device=options.device, dtype=low)]
    rows = compare(work, options.rounds)
    rates.append(matrix_rate(device=options.device, dtype=low))
    floor = work.steps * flops(work) / max(rates)
    print(
        f"{work.name}: batch {len(work.start[0])}, {work.steps} evaluations; floor of a solve {floor:.3g} s at "
        f"{max(rates) / 1e9:.0f} GFLOP/s of a product in {str(low).removeprefix('torch.')}"
    )
    print(f"{'':<40}{'forward s':>11}{'backward s':>11}{'step s':>9}{'of eager':>10}{'of same cell':>14}{'cosine':>8}")
    for row in rows:
        print(
            f"{row['name']:<40}{row['forward_s']:>11.3f}{row['backward_s']:>11.3f}{row['step_s']:>9.3f}{row['of_eager']:>10.2f}"
            f"{row['of_same_cell']:>14.2f}{row['cosine']:>8.3f}"
        )
    machine = {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if work.x.is_cuda else "cpu",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
    }
    content = {"command": "python -m benchmarks.compiled", "rounds": options.rounds, "torch": torch.__version__}
    content |= {"workload": work.name, "batch": len(work.start[0]), "steps": work.steps, "machine": machine}
    content |= {"matrix_rate": max(rates), "floor_forward_s": floor, "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
