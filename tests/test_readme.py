"""The README's code runs as printed, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from phantomgrad_hub.cli.main import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    namespaces: list[dict[str, Any]] = []
    for block in blocks:
        namespaces.append({})
        exec(compile(block, "README.md", "exec"), namespaces[-1])
    cell, z, x = (namespaces[0][name] for name in ("cell", "z", "x"))
    for parameter in cell.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    once = torch.tanh(0.5 * cell.recurrent(z) + cell.inputs(x))
    torch.testing.assert_close(once, z, rtol=1e-3, atol=1e-3)


def test_links_inside_the_repository_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^    make ([\w-]+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    commands = re.findall(r"^    phantomgrad (.+)$", README, flags=re.MULTILINE)
    assert commands
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True))
