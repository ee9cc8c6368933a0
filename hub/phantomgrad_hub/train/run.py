"""The folder of a run: its configuration, its log, its checkpoints, and where it stands."""

from __future__ import annotations

import errno
import json
import pickle
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch

from phantomgrad_hub.errors import CheckpointError
from phantomgrad_hub.evaluation import Evaluation
from phantomgrad_hub.extras import require
from phantomgrad_hub.facts import Facts
from phantomgrad_hub.files import FACTS_FILE, FILES
from phantomgrad_hub.json_text import json_text
from phantomgrad_hub.models.mdeq import MDEQ
from phantomgrad_hub.text import printable, summarise

from .errors import TrainingError
from .files import repair_folder, write_file, write_folder, write_json
from .identity import data_difference, differences, harmless_changes

PACKAGES = ("phantomgrad", "torch", "torchvision", "accelerate", "datasets", "numpy", "pillow", "safetensors")


@dataclass
class Position:
    """How far a run is: the next batch to train on, and what it took to get there."""

    epoch: int = 0
    batch: int = 0
    """Batches done in this epoch, by each process."""
    step: int = 0
    """Optimizer steps done in all."""
    seconds: float = 0.0
    best_top1: float = -1.0
    awaiting_validation: bool = False
    """The epoch before `epoch` is trained, but not validated yet."""


