"""This library beside what a user would take instead: `python -m benchmarks.peers [WORKLOAD ...]`.

torchdeq 0.1.0, a hand-written loop and plain backpropagation solve the same cell from the same start with the same weights and
the same number of evaluations, none of which may stop early; the gradients make the same number of vector-Jacobian products.
All run in one process, run by run in turn, so that what else the machine does hits them alike. torchdeq and the loop are given
parametrized weights computed once per step, as this library does by itself. Like torchdeq, it watches the residual and keeps
every sample's best iterate; "unwatched" is with `keep="last"` and without tolerances, as the loop by hand.

For each: seconds of forward, backward and both (medians, with their range), what forward keeps for backward, the cosine with
the exact gradient, and samples a second of a solve without grad. Beside them the floor: the operations of those evaluations
over the matrix rate measured in the same run. Prints tables, writes JSON and a picture. The MDEQ blocks have random weights,
with which they expand: there no gradient is close to another, and the times are what counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads import WORKLOADS, State, Workload, wait
from phantomgrad import (
    Backprop,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    NotConvergedWarning,
    UnrolledPhantom,
    fixed_point,
)

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "peers.svg"
STEPS = 5
"""Steps of every phantom gradient."""
EXACT = "ours, exact"
Contestant = Callable[[], State]
"""Solves with grad and returns the state."""


def _solver(work: Workload) -> FixedPointIteration:
    return FixedPointIteration(max_steps=work.steps, rtol=0.0, atol=0.0, damping=work.damping)


def ours(work: Workload, gradient: Gradient, *, keep: Literal["best", "last"] = "best") -> Contestant:
    """This library, every solve of `work.steps` evaluations; with `keep="last"` nothing is measured before the last."""
    solver = replace(_solver(work), keep=keep)
    return lambda: (
        fixed_point(work.cell, work.start, work.x, gradient=gradient, solver=solver, on_failure="ignore").value
    )


def torchdeq(work: Workload, **options: Any) -> Contestant:
    """torchdeq driving the same cell."""
    from torchdeq import get_deq

    settings = {"f_max_iter": work.steps, "b_max_iter": work.steps, "f_tol": 0.0, "b_tol": 0.0, "tau": work.damping}
    deq = get_deq(**(settings | options)).train()

    def solve() -> State:
        with work.weights_once():
            outputs, _ = deq(lambda *state: work.step(state), work.start, solver_kwargs={"tau": work.damping})
        last = outputs[-1]
        return tuple(last) if isinstance(last, (list, tuple)) else (last,)

    return solve


def damped(work: Workload, state: State) -> State:
    """One damped evaluation."""
    return tuple(torch.lerp(z, fz, work.damping) for z, fz in zip(state, work.step(state), strict=True))


def by_hand(work: Workload) -> Contestant:
    """A loop without any bookkeeping, then recorded damped steps."""

    def solve() -> State:
        with work.weights_once():
            state = work.start
            with torch.no_grad():
                for _ in range(work.steps):
                    state = damped(work, state)
            for _ in range(STEPS):
                state = damped(work, state)
        return state

    return solve


def contestants(work: Workload, *, backprop: bool) -> dict[str, Contestant]:
    """Everything that is compared on `work`."""
    upg, npg = (kind(steps=STEPS, damping=work.damping) for kind in (UnrolledPhantom, NeumannPhantom))
    found = {
        "ours, UPG": ours(work, upg),
        "ours, UPG, unwatched": ours(work, upg, keep="last"),
        "ours, NPG": ours(work, npg),
        "ours, NPG, unwatched": ours(work, npg, keep="last"),
        "ours, Krylov": ours(work, KrylovPhantom(steps=STEPS)),
        EXACT: ours(work, Implicit(solver=_solver(work))),
        "torchdeq, phantom": torchdeq(work, grad=STEPS),
        "torchdeq, exact": torchdeq(work, ift=True),
        "torchdeq, exact by Broyden": torchdeq(work, ift=True, f_solver="broyden", b_solver="broyden"),
        "loop by hand, phantom": by_hand(work),
    }
    return found | ({"backpropagation": ours(work, Backprop(steps=work.steps))} if backprop else {})


def training_step(work: Workload, solve: Contestant) -> dict[str, Any]:
    """Seconds of forward and backward, and the gradient of everything."""
    for parameter in work.parameters:
        parameter.grad = None
    work.wait()
    begin = time.perf_counter()
    state = solve()
    work.wait()
    middle = time.perf_counter()
    work.loss(state).backward()
    work.wait()
    end = time.perf_counter()
    grads = [p.grad.flatten() for p in work.parameters if p.grad is not None]
    return {"forward": middle - begin, "backward": end - middle, "step": end - begin, "grads": torch.cat(grads)}


def saved_mib(solve: Contestant) -> float:
    """What the forward pass keeps for backward."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        state = solve()
    del state
    kept.clear()
    gc.collect()
    return sum(sizes.values()) / 2**20


def inference_seconds(solve: Contestant) -> float:
    with torch.no_grad():
        begin = time.perf_counter()
        solve()
        return time.perf_counter() - begin


