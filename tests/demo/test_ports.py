"""A port in use is one line; without a wish the next free one is taken."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from phantomgrad_demo import ports
from phantomgrad_demo.ports import PortInUseError, claim_port
from phantomgrad_hub.cli.main import main


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield listener.getsockname()[1]


def test_a_free_port_is_the_one_asked_for(taken: int) -> None:
    free = claim_port("127.0.0.1", 0)
    assert free not in (0, taken)
    assert claim_port("127.0.0.1", free) == free


def test_a_port_in_use_is_refused(taken: int) -> None:
    with pytest.raises(PortInUseError, match=f"^port {taken} of 127.0.0.1 is in use; "):
        claim_port("127.0.0.1", taken)


def test_without_a_wish_the_next_free_one_is_taken(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "FIRST_PORT", taken)
    assert taken < claim_port("127.0.0.1", None) < taken + 100


def test_an_unknown_host_is_one_line() -> None:
    with pytest.raises(OSError, match=r"^there is no address no-such-host\.invalid on this machine$"):
        claim_port("no-such-host.invalid", 0)


def test_the_command_line_says_so_in_one_line(taken: int, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--checkpoint", str(checkpoint), "--port", str(taken)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"phantomgrad demo: port {taken} of 127.0.0.1 is in use; ")
    assert captured.err.count("\n") == 1


def test_a_missing_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--checkpoint", str(tmp_path / "nothing"), "--port", "0"]) == 1
    assert capsys.readouterr().err == f"phantomgrad demo: there is no checkpoint folder {tmp_path / 'nothing'}\n"