class RunFolder:
    """Reads and writes `RUN`; only the main process writes."""

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.last, self.best = self.path / "last", self.path / "best"
        self._state = self.path / "state" / "state.pt"
        self._metrics = self.path / "metrics.jsonl"
        self._result = self.path / "result.json"
        self._config = self.path / "config.json"
        self._environment = self.path / "environment.json"
        self._writes = writes
        self._lock: Any = None
        self._saved_step: int | None = None
        self._changed: dict[str, list[Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def check(self, config: dict[str, Any]) -> None:
        """Raise `TrainingError` unless a run of `config` may start or go on here.

        It may in a new or empty folder, in its own, and in that of a run from which nothing has been saved.
        """
        if not self._writes:
            return
        if self.path.exists() and not self.path.is_dir():
            raise TrainingError(f"{self.path} is a file; give a folder.")
        if not self._config.is_file():
            if self.path.is_dir() and any(entry.name != ".gitignore" for entry in self.path.iterdir()):
                raise TrainingError(f"{self.path} is not empty and is no run; give another folder.")
            return
        stored, new = self._read_config(), json.loads(json_text(config))
        if not any(path.exists() for path in (self._state, self.last, self.best)):
            return
        keys = differences(stored, new)
        if settings := [key for key in keys if not key.startswith("data.")]:
            raise TrainingError(
                f"{self.path} holds a run with another configuration: {summarise(settings, 5)} "
                f"{'differs' if len(settings) == 1 else 'differ'}. Resume with the same command, or give another folder."
            )
        if keys:
            what = printable(data_difference(stored["data"], new["data"]), longest=300)
            raise TrainingError(
                f"{self.path} holds a run on other data: {what}. Resume on the data as it was, or give another folder."
            )
        self._changed = harmless_changes(stored, new)

    def open(self, config: dict[str, Any]) -> None:
        """Create the folder for a run of `config`, or make that which is there ready; raises `TrainingError`.

        No other process can open it until this one leaves the folder's context, or ends.
        """
        if not self._writes:
            return
        self.check(config)
        try:
            self._state.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            for checkpoint in (self.last, self.best):
                repair_folder(checkpoint)
            if not self._state.is_file():
                # Nothing that an earlier start left behind belongs to a run that starts anew.
                for file in (self._metrics, self._result, self._environment):
                    file.unlink(missing_ok=True)
            # That of an earlier release lacks what later resumes are compared with.
            write_json(self._config, config)
        except OSError as error:
            cure = _cure(error)
            cure = "give" if cure is None else f"{cure[0].lower()}{cure[1:]}, or give"
            raise TrainingError(f"{self.path} cannot be written: {error.strerror}; {cure} another folder.") from error

    def _take_lock(self) -> None:
        filelock = require("filelock", "train")
        lock = filelock.FileLock(self._state.parent / "lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise TrainingError(
                f"{self.path} is in use: another process trains there. Wait for it, stop it, or give another folder."
            ) from error
        self._lock = lock

    def _read_config(self) -> dict[str, Any]:
        """The configuration of the run that is here."""
        try:
            stored = json.loads(self._config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TrainingError(f"{self._config} is damaged ({error}); give another folder.") from error
        # A checkpoint, and many a project, has a config.json too.
        if not (isinstance(stored, dict) and {"recipe", "config"} <= stored.keys()):
            raise TrainingError(f"{self.path} is not empty and is no run; give another folder.")
        return stored

    def load_state(self) -> dict[str, Any] | None:
        """What `save` stored, None where the run has not been saved yet."""
        if not self._state.is_file():
            return None
        try:
            return torch.load(self._state, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise TrainingError(
                f"{self._state} is damaged; delete {self._state.parent} to start the run anew."
            ) from error

    @contextmanager
    def restoring(self) -> Generator[None, None, None]:
        """Turn what goes wrong when a state that is not this run's is taken up into one line that says what to do."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{self._state} is not the state of this run; delete {self._state.parent} to start the run anew."
            ) from error

    def restored(self, position: Position) -> None:
        """Go on at `position`; raises `TrainingError` where the best checkpoint of the run until there has gone."""
        self._saved_step = position.step
        if position.best_top1 >= 0 and not all((self.best / name).is_file() for name in FILES):
            raise TrainingError(
                f"{self.best} is missing or incomplete: put it back from a copy, or delete {self._state.parent} to start the run "
                "anew."
            )

    def save(self, state: dict[str, Any], model: MDEQ) -> None:
        """Store where training stands, and the model it would hand out now as `RUN/last`.

        Raises `TrainingError` where they cannot be written, and where the weights have stopped being finite: a run must
        not resume from there.
        """
        for part in ("model", "average"):
            self._check_finite(state[part], state["position"]["step"])
        if not self._writes:
            self._saved_step = state["position"]["step"]
            return

        def write_state(partial: Path) -> None:
            # To a file of Python's: what goes wrong is then an `OSError`, else a message of torch's own.
            with partial.open("wb") as file:
                torch.save(state, file)

        with self._writing():
            # The state goes first: `last` can be made again from it, but not the other way round.
            write_file(self._state, write_state)
        self._saved_step = state["position"]["step"]
        self.save_checkpoint(self.last, model)

    def _check_finite(self, weights: dict[str, torch.Tensor], step: int) -> None:
        if bad := [key for key, value in weights.items() if not torch.isfinite(value).all()]:
            raise TrainingError(
                f"{summarise(bad, 1)} became infinite or NaN by step {step}; {self.path} {self.held()}. "
                "Start another run with a lower optimizer.lr or a lower clip."
            )

    def held(self) -> str:
        """What is there to resume from."""
        return "holds nothing yet" if self._saved_step is None else f"still holds step {self._saved_step}"

    def save_checkpoint(self, folder: Path, model: MDEQ) -> None:
        """Put a checkpoint of `model` in the place of `folder`; raises `TrainingError`."""
        if self._writes:
            with self._writing():
                write_folder(folder, model.save_pretrained)

    @contextmanager
    def _writing(self) -> Generator[None, None, None]:
        """Turn a full disk, and whatever else keeps files from being written, into one line that says what to do."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointError) as error:
            cause = _cause(error)
            if cause is None:
                raise
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            cure = _cure(cause) or "Make it writable"
            raise TrainingError(
                f"{self.path} cannot be written: {reason}; it {self.held()}. {cure}, then the same command goes on."
            ) from error

    def save_result(self, result: dict[str, Any]) -> None:
        """Store the evaluation of the finished run; raises `TrainingError`."""
        if self._writes:
            with self._writing():
                write_json(self._result, result)

    def save_facts(self, facts: Facts) -> None:
        """Tell the card of the best checkpoint about the finished run; raises `TrainingError`."""
        if self._writes:
            with self._writing():
                write_json(self.best / FACTS_FILE, facts.to_dict())

    def load_result(self) -> dict[str, Any] | None:
        """What `save_result` stored; None before the run is finished. Raises `TrainingError` where it is damaged."""
        if not self._result.is_file():
            return None
        with _intact(self._result):
            stored = json.loads(self._result.read_text(encoding="utf-8"))
            Evaluation.from_dict(stored)
            return stored

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics; raises `TrainingError`."""
        if self._writes:
            with self._writing(), self._metrics.open("a", encoding="utf-8") as file:
                file.write(json_text(record) + "\n")

    def rewind_log(self, position: Position) -> None:
        """Drop the lines that a run resumed at `position` writes again; raises `TrainingError` where one is of no run."""
        if not (self._writes and self._metrics.is_file()):
            return
        kept = []
        with _intact(self._metrics):
            for line in self._metrics.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # the line that a kill cut short
                    break
                repeated = position.awaiting_validation and record["type"] == "validation"
                if record["step"] < position.step or (record["step"] == position.step and not repeated):
                    kept.append(line + "\n")
        with self._writing():
            write_file(self._metrics, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))

    def log_resume(self, step: int) -> None:
        """Say in the log with which other settings than before the run goes on; raises `TrainingError`."""
        if self._changed:
            self.log({"type": "resume", "step": step, "changed": self._changed})

    def log_environment(self, device: torch.device, processes: int, step: int) -> None:
        """Add this session to `environment.json`: versions, machine, and the step it starts at."""
        if not self._writes:
            return
        sessions = []
        if self._environment.is_file():
            with _intact(self._environment):
                sessions = [*json.loads(self._environment.read_text(encoding="utf-8"))["sessions"]]
        sessions.append({"step": step, "device": _device_name(device), "processes": processes} | _environment())
        with self._writing():
            write_json(self._environment, {"sessions": sessions})


@contextmanager
def _intact(file: Path) -> Generator[None, None, None]:
    """Turn what goes wrong when `file` is read into one line that says to delete it: the run can do without."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{file} is damaged; delete it, then the same command goes on.") from error


def _cause(error: BaseException | None) -> BaseException | None:
    """What the system, or safetensors, said when a file could not be written; None where `error` is about something else."""
    safetensors = require("safetensors")
    while error is not None and not isinstance(error, OSError | safetensors.SafetensorError):
        error = error.__cause__ or error.__context__
    return error


def _cure(error: BaseException) -> str | None:
    """What helps where the folder itself could be written; None where it cannot."""
    number = getattr(error, "errno", None)
    if number == errno.EFBIG:
        return "Raise the limit on the size of files (ulimit -f)"
    return "Free some space" if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) else None


def _environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": sys.version.split()[0],
        "packages": versions,
    }


def machine(device: torch.device, processes: int) -> str:
    """What a run runs on, in words."""
    threads = f", {processes * torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{'' if processes == 1 else f'{processes} processes on '}{_device_name(device)}{threads}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"
