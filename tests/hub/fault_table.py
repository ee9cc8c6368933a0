"""What a user sees where the Hub fails: every fault at every request of a pull and of a push, and the try after it.

`python tests/hub/fault_table.py` runs all of it and writes `benchmarks/results/hub_faults.json` and the table of
`docs/hub.md`; the tests run a part.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hub_worker import Worker, digest
from local_hub import Fault, LocalHub
from small import pooled_config

from phantomgrad_hub import MDEQ
from phantomgrad_hub.facts import Facts

ROOT = Path(__file__).parents[2]
FAULTS: dict[str, dict[str, Any]] = {
    "401": {"status": 401},
    "403": {"status": 403},
    "404": {"status": 404},
    "412": {"status": 412},
    "429, wait 2 s": {"status": 429, "headers": {"Retry-After": "2"}},
    "429, wait 600 s": {"status": 429, "headers": {"Retry-After": "600"}, "times": 3},
    "500": {"status": 500},
    "503": {"status": 503},
    "503 for ever": {"status": 503, "times": None},
    "reset": {"action": "reset"},
    "cut short": {"action": "cut", "after_bytes": 10},
    "reset in the body": {"action": "reset-body", "after_bytes": 10},
    "corrupt": {"action": "corrupt"},
    "slow": {"action": "slow", "delay": 0.2},
    "answer lost": {"action": "lost-answer"},
}
PASSING = {"429, wait 2 s", "500", "503", "reset", "cut short", "reset in the body", "corrupt", "slow", "answer lost"}
"""Faults that end by themselves: the user sees nothing of them."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault at one request, and what came of it."""

    doing: str
    number: int
    request: str
    fault: str
    seen: str
    """What the user saw: `done`, or the message."""
    partial: bool
    """Whether anything but the whole checkpoint was loaded, or stood in the repository."""
    second: str
    """What the next try, without the fault, gave."""


