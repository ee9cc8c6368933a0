"""Reruns what the paper claims of accuracy on CIFAR-10, at a size to choose: `python -m benchmarks.paper --data FOLDER`.

MDEQ-Tiny is trained once for every gradient, number of products and damping, and for three seeds, on the same images in the same
order; everything else is the `cifar10_tiny` recipe. Each training is a run folder of its own: interrupted, the same command
goes on where it was, leaving out what the results file has already, and `--report` adds to that what is finished. Time and memory
of a training step are measured on one trained model, interleaved.

The claims (Geng et al., "On Training Implicit Models", NeurIPS 2021): with a damping of .5, 83.2 % for k=1, 85.9 % for k=4 and
86.0 % for k=9; with 1, less after k=7; NPG equals UPG to k=5 and collapses at k=9 (69.5 +- 8).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gradients import compare
from phantomgrad import (
    Anderson,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    NotConvergedWarning,
    OneStep,
    UnrolledPhantom,
)
from phantomgrad_hub import MDEQ
from phantomgrad_hub.data import Source, open_source
from phantomgrad_hub.data.sources import Subset
from phantomgrad_hub.train import ScheduleConfig, TrainConfig, cifar10_tiny, train

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "paper.svg"
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
BEGIN, END = "<!-- table: python -m benchmarks.paper --report -->", "<!-- end of table -->"
SEEDS = (0, 1, 2)
STEPS = (1, 5, 9)
DAMPINGS = (0.5, 1.0)
EXACT = "exact"


@dataclass(frozen=True)
class Scale:
    """How much of the full experiment is run."""

    description: str
    train_images: int
    test_images: int
    epochs: int
    batch_size: int
    input_downsamplings: int
    """1 halves the resolution of the finest branch, and makes everything four times cheaper."""
    mixed_precision: str

    def config(self, gradient: Gradient, seed: int) -> TrainConfig:
        """The recipe of the paper's MDEQ-Tiny at this scale."""
        recipe = cifar10_tiny()
        return replace(
            recipe,
            model=replace(recipe.model, gradient=gradient, input_downsamplings=self.input_downsamplings),
            schedule=ScheduleConfig(warmup=0.05),
            epochs=self.epochs,
            batch_size=self.batch_size,
            mixed_precision=self.mixed_precision,  # type: ignore[arg-type]
            workers=0,
            seed=seed,
            validate_every=self.epochs,
            checkpoint_minutes=2.0,
        )

    def source(self, data: str) -> Source:
        """The first images of both splits."""
        source = open_source(data)
        return replace(
            source,
            train=Subset(source.train, range(min(self.train_images, len(source.train)))),
            validation=Subset(source.validation, range(min(self.test_images, len(source.validation)))),
        )


SCALES = {
    "small": Scale(
        description="the first 5,000 training and 5,000 test images, 8 epochs, finest branch at 16 pixels, bfloat16",
        train_images=5_000,
        test_images=5_000,
        epochs=8,
        batch_size=64,
        input_downsamplings=1,
        mixed_precision="bf16",
    ),
    "full": Scale(
        description="all images, 220 epochs, finest branch at 32 pixels, float32",
        train_images=50_000,
        test_images=10_000,
        epochs=220,
        batch_size=128,
        input_downsamplings=0,
        mixed_precision="no",
    ),
}


def settings() -> Iterator[tuple[str, int, float | None, Gradient]]:
    """Family, `k`, damping and gradient of everything that is compared."""
    for steps in STEPS:
        for damping in DAMPINGS:
            yield "UPG", steps, damping, UnrolledPhantom(steps=steps, damping=damping)
            yield "NPG, plain", steps, damping, NeumannPhantom(steps=steps, damping=damping, safeguard=False)
            if steps > 1:  # the first term is never left out
                yield "NPG, guarded", steps, damping, NeumannPhantom(steps=steps, damping=damping)
        if steps > 1:  # with one product it is the one-step gradient
            yield "Krylov", steps, None, KrylovPhantom(steps=steps)
    yield "one step", 1, None, OneStep()
    yield EXACT, 0, None, Implicit(solver=Anderson(max_steps=60))


def name_of(family: str, steps: int, damping: float | None) -> str:
    """A setting in words, which also names its run folders."""
    return " ".join(
        [family, *([f"k={steps}"] if steps else []), *([] if damping is None else [f"damping={damping:g}"])]
    )


