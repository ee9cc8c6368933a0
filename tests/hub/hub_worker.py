"""A client of the local hub in a process of its own: every command of a test runs in a fresh fork of it.

The client reads its environment at import, so it cannot run in the test's process; importing torch takes seconds, so a process
for each command would be slow. `Worker` is the test's side, `main` the process's. Waits of the client and of the library are
cut short; how long they would have been is in the reply.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Worker:
    """Runs commands in forks of one process with the given environment."""

    def __init__(self, environment: dict[str, str], home: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=home,
        )
        self._lock = threading.Lock()
        self.pid = 0

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The reply of a command: `error` and `message` where it raised, `killed` where a signal ended it."""
        with self._lock:
            self.start(do, **arguments)
            return self.reply()

    def start(self, do: str, **arguments: Any) -> None:
        """Begin a command; `reply` waits for its end, and `kill` ends it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        self.pid = int(self._line()["pid"])

    def reply(self) -> dict[str, Any]:
        """What the command that was begun gave."""
        found = self._line()
        self.pid = 0
        return found

    def kill(self) -> None:
        """End the running command as `kill -9` does."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the worker has ended"
        return json.loads(line)


def digest(model: Any) -> str:
    """One digest of all weights, bit by bit."""
    found = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        found.update(key.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def load(checkpoint: str, *, solve: bool = True, **options: Any) -> dict[str, Any]:
    """Load a checkpoint: digest of its weights, logits of a fixed image if asked for, where it came from."""
    import torch

    from phantomgrad_hub import MDEQ

    model = MDEQ.from_pretrained(checkpoint, **options)
    source = None if model.source is None else model.source.to_dict()
    found = {"digest": digest(model), "source": source}
    if not solve:
        return found
    torch.manual_seed(0)
    images = torch.randn(2, 3, *[model.config.image_size] * 2)
    with torch.inference_mode():
        logits = model(images)
    return {**found, "logits": logits.flatten().tolist()}


def push(folder: str, repository: str, **options: Any) -> dict[str, Any]:
    """Publish a folder."""
    from phantomgrad_hub.remote.push import push as published

    done = published(Path(folder), repository, **options)
    return {"url": done.url, "commit": done.commit, "sent": list(done.sent), "kept_card": done.kept_card}


def push_model(checkpoint: str, repository: str, **options: Any) -> dict[str, Any]:
    """Publish a model from Python."""
    from phantomgrad_hub import MDEQ

    done = MDEQ.from_pretrained(checkpoint).push_to_hub(repository, **options)
    return {"commit": done.commit, "sent": list(done.sent)}


def command(arguments: list[str]) -> dict[str, Any]:
    """Run the command line."""
    import contextlib
    import io

    from phantomgrad_hub.cli.main import main as program

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = program(arguments)
    return {"status": status, "out": out.getvalue(), "err": err.getvalue()}


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (load, push, push_model, command)
}


def _execute(request: dict[str, Any]) -> dict[str, Any]:
    import time

    waits: list[float] = []
    sleep = time.sleep

    def short(seconds: float) -> None:
        waits.append(seconds)
        sleep(min(seconds, 0.01))

    time.sleep = short
    do = request.pop("do")
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            found: dict[str, Any] = COMMANDS[do](**request)
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            found = {"error": type(error).__name__, "kinds": kinds, "message": str(error)}
    told = [str(warning.message) for warning in noted if warning.category is UserWarning]
    return {**found, "warnings": told, "waited": round(sum(waits), 2)}


def main() -> None:
    """Read one command a line, run each in a fork, and write its process's number and its reply, one a line."""
    import torch

    import phantomgrad_hub.cli.main
    import phantomgrad_hub.models.mdeq
    import phantomgrad_hub.remote.push  # noqa: F401

    answers, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    for line in sys.stdin:
        wait, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(wait, 1)
            torch.set_num_threads(1)
            _write(answers, _execute(json.loads(line)))
            os._exit(0)
        _write(answers, {"pid": child})
        os.write(go, b"!")
        os.close(go)
        os.close(wait)
        _, ended = os.waitpid(child, 0)
        if os.WIFSIGNALED(ended):
            _write(answers, {"killed": os.WTERMSIG(ended)})


def _write(stream: int, value: dict[str, Any]) -> None:
    os.write(stream, (json.dumps(value) + "\n").encode())


if __name__ == "__main__":
    main()
