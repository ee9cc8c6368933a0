"""Time, memory and direction of every gradient on the block of MDEQ-Small: `python -m benchmarks.gradients`.

All differentiate the same weights at the same inputs after the same solver steps, in turn, so that what else the machine
does hits them alike. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phantomgrad import (
    FixedPointIteration,
    Gradient,
    Implicit,
    NeumannPhantom,
    NotConvergedWarning,
    OneStep,
    UnrolledPhantom,
    attachments,
)
from phantomgrad_hub import MDEQ, mdeq_imagenet_small

RESULTS = Path(__file__).parent / "results"
EXACT = "exact (rtol 1e-3)"
GRADIENTS: dict[str, Gradient] = {
    EXACT: Implicit(rtol=1e-3),
    "UPG k=5": UnrolledPhantom(steps=5, damping=0.6),
    "UPG k=5, recomputed": UnrolledPhantom(steps=5, damping=0.6, recompute=True),
    "NPG k=5": NeumannPhantom(steps=5, damping=0.6),
    "one step": OneStep(),
}


def saved_bytes(model: MDEQ, injection: Tensor, gradient: Gradient) -> int:
    """What the forward pass keeps for backward."""
    [attachment] = attachments(model.block)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with attachment.using(gradient=gradient), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        state = model.block(model.initial_state(injection), injection)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    del state
    return sum(storages.values())


def measure(model: MDEQ, injection: Tensor, gradient: Gradient) -> dict[str, Any]:
    """Seconds forward and backward, and the gradient of all weights of the block for one cotangent, the same for every gradient.

    It is random: the sum of squares of a normalised output is constant, and its gradient only the error of the solve.
    """
    [attachment] = attachments(model.block)
    model.zero_grad()
    with attachment.using(gradient=gradient):
        begin = time.perf_counter()
        state = model.block(model.initial_state(injection), injection)
        forward = time.perf_counter() - begin
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(leaf.shape, generator=generator) / leaf.numel() for leaf in state]
        middle = time.perf_counter()
        torch.autograd.backward(state, cotangents)
        end = time.perf_counter()
    grads = torch.cat([p.grad.flatten() for p in model.block.parameters() if p.grad is not None])
    return {"forward": forward, "backward": end - middle, "grads": grads}


def compare(
    model: MDEQ,
    injection: Tensor,
    repeats: int,
    progress: Callable[[str], None],
    *,
    gradients: Mapping[str, Gradient],
    exact: str,
) -> list[dict[str, Any]]:
    """One row a gradient: medians over `repeats` interleaved runs, after one to warm up; `exact` is what cosines refer to."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in gradients}
    for repeat in range(repeats + 1):
        for name, gradient in gradients.items():
            progress(f"run {repeat} of {repeats}: {name}")
            result = measure(model, injection, gradient)
            if repeat > 0:
                runs[name].append(result)
    reference = runs[exact][-1]["grads"]
    rows = []
    for name, results in runs.items():
        cosine = torch.nn.functional.cosine_similarity(results[-1]["grads"], reference, dim=0).item()
        saved = saved_bytes(model, injection, gradients[name]) / 2**20
        row: dict[str, Any] = {"gradient": name, "cosine": cosine, "saved_mib": saved}
        for key in ("forward", "backward"):
            seconds = [result[key] for result in results]
            row[f"{key}_s"] = statistics.median(seconds)
            row[f"{key}_spread_s"] = max(seconds) - min(seconds)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=26, help="solver steps")
    parser.add_argument("--out", type=Path, default=RESULTS / "gradients.json")
    options = parser.parse_args()

    torch.manual_seed(0)
    warnings.simplefilter("ignore", NotConvergedWarning)  # the number of steps is fixed on purpose
    model = mdeq_imagenet_small()
    [attachment] = attachments(model.block)
    attachment.solver = FixedPointIteration(max_steps=options.steps, rtol=0.0, atol=0.0, keep="last", damping=0.6)
    with torch.no_grad():
        injection = model.inject(torch.randn(options.batch, 3, options.size, options.size))
    rows = compare(
        model,
        injection,
        options.repeats,
        lambda text: print(f"\r{text:<50}", end="", flush=True),
        gradients=GRADIENTS,
        exact=EXACT,
    )
    print("\r" + " " * 50, end="\r")

    print(f"{'gradient':<22}{'forward s':>10}{'backward s':>12}{'saved MiB':>11}{'cosine':>9}")
    for row in rows:
        print(
            f"{row['gradient']:<22}{row['forward_s']:>10.3f}{row['backward_s']:>12.3f}"
            f"{row['saved_mib']:>11.0f}{row['cosine']:>9.4f}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(options, key) for key in ("repeats", "batch", "size", "steps")}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    content = {"command": "python -m benchmarks.gradients", "settings": settings, "torch": torch.__version__}
    options.out.write_text(json.dumps({**content, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
