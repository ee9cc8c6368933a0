"""What the page's events answer: settings are held to their ranges and say so; reasons stay; links are not trusted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="needs the extra `demo`")

from phantomgrad_demo import photos  # noqa: E402
from phantomgrad_demo.guard import Refused  # noqa: E402
from phantomgrad_demo.handlers import Handlers  # noqa: E402
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


@pytest.mark.parametrize(
    ("wanted", "taken", "shown"),
    [(2, 2, SKIP), (0, 1, 1), (-7, 1, 1), (2.4, 2, 2), (2.6, 3, 3), (1e300, 60, 60), (99, 60, 60), (None, 24, 24)],
)
def test_steps_are_held_to_what_the_slider_has(
    handlers: Handlers, wanted: float | None, taken: int, shown: Any
) -> None:
    settings, steps, damping = handlers.checked("Anderson", wanted, 0.01, 0.7)
    assert (settings.max_steps, steps, damping) == (taken, shown, SKIP)


def test_damping_too(handlers: Handlers) -> None:
    for wanted, taken in ((0.0, 0.1), (7, 1.0), (None, 0.7)):
        settings, _, shown = handlers.checked("fixed point", 5, 0.01, wanted)
        assert settings.damping == shown == taken


def test_an_unknown_solver_or_tolerance_is_an_error(handlers: Handlers) -> None:
    with pytest.raises(gr.Error, match="The solver is one of"):
        handlers.checked("newton", 5, 0.01, 0.7)
    with pytest.raises(gr.Error, match="The tolerance is from"):
        handlers.checked("Anderson", 5, 0.0, 0.7)


def test_every_event_ends_with_the_answer(handlers: Handlers, photo: Image.Image) -> None:
    *_, (view, steps, damping) = handlers.show_settings(photo, "coffee", "fixed point", 3, 0.01, 0.7)
    assert not view["running"]
    assert len(view["rows"]) == 3
    assert view["link"]["example"] == "coffee"
    assert (steps, damping) == (SKIP, SKIP)
    *_, uploaded = handlers.show_upload(photo, "fixed point", 3, 0.01, 0.7)
    assert uploaded[0] == SKIP
    assert uploaded[1]["rows"] == view["rows"]
    assert uploaded[1]["link"] == {}
    event: Any = SimpleNamespace(example="rocket")
    first, *_ = handlers.show_example("fixed point", 3, 0.01, 0.7, event)
    assert isinstance(first[0], Image.Image)
    assert "SpaceX" in first[2]
    assert first[3] == "rocket"


@pytest.mark.parametrize("example", ["nothing", "../coffee", 0, None, ["coffee"]])
def test_examples_that_there_are_not(handlers: Handlers, example: object) -> None:
    event: Any = SimpleNamespace(example=example)
    with pytest.raises(gr.Error, match="There is no such example"):
        next(handlers.show_example(*OWN, event))
    with pytest.raises(gr.Error, match="The example of this link does not exist"):
        next(handlers.restore(event))


@pytest.mark.parametrize(
    ("parameters", "controls"),
    [
        ({}, OWN),
        ({"solver": "Broyden", "steps": "7", "tolerance": "0.001", "damping": "0.5"}, ("Broyden", 7, 0.001, 0.5)),
        ({"steps": "1e99", "tolerance": "7", "damping": "-3"}, ("fixed point", 60, 0.1, 0.1)),
        ({"steps": "nan", "tolerance": "x", "damping": None}, OWN),
    ],
)
def test_a_link_sets_what_it_can(handlers: Handlers, parameters: dict[str, Any], controls: tuple[Any, ...]) -> None:
    event: Any = SimpleNamespace(example="coffee", **parameters)
    first, *_ = handlers.restore(event)
    assert first[3] == "coffee"
    assert first[4:] == controls


def test_an_empty_field_leaves_the_answer(handlers: Handlers, photo: Image.Image) -> None:
    assert list(handlers.show_settings(photo, "", "Anderson", None, 0.01, 0.7)) == [(SKIP, SKIP, SKIP)]
    assert list(handlers.show_settings(None, "", "Anderson", 3, 0.01, 0.7)) == [(SKIP, SKIP, SKIP)]


def test_the_reason_takes_the_place_of_the_answer(handlers: Handlers, tabs: TabHandlers) -> None:
    refused = Refused(reason="The image is <cut>.")
    [(photo, view, credit, example, *_)] = handlers.show_upload(refused, *OWN)
    assert (photo, credit, example) == (None, "", "")
    assert view == {"running": False, "message": "The image is <cut>. Choose another photo.", "rows": []}
    panel = tabs.gradients(refused, 5, 0.5)
    assert "The image is &lt;cut&gt;." in panel.takeaway
    assert panel.result == ""
    assert "Choose, drop" in tabs.nearby(None, "shift", 5, *OWN).takeaway


def test_the_tabs_answer_for_what_their_sliders_can_say(tabs: TabHandlers, photo: Image.Image) -> None:
    assert tabs.gradients(photo, 1e9, -5).result
    assert tabs.nearby(photo, "crop", 1e9, *OWN).result
    assert tabs.compare(photo, "Anderson", 0, "fixed point", None, None, 0.01, None).result
    with pytest.raises(gr.Error, match="The change is one of"):
        tabs.nearby(photo, "rotation", 5, *OWN)
