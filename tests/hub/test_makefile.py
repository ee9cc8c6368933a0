"""The environment that `make` makes: whole, or not there with one line that says what to install."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
# Stands for Debian's python3: without python3-venv, `-m venv` ends after it has made bin/python.
PYTHON = """#!/bin/sh
case "$*" in
*"-m venv"*) for folder; do :; done; mkdir -p $folder/bin; cp {inner} $folder/bin/python; exit {status};;
esac
"""
INNER = """#!/bin/sh
case "$*" in *"-m pip"*) exit {status};; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def _script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def _make(folder: Path, *, venv: int = 0, pip: int = 0, name: str = ".venv") -> subprocess.CompletedProcess[str]:
    """Run the rule with a python whose venv and pip end with these statuses."""
    inner = _script(folder / "inner", INNER.format(status=pip))
    python = _script(folder / "python3", PYTHON.format(inner=inner, status=venv))
    command = ["make", "-f", str(MAKEFILE), f"PYTHON={python}", f"{name}/venv.stamp"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("venv", "pip"), [(1, 0), (0, 1)])
def test_a_half_made_environment_is_removed_and_made_the_next_time(tmp_path: Path, venv: int, pip: int) -> None:
    failed = _make(tmp_path, venv=venv, pip=pip)
    assert failed.returncode != 0
    told = [line for line in failed.stderr.splitlines() if not line.startswith("make")]
    assert len(told) == 1
    assert "cannot make the environment .venv; on Debian and Ubuntu run: apt install python3-venv" in told[0]
    assert not (tmp_path / ".venv").exists()
    assert _make(tmp_path).returncode == 0
    assert (tmp_path / ".venv" / "venv.stamp").is_file()


def test_an_environment_left_half_made_is_repaired(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    _script(tmp_path / ".venv" / "bin" / "python", INNER.format(status=1))
    assert _make(tmp_path).returncode == 0
    (tmp_path / ".venv" / "venv.stamp").unlink()
    (tmp_path / ".venv" / "bin" / "python").unlink()
    (tmp_path / ".venv" / "bin" / "python").symlink_to(tmp_path / "gone")
    (tmp_path / ".venv" / "left").touch()
    assert _make(tmp_path).returncode == 0
    assert not (tmp_path / ".venv" / "left").exists()


def test_what_is_installed_in_a_whole_environment_stays(tmp_path: Path) -> None:
    assert _make(tmp_path, name=".venv-oldest").returncode == 0
    (tmp_path / ".venv-oldest" / "venv.stamp").unlink()
    (tmp_path / ".venv-oldest" / "installed").touch()
    assert _make(tmp_path, name=".venv-oldest").returncode == 0
    assert (tmp_path / ".venv-oldest" / "installed").exists()
