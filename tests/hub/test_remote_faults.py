"""A hub that fails: faults that pass are not noticed, others are one line, and the next try succeeds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
from fault_table import FAULTS, PASSING, Case, Table

pytestmark = pytest.mark.skipif(shutil.which("git") is None or os.name != "posix", reason="needs git and fork")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Generator[Table]:
    with Table(tmp_path_factory.mktemp("faults")) as made:
        yield made


def check(case: Case) -> None:
    assert case.second == "done", case
    assert not case.partial, case
    assert "\n" not in case.seen
    assert case.seen == "done" or case.seen.startswith(("HubError: ", "CheckpointNotFoundError: ")), case
    assert "Traceback" not in case.seen


@pytest.mark.parametrize("fault", sorted(FAULTS))
@pytest.mark.parametrize("doing", ["pull", "push"])
def test_a_fault_at_a_request_of_every_kind(doing: str, fault: str, table: Table) -> None:
    kinds = table.requests(doing)
    # The second of each kind where there is one: by then something has arrived.
    numbers = {kind: [index for index, other in enumerate(kinds, 1) if other == kind][:2][-1] for kind in kinds}
    for case in table.cases(doing, [fault], sorted(numbers.values())):
        check(case)
        # What is not a file has no checksum: an answer that is still JSON is believed.
        if fault in PASSING and not (fault == "corrupt" and case.request not in ("get", "lfs-get")):
            assert case.seen == "done", case


@pytest.mark.parametrize("doing", ["pull", "push"])
def test_a_kill_at_every_request_leaves_nothing_that_looks_complete(doing: str, table: Table) -> None:
    killed = 0
    for number in range(1, len(table.requests(doing)) + 1):
        case = table.killed(doing, number)
        assert case.second == "done", case
        assert not case.partial, case
        killed += case.seen == "killed"
    assert killed >= 5


def test_an_unreachable_hub_is_replaced_by_the_cache_with_a_warning(table: Table, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    found = table.worker("load", checkpoint="ann/model", cache_dir=cache)
    table.hub.fault(table_fault("503"))
    again = table.worker("load", checkpoint="ann/model", cache_dir=cache)
    assert again["digest"] == table.digest
    [warning] = again["warnings"]
    assert warning.startswith("the Hugging Face Hub cannot be reached (")
    assert warning.endswith(f"ann/model is the copy in the cache, commit {found['source']['commit'][:12]}")
    # A right that was taken away is no outage.
    table.hub.clear_faults()
    table.hub.fault(table_fault("404"))
    refused = table.worker("load", checkpoint="ann/model", cache_dir=cache)
    assert "CheckpointNotFoundError" in refused["kinds"]
    table.hub.clear_faults()


def table_fault(status: str):
    from local_hub import Fault

    return Fault(status=int(status), times=None)
