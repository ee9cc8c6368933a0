"""While the solver runs its steps arrive on the page, and Stop or leaving ends the solve; others are not kept waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="needs the extra `dev`")

from browsing import opened, says, told
from conftest import serve
from playwright.sync_api import Browser, Page, expect


@pytest.fixture(scope="module")
def slow_page(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page whose every solver step takes a fifth of a second more."""
    with serve(checkpoint, tmp_path_factory.mktemp("slow") / "page", seconds_per_step=0.2) as address:
        yield address


def is_running(tab: Page) -> None:
    """Wait for the second step, or a later one, of a solve that goes on."""
    tab.wait_for_function(
        """() => document.querySelector('[data-running=true]') &&
            /^Step ([2-9]|1\\d):/.test(document.querySelector('#pg-answer .pg-sentence').textContent)"""
    )


def test_steps_arrive_one_by_one_until_stop(browser: Browser, slow_page: str) -> None:
    with opened(browser, slow_page) as tab:
        tab.locator("#pg-tolerance").get_by_label("1e-4").check()  # takes some twenty steps
        stop = tab.get_by_role("button", name="Stop")
        is_running(tab)
        expect(stop).to_be_visible()
        assert tab.locator("#pg-curves svg[role=img]").count() == 2
        expect(tab.locator("#pg-answer .pg-play")).to_be_disabled()
        stop.click()
        says(tab, "at your wish, before its tolerance of 1e-4")
        stopped = told(tab)
        expect(stop).to_be_hidden()
        tab.wait_for_timeout(1500)  # many more steps, had it gone on
        assert told(tab) == stopped
        # What there is can still be scrubbed and played.
        expect(tab.locator("#pg-answer .pg-play")).to_be_enabled()
        tab.get_by_role("slider", name="Solver step", exact=True).press("Home")
        says(tab, "Step 1:")
        tab.get_by_role("slider", name="Solver step", exact=True).press("End")
        assert told(tab) == stopped
        # The next solve streams again.
        tab.get_by_role("button", name="Dahlia").click()
        is_running(tab)
        expect(stop).to_be_visible()
        says(tab, "Settled after")


def test_whoever_looks_at_an_earlier_step_stays_there(browser: Browser, slow_page: str) -> None:
    with opened(browser, slow_page) as tab:
        tab.locator("#pg-tolerance").get_by_label("1e-4").check()
        is_running(tab)
        tab.get_by_role("slider", name="Solver step", exact=True).press("Home")
        tab.wait_for_timeout(900)
        assert told(tab).startswith("Step 1:")
        assert not tab.locator("#pg-answer .pg-stop").is_hidden()


def test_who_leaves_stops_the_solve_for_whoever_waits(browser: Browser, slow_page: str) -> None:
    with opened(browser, slow_page) as waiting:
        with opened(browser, slow_page) as leaving:
            leaving.locator("#pg-tolerance").get_by_label("1e-4").check()
            is_running(leaving)
        began = time.perf_counter()
        waiting.get_by_role("button", name="Rocket launch").click()
        is_running(waiting)
        assert time.perf_counter() - began < 10
        says(waiting, "Settled after")
