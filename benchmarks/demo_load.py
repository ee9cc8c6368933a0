"""How the demo page bears visitors: latencies, refusals and memory of its server while many use it at once.

    python -m benchmarks.demo_load

Starts `phantomgrad demo` with the embedded checkpoint in a process of its own. Each visitor asks again and again, through
the page's API, for one of its endpoints with one of the example photos, and thinks for a moment in between. A request that
finds the queue full is told so; any other error counts as one. Writes `benchmarks/results/demo_load.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gradio_client import Client, handle_file

from phantomgrad_demo.photos import available

RESULT = Path(__file__).parent / "results" / "demo_load.json"
ENDPOINTS = {"/classify": 6, "/settle": 2, "/nearby": 1, "/gradient": 1}
"""How often each is asked for, relative to the others."""
FULL = "queue is full"
WARM_UP = 90.0
"""Seconds until threads, buffers and caches have found their size."""


class Visitor(threading.Thread):
    """Asks until the end, and keeps what it was told."""

    def __init__(self, address: str, seed: int, end: float, think: float) -> None:
        super().__init__()
        self._address, self._random, self._end, self._think = address, random.Random(seed), end, think
        self.seconds: dict[str, list[float]] = {name: [] for name in ENDPOINTS}
        self.refused = 0
        self.errors: Counter[str] = Counter()

    def run(self) -> None:
        client = Client(self._address, verbose=False)
        photos = [handle_file(str(photo.find())) for photo in available()]
        while time.perf_counter() < self._end:
            [name] = self._random.choices(list(ENDPOINTS), weights=list(ENDPOINTS.values()))
            began = time.perf_counter()
            try:
                client.predict(photo=self._random.choice(photos), api_name=name)
                self.seconds[name].append(time.perf_counter() - began)
            except Exception as error:  # whatever it is, it is counted
                if FULL in str(error).lower():
                    self.refused += 1
                else:
                    self.errors[f"{name}: {type(error).__name__}: {error}"] += 1
            time.sleep(self._random.uniform(0, 2 * self._think))
        client.close()


def resident_megabytes(process: int) -> float:
    """What the process holds in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def percentile(values: list[float], share: float) -> float:
    """The value below which that share lies."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def visit(address: str, visitors: int, seconds: float, think: float) -> list[Visitor]:
    """Let them all ask for so long."""
    end = time.perf_counter() + seconds
    crowd = [Visitor(address, seed, end, think) for seed in range(visitors)]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join()
    return crowd


def measure(visitors: int, seconds: float, think: float) -> dict[str, Any]:
    """Start the server, warm it up, send the visitors, and stop it."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "phantomgrad_hub.cli.main", "demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split(" is at ")[1].split()[0]
            starting = time.perf_counter() - began
            visit(address, visitors, WARM_UP, think)
            before = resident_megabytes(server.pid)
            crowd = visit(address, visitors, seconds, think)
            after = resident_megabytes(server.pid)
        finally:
            server.terminate()
    accepted = [value for each in crowd for values in each.seconds.values() for value in values]
    errors = sum((each.errors for each in crowd), Counter[str]())
    return {
        "visitors": visitors,
        "seconds": seconds,
        "warm_up_seconds": WARM_UP,
        "think_seconds_mean": think,
        "seconds_to_address": round(starting, 2),
        "accepted": len(accepted),
        "refused_queue_full": sum(each.refused for each in crowd),
        "errors": dict(errors),
        "latency_median": round(statistics.median(accepted), 3),
        "latency_p95": round(percentile(accepted, 0.95), 3),
        "latency_max": round(max(accepted), 3),
        "latency_p95_by_endpoint": {
            name: round(percentile([value for each in crowd for value in each.seconds[name]], 0.95), 3)
            for name in ENDPOINTS
        },
        "memory_before_mb": round(before, 1),
        "memory_after_mb": round(after, 1),
        "memory_change": round(after / before - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--think", type=float, default=2.0, help="mean pause between two requests of a visitor")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    result = {
        "command": "python -m benchmarks.demo_load",
        "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, {platform.system()} {platform.machine()}",
        "load_average_before": round(load, 1),
        **measure(options.visitors, options.seconds, options.think),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