class Table:
    """Runs cases against a local hub of its own; a context manager."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        torch.manual_seed(0)
        model = MDEQ(pooled_config())
        model.facts = Facts(title="Faults")
        self.folder = scratch / "checkpoint"
        model.save_pretrained(self.folder)
        self.digest = digest(model)
        self._count = 0

    def __enter__(self) -> Table:
        self.hub = LocalHub().__enter__()
        self.hub.add_user("ann", token="hf_ann", role="write")
        home = self._scratch / "home"
        home.mkdir()
        self.worker = Worker(self.hub.environment(home, token="hf_ann"), home)
        assert "error" not in self._push("ann/model")
        self._whole = self.hub.files("ann/model", "main")
        del self._whole[".gitattributes"]  # which the hub makes
        return self

    def __exit__(self, *exc: object) -> None:
        self.worker.close()
        self.hub.__exit__(*exc)

    def requests(self, doing: str) -> list[str]:
        """The kinds of requests that `doing`, `pull` or `push`, makes, in order."""
        self._fresh()
        reply = self._do(doing)
        assert "error" not in reply, reply
        return [request.kind for request in self.hub.requests]

    def case(self, doing: str, number: int, fault: str) -> Case:
        """`fault` at request `number`, counted from 1, of `doing`; then `doing` again without it."""
        self._fresh()
        self.hub.fault(
            Fault(number=number, **FAULTS[fault])
            if FAULTS[fault].get("times", 1) == 1
            else self._lasting(doing, number, fault)
        )
        first = self._do(doing)
        seen = [request.kind for request in self.hub.requests]
        self.hub.clear_faults()
        partial = self._is_partial(doing, first)
        second = self._do(doing)
        partial = partial or self._is_partial(doing, second)
        return Case(
            doing=doing,
            number=number,
            request=seen[number - 1] if number <= len(seen) else "not made",
            fault=fault,
            seen=_told(first),
            partial=partial,
            second=_told(second),
        )

    def _lasting(self, doing: str, number: int, fault: str) -> Fault:
        """A fault that stays: of the kind of request `number`, from the first such request on."""
        kind = self._kinds[doing][number - 1]
        return Fault(kind=kind, **FAULTS[fault])

    def cases(self, doing: str, faults: Iterable[str] = FAULTS, numbers: Iterable[int] | None = None) -> Iterator[Case]:
        """Every fault at every request, or at those of `numbers`."""
        self._kinds = {doing: self.requests(doing)}
        for number in range(1, len(self._kinds[doing]) + 1) if numbers is None else numbers:
            for fault in faults:
                yield self.case(doing, number, fault)

    def killed(self, doing: str, number: int) -> Case:
        """The client killed by signal 9 while request `number` is under way; then `doing` again."""
        self._fresh()

        def kill(request: Any) -> None:
            if request.number == number:
                self.worker.kill()

        self.hub.on_request = kill
        first = self._do(doing)
        self.hub.on_request = None
        seen = [request.kind for request in self.hub.requests]
        partial = self._is_partial(doing, first) or self._offline_is_partial(doing)
        second = self._do(doing)
        return Case(
            doing=doing,
            number=number,
            request=seen[number - 1] if number <= len(seen) else "not made",
            fault="killed",
            seen="killed" if first.get("killed") == 9 else _told(first),
            partial=partial or self._is_partial(doing, second),
            second=_told(second),
        )

    def _fresh(self) -> None:
        """A cache and a repository that nothing has happened to yet."""
        self._count += 1
        self._cache = self._scratch / f"cache{self._count}"
        shutil.rmtree(self._scratch / f"cache{self._count - 1}", ignore_errors=True)
        self._repository = f"ann/pushed{self._count}"
        self.hub.clear_faults()
        self.hub.reset_requests()

    def _do(self, doing: str) -> dict[str, Any]:
        if doing == "push":
            return self._push(self._repository)
        return self.worker("load", checkpoint="ann/model", cache_dir=str(self._cache))

    def _push(self, repository: str) -> dict[str, Any]:
        return self.worker("push", folder=str(self.folder), repository=repository)

    def _is_partial(self, doing: str, reply: dict[str, Any]) -> bool:
        if doing == "pull":
            return "digest" in reply and reply["digest"] != self.digest
        if not self.hub.exists(self._repository):
            return False
        history = self.hub.commits(self._repository, "main")
        there = {
            name: content for name, content in self.hub.files(self._repository, "main").items() if name in self._whole
        }
        # Nothing yet, or the whole checkpoint, whose card names its own repository.
        whole = there.keys() == self._whole.keys() and all(
            there[name] == self._whole[name] for name in there if name != "README.md"
        )
        return bool(there) and not (whole and len(history) <= 2)

    def _offline_is_partial(self, doing: str) -> bool:
        """Whether what a killed pull left in the cache is taken for a checkpoint, without the Hub."""
        if doing == "push":
            return False
        reply = self.worker("load", checkpoint="ann/model", cache_dir=str(self._cache), local_files_only=True)
        return "digest" in reply and reply["digest"] != self.digest


def _told(reply: dict[str, Any]) -> str:
    return f"{reply['error']}: {reply['message']}" if "error" in reply else "done"


def main() -> None:
    """Run everything, print the sums, write the JSON."""
    with tempfile.TemporaryDirectory() as scratch, Table(Path(scratch)) as table:
        found = []
        for doing in ("pull", "push"):
            for case in table.cases(doing):
                found.append(case)
                print(
                    f"{case.doing} {case.number} {case.request}: {case.fault}: {case.seen} -> {case.second}", flush=True
                )
            for number in range(1, len(table.requests(doing)) + 1):
                found.append(table.killed(doing, number))
                print(f"{doing} {number} {found[-1].request}: killed -> {found[-1].second}", flush=True)
        text = json.dumps([asdict(case) for case in found], indent=1).replace(
            table.hub.endpoint, "https://huggingface.co"
        )
    (ROOT / "benchmarks/results/hub_faults.json").write_text(text + "\n", encoding="utf-8")
    bad = [case for case in found if case.partial or case.second != "done"]
    print(f"{len(found)} cases, {sum(case.seen == 'done' for case in found)} unnoticed, {len(bad)} bad")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
