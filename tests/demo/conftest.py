"""A small random classifier, and the page of it on a free port."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from phantomgrad import FixedPointIteration, UnrolledPhantom
from phantomgrad_hub import MDEQ, MDEQConfig

LABELS = ["goldfish", "tabby cat", "lighthouse", "espresso", "lemon", "Bits & <b>pieces</b>", "school bus", "teapot"]
MOST_STEPS = 24


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random MDEQ that settles in about ten steps and has clear opinions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MDEQ(
            MDEQConfig(
                channels=(8, 16),
                num_classes=len(LABELS),
                image_size=32,
                expansion=2,
                groups=4,
                head="pooled",
                conv_init_std=None,
                gradient=UnrolledPhantom(steps=3),
                solver=FixedPointIteration(damping=0.7, max_steps=MOST_STEPS, rtol=1e-2),
            ),
            labels=LABELS,
        )
        model.eval()
        with torch.no_grad():
            for name, parameter in model.block.named_parameters():
                if name.startswith("post_fuse") and name.endswith("norm.weight"):
                    parameter.fill_(0.3)  # contractive: nearly the same whatever the state
                elif name.startswith("post_fuse") and name.endswith("norm.bias"):
                    parameter.normal_()
            model.head.classifier.weight.mul_(16.0)
            model.head.classifier.bias.sub_(model(torch.randn(8, 3, 32, 32)).mean(0))  # no favourite class
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> MDEQ:
    """The model of `checkpoint`."""
    return MDEQ.from_pretrained(checkpoint)


SERVER = """
import json, sys, time

def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        asked = arguments[1] if event == "socket.connect" else arguments[0]
        print(json.dumps(str(asked[0] if isinstance(asked, tuple) else asked)), file=asked_hosts, flush=True)

asked_hosts = open(sys.argv[2], "w")
sys.addaudithook(note)
seconds = float(sys.argv[3])
if seconds:
    from phantomgrad_hub import checkpoint
    load = checkpoint.load_checkpoint
    def slowly(*arguments, **options):
        model = load(*arguments, **options)
        model.block.post_fuse[0].register_forward_pre_hook(lambda *_: time.sleep(seconds))
        return model
    checkpoint.load_checkpoint = slowly
from phantomgrad_hub.cli.main import main
sys.exit(main(["demo", "--checkpoint", sys.argv[1], "--port", "0"]))
"""
"""`phantomgrad demo`, which notes the hosts that it asks for; each evaluation of the block takes so many seconds more."""


@contextmanager
def serve(checkpoint: Path, folder: Path, *, seconds_per_step: float = 0.0) -> Iterator[str]:
    """The address that `phantomgrad demo` prints. Whatever the tests send it, its log stays clean."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs the extra `demo`")
    folder.mkdir()
    log, hosts, temporary = folder / "log.txt", folder / "hosts.txt", folder / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-c", SERVER, str(checkpoint), str(hosts), str(seconds_per_step)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as server,
    ):
        try:
            assert server.stdout is not None
            told = server.stdout.readline()
            address = re.search(r"http://\S+", told)
            assert address is not None, told + log.read_text()
            yield address[0]
            server.terminate()
            assert server.wait(60) == 130
        finally:
            server.kill()
    assert not [path for path in temporary.rglob("*") if path.is_file()], "photos that visitors sent are left behind"
    assert log.read_text() == ""
    # 0.0.0.0 is asked for to see whether a port is free, and looks nowhere.
    asked = {json.loads(line) for line in hosts.read_text().splitlines()}
    assert asked <= {"127.0.0.1", "localhost", "0.0.0.0", "::1"}, asked


@pytest.fixture(scope="session")
def page(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page of `checkpoint`."""
    with serve(checkpoint, tmp_path_factory.mktemp("demo") / "page") as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium, without a window."""
    pytest.importorskip("playwright", reason="needs the extra `dev`")
    from browsing import CHROMIUM, chromium

    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed")
    with chromium() as browser:
        yield browser
