"""What the page's events answer: settings are held to their ranges and say so; reasons stay; links are not trusted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="needs the extra `demo`")

from phantomgrad_demo import photos  # noqa: E402
from phantomgrad_demo.guard import UNSEEN, Refused  # noqa: E402
from phantomgrad_demo.handlers import Handlers  # noqa: E402
from phantomgrad_demo.settings import Settings  # noqa: E402
from phantomgrad_demo.tab_handlers import TabHandlers  # noqa: E402
from phantomgrad_hub import MDEQ  # noqa: E402

SKIP = gr.skip()
OWN = ("fixed point", 24, 0.01, 0.7)


@pytest.fixture(scope="module")
def handlers(model: MDEQ) -> Handlers:
    return Handlers(model=model, examples=photos.available(), checkpoint="embedded")


@pytest.fixture(scope="module")
def tabs(handlers: Handlers) -> TabHandlers:
    return TabHandlers(page=handlers, accuracy={})


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.radial_gradient("L").convert("RGB")


def event(**data: Any) -> Any:
    """What Gradio makes of the data of an event of the page's script."""
    return SimpleNamespace(**data)


@pytest.mark.parametrize(
    ("wanted", "taken", "shown"),
    [(2, 2, SKIP), (0, 1, 1), (-7, 1, 1), (2.4, 2, 2), (2.6, 3, 3), (1e300, 60, 60), (99, 60, 60), (None, 24, SKIP)],
)
def test_steps_are_held_to_what_the_slider_has(
    handlers: Handlers, wanted: float | None, taken: int, shown: Any
) -> None:
    settings, steps, damping = handlers.checked("Anderson", wanted, 0.01, 0.7)
    assert (settings.max_steps, steps, damping) == (taken, shown, SKIP)


def test_damping_too(handlers: Handlers) -> None:
    for wanted, taken, shown in ((0.0, 0.1, 0.1), (7, 1.0, 1.0), (None, 0.7, SKIP)):
        settings, _, corrected = handlers.checked("fixed point", 5, 0.01, wanted)
        assert (settings.damping, corrected) == (taken, shown)


def test_an_unknown_solver_or_tolerance_is_an_error(handlers: Handlers) -> None:
    with pytest.raises(gr.Error, match="The solver is one of"):
        handlers.checked("newton", 5, 0.01, 0.7)
    with pytest.raises(gr.Error, match="The tolerance is from"):
        handlers.checked("Anderson", 5, 0.0, 0.7)


def test_the_source_says_which_photo_is_solved(handlers: Handlers, photo: Image.Image) -> None:
    (first, *_, last) = handlers.show(photo, "own#1", "fixed point", 3, 0.01, 0.7)
    shown, view, credit, source, steps, damping = last
    assert not view["running"]
    assert len(view["rows"]) == 3
    assert view["link"] == {}
    assert (shown, source, steps, damping) == (SKIP, SKIP, SKIP, SKIP)
    assert (first[0], first[2]) == (SKIP, "")
    assert credit == SKIP
    (first, *_, last) = handlers.show(photo, "rocket#2", "fixed point", 3, 0.01, 0.7)
    assert isinstance(first[0], Image.Image)
    assert "SpaceX" in first[2]
    assert last[1]["link"]["example"] == "rocket"
    assert last[1]["rows"] != view["rows"]
    # What is there already is not sent again.
    (again, *_) = handlers.show(handlers.open_example("rocket"), "rocket#2", "fixed point", 3, 0.01, 0.7)
    assert again[0] == SKIP


def test_a_photo_that_browsers_cannot_show_is_sent_back(handlers: Handlers) -> None:
    given = Image.new("RGB", (3000, 1500), (200, 40, 40))
    given.info[UNSEEN] = True
    (first, *_) = handlers.show(given, "own#1", "fixed point", 1, 0.01, 0.7)
    assert first[0].size == (1024, 512)


