"""The package's surface: every public name can be imported, and importing the package needs torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

import phantomgrad_hub

OPTIONAL = ("PIL", "safetensors", "huggingface_hub", "torchvision", "datasets", "accelerate", "gradio")


@pytest.mark.parametrize("name", phantomgrad_hub.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(phantomgrad_hub, name).__name__ == name
    assert name in dir(phantomgrad_hub)


def test_all_is_what_can_be_imported() -> None:
    assert set(phantomgrad_hub.__all__) == set(phantomgrad_hub._MODULES)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = phantomgrad_hub.Nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_and_running_a_model_needs_torch_alone() -> None:
    blocked = ", ".join(f"{name!r}: None" for name in OPTIONAL)
    program = f"""
import sys
sys.modules.update({{{blocked}}})
import torch
from phantomgrad_hub import *
model = mdeq_cifar_tiny()
[attachment] = __import__("phantomgrad").attachments(model)
with torch.no_grad():
    assert attachment.step(model.initial_state(model.inject(torch.zeros(1, 3, 32, 32))), torch.zeros(1, 24, 32, 32))
try:
    model.save_pretrained("nowhere")
except MissingExtraError as error:
    print(error)
try:
    model.classify("photo.jpg")
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "safetensors is not installed; run: pip install 'phantomgrad[hub]'",
        "PIL is not installed; run: pip install 'phantomgrad[hub]'",
    ]