def flops(work: Workload) -> int:
    """Operations of one evaluation's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work.step(work.start)
    return counter.get_total_flops()


def matrix_rate(seconds: float = 1.0, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    wait(a.device)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        a @ b
        wait(a.device)
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def compare(work: Workload, repeats: int, *, backprop: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """The rows of one workload."""
    entrants = contestants(work, backprop=backprop)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in entrants}
    solves: dict[str, list[float]] = {name: [] for name in entrants}
    saved = {name: saved_mib(solve) for name, solve in entrants.items()}  # warms up, too
    rates = [matrix_rate()]
    for repeat in range(repeats):
        for name, solve in entrants.items():
            progress(f"{work.name}: run {repeat + 1} of {repeats}, {name}")
            runs[name].append(training_step(work, solve))
            solves[name].append(inference_seconds(solve))
    rates.append(matrix_rate())
    reference = runs[EXACT][-1]["grads"].double()
    rows = []
    for name, results in runs.items():
        cosine = torch.nn.functional.cosine_similarity(results[-1]["grads"].double(), reference, dim=0).item()
        row: dict[str, Any] = {"name": name, "cosine": cosine, "saved_mib": saved[name]}
        for key in ("forward", "backward", "step"):
            seconds = sorted(result[key] for result in results)
            row[f"{key}_s"] = statistics.median(seconds)
            row[f"{key}_range_s"] = [seconds[0], seconds[-1]]
        row["samples_per_s"] = work.start[0].shape[0] / statistics.median(solves[name])
        rows.append(row)
    evaluation = flops(work)
    return {
        "workload": work.name,
        "steps": work.steps,
        "batch": work.start[0].shape[0],
        "flops_per_evaluation": evaluation,
        "matrix_rate": max(rates),
        "floor_forward_s": evaluation * work.steps / max(rates),
        "rows": rows,
    }


def show(found: dict[str, Any]) -> None:
    """One workload as a table, with the ratio to torchdeq's phantom step."""
    base = next(row for row in found["rows"] if row["name"] == "torchdeq, phantom")
    print(
        f"{found['workload']}: batch {found['batch']}, {found['steps']} evaluations of "
        f"{found['flops_per_evaluation'] / 1e9:.3g} GFLOP; floor of forward {found['floor_forward_s']:.3g} s at "
        f"{found['matrix_rate'] / 1e9:.0f} GFLOP/s"
    )
    columns = ("forward s", "backward s", "step s", "of phantom", "saved MiB", "cosine", "samples/s")
    print(f"  {'':<28}" + "".join(f"{column:>12}" for column in columns))
    for row in found["rows"]:
        print(
            f"  {row['name']:<28}{row['forward_s']:>12.4f}{row['backward_s']:>12.4f}{row['step_s']:>12.4f}"
            f"{row['step_s'] / base['step_s']:>12.2f}{row['saved_mib']:>12.1f}{row['cosine']:>12.4f}{row['samples_per_s']:>12.1f}"
        )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Time of a training step relative to torchdeq's phantom step, a group of bars a workload."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "phantomgrad"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(3.2 * len(results) + 1.2, 3.6), sharey=True, squeeze=False
    )
    for axes, found in zip(panels[0], results, strict=True):
        base = next(row for row in found["rows"] if row["name"] == "torchdeq, phantom")["step_s"]
        for position, row in enumerate(found["rows"]):
            colour = "#0072B2" if row["name"].startswith("ours") else "#999999"
            axes.barh(position, row["forward_s"] / base, color=colour)
            rest = row["step_s"] - row["forward_s"]  # medians of the parts do not add up to that of the whole
            axes.barh(position, rest / base, left=row["forward_s"] / base, color=colour, alpha=0.55)
            axes.text(row["step_s"] / base, position, f" {row['step_s'] / base:.2f}", va="center", fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(found["rows"])), [row["name"] for row in found["rows"]], fontsize=7)
        axes.set_title(found["workload"], fontsize=9)
        axes.set_xlim(0, 1.15 * max(row["step_s"] for row in found["rows"]) / base)
    panels[0][0].invert_yaxis()
    figure.supxlabel(
        "time of a training step, torchdeq's phantom step = 1 (dark: forward, light: backward)", fontsize=8
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 by autocast, for all alike")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"no such workload: {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")

    warnings.simplefilter("ignore", NotConvergedWarning)  # the number of steps is fixed on purpose
    results = []
    for name in options.workloads or WORKLOADS:
        torch.manual_seed(0)
        work = WORKLOADS[name](name)
        with torch.autocast("cpu", torch.bfloat16) if options.autocast else nullcontext():
            found = compare(
                work,
                options.repeats,
                backprop=name != "mdeq-small-224",  # its graph alone takes many gigabytes
                progress=lambda text: print(f"\r{text:<70}", end="", flush=True),
            )
        print("\r" + " " * 70, end="\r")
        show(found)
        results.append(found)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    content = {"command": "python -m benchmarks.peers", "repeats": options.repeats, "autocast": options.autocast}
    content |= {"torch": torch.__version__, "machine": machine, "workloads": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(results, options.picture)


if __name__ == "__main__":
    main()
