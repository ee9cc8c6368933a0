"""Push and pull of a checkpoint of 80 MB: every request and the time of each, `python -m benchmarks.hub_transfer`.

Runs the real client against the local hub of the tests: what is measured is the client, the checks and the disk, not a
network. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from phantomgrad_hub import MDEQ, mdeq_imagenet_small

RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "hub"))

from hub_worker import Worker, digest  # noqa: E402
from local_hub import LocalHub  # noqa: E402


def measure(model: MDEQ, scratch: Path) -> dict[str, Any]:
    """Push `model`, pull it into an empty cache, load it once more from there."""
    folder = scratch / "checkpoint"
    model.save_pretrained(folder)
    steps = {}
    with LocalHub() as hub:
        hub.add_user("ann", token="hf_ann")
        worker = Worker(hub.environment(scratch, token="hf_ann"), scratch)
        for name, do, arguments in (
            ("push", "push", {"folder": str(folder), "repository": "ann/model"}),
            ("push again", "push", {"folder": str(folder), "repository": "ann/model"}),
            ("pull", "load", {"checkpoint": "ann/model", "solve": False}),
            ("load from the cache", "load", {"checkpoint": "ann/model", "solve": False}),
        ):
            hub.reset_requests()
            begun = time.perf_counter()
            reply = worker(do, **arguments)
            seconds = time.perf_counter() - begun
            if "error" in reply:
                sys.exit(f"{name}: {reply['message']}")
            if do == "load" and reply["digest"] != digest(model):
                sys.exit(f"{name}: the weights differ")
            requests = [
                {
                    "kind": entry.kind,
                    "method": entry.method,
                    "path": entry.path,
                    "status": entry.status,
                    "bytes": entry.sent_bytes,
                }
                for entry in hub.requests
            ]
            steps[name] = {"seconds": round(seconds, 3), "requests": requests}
        worker.close()
    return steps


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "hub_transfer.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    # Of that size with so many classes.
    model = MDEQ(replace(mdeq_imagenet_small().config, num_classes=2560))
    with tempfile.TemporaryDirectory() as scratch:
        steps = measure(model, Path(scratch))
        size = (Path(scratch) / "checkpoint" / "model.safetensors").stat().st_size
    print(f"model.safetensors: {size:,} bytes")
    for name, found in steps.items():
        kinds = [entry["kind"] for entry in found["requests"]]
        print(f"{name:20} {found['seconds']:6.2f} s  {len(kinds):2} requests: {', '.join(kinds)}")
    about = {"bytes": size, "machine": platform.machine(), "torch": torch.__version__}
    options.out.write_text(json.dumps({**about, "steps": steps}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
