"""A small random classifier, and the page of it on a free port."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def page(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address that `phantomgrad demo` prints. Whatever the tests send it, its log stays clean."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs the extra `demo`")
    folder = tmp_path_factory.mktemp("page")
    log, temporary = folder / "log.txt", folder / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "phantomgrad_hub.cli.main", "demo", "--checkpoint", str(checkpoint), "--port", "0"]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "TMPDIR": str(temporary)}
        ) as server,
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
