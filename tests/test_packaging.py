"""The wheel, installed as a user would: plainly, and with the extra `hub`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def _distributions(name: str, found: dict[str, importlib.metadata.Distribution]) -> None:
    """Collect `name` and everything it needs here, as installed."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return
    try:
        found[key] = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in found[key].requires or ():
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        if match and "extra ==" not in requirement:
            _distributions(match.group(), found)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def torch_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to torch and what it needs, so that gigabytes need not be installed again."""
    folder = tmp_path_factory.mktemp("torch-only")
    found: dict[str, importlib.metadata.Distribution] = {}
    _distributions("torch", found)
    for distribution in found.values():
        for entry in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            source, link = Path(str(distribution.locate_file(entry))), folder / entry
            if source.exists() and not link.exists():
                link.symlink_to(source)
    return folder


class Installed:
    """A fresh environment with the wheel in it."""

    def __init__(self, folder: Path, torch_only: Path, requirement: str) -> None:
        venv.create(folder, with_pip=True)
        self.bin = folder / "bin"
        [site] = (folder / "lib").glob("python*/site-packages")
        (site / "torch-only.pth").write_text(f"{torch_only}\n")
        self.python("-m", "pip", "--disable-pip-version-check", "install", "--quiet", requirement)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.bin, timeout=240)

    def python(self, *arguments: str) -> str:
        result = self.run(str(self.bin / "python"), *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def phantomgrad(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.bin / "phantomgrad"), *arguments)


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.radial_gradient("L").convert("RGB").save(path)
    return str(path)


def test_plain_install_brings_torch_only_and_names_the_missing_extras(
    wheel: Path, torch_only: Path, tmp_path: Path, photo: str
) -> None:
    installed = Installed(tmp_path / "plain", torch_only, str(wheel))
    installed.python("-c", "import phantomgrad, phantomgrad_hub")
    names = {entry["name"] for entry in json.loads(installed.python("-m", "pip", "list", "--format=json"))}
    assert not names & {"safetensors", "huggingface-hub", "pillow", "gradio", "accelerate"}
    for arguments, extra in (
        (("predict", photo), "hub"),
        (("train", "tiny_imagenet", "--data", ".", "--out", "run"), "train"),
        (("export", "embedded", "--out", "model.onnx"), "export"),
        (("export", "embedded", "--out", "model.pt2"), "hub"),
        (("demo",), "demo"),
    ):
        result = installed.phantomgrad(*arguments)
        assert result.returncode == 1, result.stderr
        # Without numpy torch warns at its import, before anything of ours runs; the last line is ours.
        assert result.stderr.rstrip().endswith(f"run: pip install 'phantomgrad[{extra}]'"), result.stderr
        assert "Traceback" not in result.stderr
    assert installed.phantomgrad("--version").returncode == 0
    assert installed.phantomgrad("predict").returncode == 2


def test_install_with_hub_predicts(wheel: Path, torch_only: Path, tmp_path: Path, photo: str) -> None:
    installed = Installed(tmp_path / "hub", torch_only, f"{wheel}[hub]")
    result = installed.phantomgrad("predict", photo, "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)) >= 1
