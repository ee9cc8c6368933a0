"""One of two processes is killed: the other says so in one line, and the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from images import write_folder
from small import pooled_config

from phantomgrad_hub import MDEQ

KILLED = """
import os, signal, sys
from phantomgrad_hub.cli.main import main
from phantomgrad_hub.train.meter import Meter
step, count = Meter.step, []
def counted(self):
    count.append(1)
    if os.environ["RANK"] == "1" and len(count) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self)
Meter.step = counted
sys.exit(main(sys.argv[1:]))
"""


def test_the_process_that_is_left_says_that_another_ended(tmp_path: Path) -> None:
    write_folder(tmp_path / "data" / "train", 12)
    write_folder(tmp_path / "data" / "val", 2, first=50)
    MDEQ(pooled_config(channels=(8, 8), image_size=16, expansion=1)).save_pretrained(tmp_path / "start")
    run = tmp_path / "run"
    settings = ("epochs=2", "batch_size=3", "workers=0", "mixed_precision=no", "trackers=()", "validate_every=1")
    command = [
        "train",
        "finetune",
        "--init",
        str(tmp_path / "start"),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(run),
    ]
    command += ["--no-progress", *(word for setting in settings for word in ("--set", setting))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launch |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, *command],
            env={**os.environ, **launch, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL], errors
    said = [line for line in errors[0].splitlines() if line.startswith("phantomgrad train: ")]
    assert len(said) == 1
    assert re.fullmatch(
        rf"phantomgrad train: another process of this run has ended \(it, or its launcher, says why\); {run} holds nothing yet\. "
        r"The same command goes on\.",
        said[0],
    )