def folder_of(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def train_one(scale: Scale, index: int, seed: int, data: str, runs: Path) -> None:
    """Train or resume one run."""
    family, steps, damping, gradient = list(settings())[index]
    folder = folder_of(runs, name_of(family, steps, damping), seed)
    train(scale.config(gradient, seed), scale.source(data), folder, recipe="paper", progress=False)


def stored_rows(out: Path, scale: Scale) -> dict[str, dict[str, Any]]:
    """What the results file `out` has from earlier runs at this scale, by setting."""
    if not out.is_file():
        return {}
    content = json.loads(out.read_text(encoding="utf-8"))
    rows = content["rows"] if content["scale"] == scale.description else []
    return {name_of(row["gradient"], row["steps"], row["damping"]): row for row in rows}


def run_all(scale_name: str, data: str, runs: Path, jobs: int, stored: dict[str, dict[str, Any]]) -> None:
    """Train what is not finished, `jobs` runs at a time, seed by seed, each in a process of its own."""
    runs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    everything = list(itertools.product(SEEDS, range(len(list(settings())))))
    lock, done = threading.Lock(), 0

    def run(seed: int, index: int) -> None:
        nonlocal done
        name = name_of(*list(settings())[index][:3])
        result = folder_of(runs, name, seed) / "result.json"
        line, known = "", stored.get(name, {}).get("top1_by_seed", {}).get(str(seed))
        if known is None and not result.is_file():
            command = [sys.executable, "-m", "benchmarks.paper", "--scale", scale_name, "--data", data]
            command += ["--runs", str(runs), "--one", str(index), str(seed)]
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            line = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        with lock:
            done += 1
            if known is not None:
                line = f"{known:.2%}"
            elif result.is_file():
                line = f"{json.loads(result.read_text(encoding='utf-8'))['top1']:.2%}"
            print(f"[{done}/{len(everything)}] {name}, seed {seed}: {line}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, seed, index) for seed, index in everything]:
            future.result()


def collect(runs: Path, stored: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a setting with at least one finished run: accuracies by seed, their mean, and two standard errors."""
    rows = []
    for family, steps, damping, _ in settings():
        name = name_of(family, steps, damping)
        found = {int(seed): top1 for seed, top1 in stored.get(name, {}).get("top1_by_seed", {}).items()}
        for seed in SEEDS:
            result = folder_of(runs, name, seed) / "result.json"
            if result.is_file():
                found[seed] = json.loads(result.read_text(encoding="utf-8"))["top1"]
        if not found:
            continue
        top1 = list(found.values())
        spread = 2 * statistics.stdev(top1) / len(top1) ** 0.5 if len(top1) > 1 else None
        row = {"gradient": family, "steps": steps, "damping": damping, "top1_by_seed": found}
        rows.append({**row, "top1": statistics.mean(top1), "two_standard_errors": spread})
    return rows


def cost(scale: Scale, runs: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds and saved memory of the block in a training step of every setting, on one trained model, interleaved.

    Empty where no run folder is left.
    """
    warnings.simplefilter("ignore", NotConvergedWarning)
    trained = [
        folder_of(runs, name_of(family, steps, damping), seed) / "best"
        for seed in SEEDS
        for family, steps, damping, _ in settings()
    ]
    # The paper's own setting, where it is finished.
    trained.sort(key=lambda folder: folder != folder_of(runs, name_of("UPG", 5, 0.5), SEEDS[0]) / "best")
    folder = next((folder for folder in trained if folder.is_dir()), None)
    if folder is None:
        return {}
    model = MDEQ.from_pretrained(folder).train()
    gradients = {name_of(family, steps, damping): gradient for family, steps, damping, gradient in settings()}
    with torch.no_grad():
        images = torch.randn(scale.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        injection = model.inject(images)
    exact = name_of(EXACT, 0, None)
    show = sys.stderr.isatty()
    rows = compare(
        model,
        injection,
        repeats,
        lambda text: print(f"\r{text:<60}", end="", file=sys.stderr, flush=True) if show else None,
        gradients=gradients,
        exact=exact,
    )
    return {row["gradient"]: row for row in rows}


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Put the table between the two marks of a page."""
    lines = [
        "| gradient | k | damping | top-1, % | ±2 s.e. | seeds | forward, s | backward, s | saved, MiB | cosine |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        error = "" if row["two_standard_errors"] is None else f"{100 * row['two_standard_errors']:.1f}"
        damping = "" if row["damping"] is None else f"{row['damping']:g}"
        spent = [
            f"{row['forward_s']:.2f}",
            f"{row['backward_s']:.2f}",
            f"{row['saved_mib']:.0f}",
            f"{row['cosine']:.3f}",
        ]
        accuracy = [f"{100 * row['top1']:.1f}", error, str(len(row["top1_by_seed"]))]
        lines.append(f"| {' | '.join([row['gradient'], str(row['steps'] or ''), damping, *accuracy, *spent])} |")
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


def draw(rows: list[dict[str, Any]], description: str, path: Path) -> None:
    """Accuracy against `k`, one line a family and damping, with two standard errors."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "phantomgrad"
    from matplotlib import pyplot

    colours = {"UPG": "#0072B2", "NPG, plain": "#D55E00", "NPG, guarded": "#E69F00", "Krylov": "#009E73"}
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4))
    offset = -0.24
    for family, colour in colours.items():
        for damping in (*DAMPINGS, None):
            points = [row for row in rows if row["gradient"] == family and row["damping"] == damping]
            if not points:
                continue
            label = family if damping is None else f"{family}, damping {damping:g}"
            axes.errorbar(
                [row["steps"] + offset for row in points],
                [100 * row["top1"] for row in points],
                yerr=[100 * (row["two_standard_errors"] or 0.0) for row in points],
                color=colour,
                linestyle="--" if damping == 0.5 else "-",
                marker="o" if damping == 0.5 else "s",
                markersize=4,
                capsize=3,
                label=label,
            )
            offset += 0.08
    for family, style in (("one step", ":"), (EXACT, "-.")):
        for row in rows:
            if row["gradient"] == family:
                axes.axhline(100 * row["top1"], color="black", linestyle=style, linewidth=1, label=family)
    axes.set_xticks(STEPS)
    axes.set_xlabel("vector-Jacobian products in backward, k")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(f"MDEQ-Tiny on CIFAR-10: {description}", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def report(scale_name: str, runs: Path, out: Path, picture: Path, repeats: int) -> None:
    """Print the table of the finished runs, and write it as JSON and as a picture."""
    scale = SCALES[scale_name]
    stored = stored_rows(out, scale)
    rows = collect(runs, stored)
    if not rows:
        print(f"No run in {runs} is finished.")
        return
    costs = cost(scale, runs, repeats)
    print(f"{'gradient':<30}{'top-1 %':>9}{'+-2se':>7}{'seeds':>7}{'forward s':>11}{'backward s':>12}{'saved MiB':>11}")
    for row in rows:
        name = name_of(row["gradient"], row["steps"], row["damping"])
        spent = costs[name] if costs else stored[name]
        row |= {key: spent[key] for key in ("forward_s", "backward_s", "saved_mib", "cosine")}
        error = "" if row["two_standard_errors"] is None else f"{100 * row['two_standard_errors']:.1f}"
        print(
            f"{name:<30}{100 * row['top1']:>9.1f}{error:>7}"
            f"{len(row['top1_by_seed']):>7}{row['forward_s']:>11.3f}{row['backward_s']:>12.3f}{row['saved_mib']:>11.1f}"
        )
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    content = {"command": f"python -m benchmarks.paper --data FOLDER --scale {scale_name}", "torch": torch.__version__}
    content |= {"scale": scale.description}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**content, "machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    draw(rows, scale.description, picture)
    if picture == PICTURE:
        write_table(rows, PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder with CIFAR-10 as parquet files")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--runs", type=Path, help="where the runs are kept; by default runs/paper-SCALE")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    parser.add_argument("--repeats", type=int, default=5, help="of the timing")
    parser.add_argument("--out", type=Path, default=RESULTS / "paper.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    runs = options.runs or Path("runs") / f"paper-{options.scale}"
    if not options.report and options.data is None:
        parser.error("--data is needed for training")
    if options.one:
        train_one(SCALES[options.scale], *options.one, options.data, runs)
        return
    if not options.report:
        run_all(options.scale, options.data, runs, options.jobs, stored_rows(options.out, SCALES[options.scale]))
    report(options.scale, runs, options.out, options.picture, options.repeats)


if __name__ == "__main__":
    main()
