"""The shape of the repository: which package imports which, what is public, how long files are."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "plugin/phantomgrad": {"phantomgrad"},
    "hub/phantomgrad_hub": {"phantomgrad", "phantomgrad_hub"},
    "demo/phantomgrad_demo": {"phantomgrad", "phantomgrad_hub", "phantomgrad_demo"},
}


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for module in _imported(path):
            top = module.split(".")[0]
            assert not top.startswith("phantomgrad") or top in ALLOWED[package], f"{path} imports {module}"


def test_the_plugin_needs_torch_only() -> None:
    for path in (ROOT / "plugin").rglob("*.py"):
        for module in _imported(path):
            top = module.split(".")[0]
            assert top in sys.stdlib_module_names | {"torch", "phantomgrad"}, f"{path} imports {module}"


@pytest.mark.parametrize(
    "name", ["phantomgrad", "phantomgrad.diagnostics", "phantomgrad.torchdeq", "phantomgrad_hub", "phantomgrad_demo"]
)
def test_everything_public_is_importable_and_listed(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for entry in module.__all__:
        assert getattr(module, entry) is not None
        assert getattr(module, entry).__doc__, f"{name}.{entry} has no docstring"


def test_no_python_file_is_longer_than_it_should_be() -> None:
    for folder in ("plugin", "hub", "demo", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 420, f"{path.relative_to(ROOT)} has {lines} lines"


def test_importing_the_plugin_takes_little_beside_importing_torch() -> None:
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import phantomgrad; "
        "print((time.perf_counter() - b) / (b - a))"
    )
    ratios = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(ratios) < 0.1


def test_diagnostics_is_an_attribute_of_the_plugin_though_it_is_imported_late() -> None:
    code = (
        "import sys, phantomgrad; assert 'phantomgrad.diagnostics' not in sys.modules; phantomgrad.diagnostics.check\n"
        "try: phantomgrad.diagnostic\n"
        "except AttributeError as error: print(error)"
    )
    told = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert told == "module 'phantomgrad' has no attribute 'diagnostic'\n"
