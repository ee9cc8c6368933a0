"""What the page's events answer: steps are held to what the solver takes, and say so; reasons stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="needs the extra `demo`")

from phantomgrad_demo import photos  # noqa: E402
from phantomgrad_demo.guard import Refused  # noqa: E402
from phantomgrad_demo.handlers import Handlers  # noqa: E402
from phantomgrad_hub import MDEQ  # noqa: E402

SKIP = gr.skip()


@pytest.fixture(scope="module")
def handlers(model: MDEQ) -> Handlers:
    return Handlers(model=model, examples=photos.available())


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.radial_gradient("L").convert("RGB")


@pytest.mark.parametrize(
    ("wanted", "taken", "shown"),
    [(2, 2, SKIP), (0, 1, 1), (-7, 1, 1), (2.4, 2, 2), (2.6, 3, 3), (1e300, None, 24), (99, None, 24)],
)
def test_the_answer_is_for_the_steps_that_the_slider_shows(
    handlers: Handlers, photo: Image.Image, wanted: float, taken: int | None, shown: Any
) -> None:
    expected = handlers.show(photo, handlers.most_steps if taken is None else taken)
    assert handlers.show_steps(photo, wanted) == (*expected, shown)
    assert handlers.show_upload(photo, wanted) == (SKIP, *expected, "", shown)
    event: Any = SimpleNamespace(index=0)
    assert handlers.show_example(wanted, event)[-1] == shown


def test_an_empty_field_leaves_the_answer_until_there_is_another_photo(handlers: Handlers, photo: Image.Image) -> None:
    assert handlers.show_steps(photo, None) == (SKIP, SKIP, SKIP)
    assert handlers.show_upload(photo, None) == (SKIP, *handlers.show(photo, 24), "", 24)


def test_the_reason_takes_the_place_of_the_answer_and_stays(handlers: Handlers) -> None:
    shown, answer, figures, credit, steps = handlers.show_upload(Refused(reason="The image is <cut>."), 3)
    assert answer == '<p class="pg-sentence">The image is &lt;cut&gt;. Choose another photo.</p>'
    assert (shown, figures, credit, steps) == (None, "", "", SKIP)
    assert handlers.show_steps(None, 4) == (SKIP, SKIP, SKIP)


def test_programs_get_an_error(handlers: Handlers) -> None:
    with pytest.raises(gr.Error, match="The image is cut"):
        handlers.name_classes(Refused(reason="The image is cut."))