@pytest.mark.parametrize("source", ["nothing#1", "../coffee#1", "", 0, None, ["coffee"]])
def test_a_source_that_there_is_not_means_the_photo(handlers: Handlers, photo: Image.Image, source: object) -> None:
    (first, *_) = handlers.show(photo, source, *OWN)
    assert (first[0], first[2]) == (SKIP, "")
    [nothing] = handlers.show(None, source, *OWN)
    assert "Choose, drop" in nothing[1]["message"]


@pytest.mark.parametrize("example", ["nothing", "../coffee", 0, None, ["coffee"]])
def test_a_link_to_an_example_that_there_is_not_changes_nothing(handlers: Handlers, example: object) -> None:
    with pytest.warns(UserWarning, match="The example of this link does not exist"):
        assert handlers.restore(event(example=example)) == (SKIP,) * 5


@pytest.mark.parametrize(
    ("parameters", "controls"),
    [
        ({}, OWN),
        ({"solver": "Broyden", "steps": "7", "tolerance": "0.001", "damping": "0.5"}, ("Broyden", 7, 0.001, 0.5)),
        ({"steps": "1e99", "tolerance": "7", "damping": "-3"}, ("fixed point", 60, 0.1, 0.1)),
        ({"steps": "nan", "tolerance": "x", "damping": None}, OWN),
        ({"solver": ["newton"], "steps": 10**400}, OWN),
    ],
)
def test_a_link_sets_what_it_can(handlers: Handlers, parameters: dict[str, Any], controls: tuple[Any, ...]) -> None:
    source, *found = handlers.restore(event(example="coffee", **parameters))
    assert source.startswith("coffee#")
    assert tuple(found) == controls


def test_an_empty_field_means_the_checkpoint_s_own_number_and_stays_empty(
    handlers: Handlers, photo: Image.Image
) -> None:
    *_, last = handlers.show(photo, "own#1", "fixed point", None, 1e-4, None)
    assert last[1]["link"] == {}
    assert last[4:] == (SKIP, SKIP)


def test_a_dropped_run_shows_nothing_more_and_a_stopped_one_its_last_steps(
    handlers: Handlers, photo: Image.Image
) -> None:
    for end, wanted in ((handlers.drop, []), (handlers.stop, [False])):
        views = handlers.solve(photo, "", Settings(solver="fixed point", max_steps=60, tolerance=1e-5))
        running = next(views)
        assert running["running"]
        end(event(run="another"))
        end(event(run=None))
        end(event(run=running["run"]))
        assert [each["running"] for each in views if not each["running"]] == wanted
        assert running["run"] not in handlers.runs


def test_the_reason_takes_the_place_of_the_answer(handlers: Handlers, tabs: TabHandlers) -> None:
    refused = Refused(reason="The image is <cut>.")
    [(photo, view, credit, source, *_)] = handlers.show(refused, "own#1", *OWN)
    assert (photo, credit) == (None, "")
    assert view == {"running": False, "message": "The image is <cut>. Choose another photo.", "rows": []}
    # It stays when a setting is changed.
    assert list(handlers.show(None, source, *OWN)) == [(SKIP,) * 6]
    [panel] = tabs.gradients(refused, "own#1", 5, 0.5)
    assert "The image is &lt;cut&gt;." in panel.takeaway
    assert panel.result == ""
    [panel] = tabs.nearby(None, "none#1", "shift", 5, *OWN)
    assert "Choose, drop" in panel.takeaway


def test_the_tabs_answer_for_what_their_sliders_can_say(tabs: TabHandlers, photo: Image.Image) -> None:
    for found in (
        tabs.gradients(photo, "own#1", 1e9, -5),
        tabs.nearby(photo, "own#1", "crop", 1e9, *OWN),
        tabs.compare(photo, "own#1", "Anderson", 0, "fixed point", None, None, 0.01, None),
    ):
        working, panel = found
        assert "Computing" in working.takeaway
        for part in (*working, *panel):
            assert part.startswith('<div data-source="own#1">')
        assert "<figure" in panel.result
    with pytest.raises(gr.Error, match="The change is one of"):
        list(tabs.nearby(photo, "own#1", "rotation", 5, *OWN))
