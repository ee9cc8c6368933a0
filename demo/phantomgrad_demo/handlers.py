"""What the page's events do, for one model. Visitors' settings travel with each call; nothing of one is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL.Image import Image

from phantomgrad import PhantomGradError
from phantomgrad_hub import MDEQ
from phantomgrad_hub.photos import read_photo

from . import markup
from .figures import answer_bars, curves
from .guard import Refused, refusal
from .inference import classify, solver_of
from .photos import ExamplePhoto


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """Event handlers: photos and steps come as the guard gives them.

    Those that take steps also return what the slider is to show, where its field holds no number that it can take.
    """

    model: MDEQ
    examples: tuple[ExamplePhoto, ...]

    @property
    def most_steps(self) -> int:
        """The most steps a visitor may ask for: what the checkpoint's own solver takes."""
        return solver_of(self.model).max_steps

    def show(self, photo: Image | Refused | None, steps: int) -> tuple[str, str]:
        """The answer and its figures as HTML, or why there are none."""
        if photo is None:
            return markup.NO_PHOTO, ""
        if isinstance(photo, Refused):
            return markup.not_a_photo(photo.reason), ""
        try:
            answer = classify(self.model, photo, max_steps=steps)
        except PhantomGradError as error:
            return markup.not_a_photo(f"This photo could not be classified: {error}."), ""
        return answer_bars(answer), curves(answer)

    def show_steps(self, photo: Image | Refused | None, steps: float | None) -> tuple[Any, Any, Any]:
        """Answer, figures and steps after another number of steps was asked for."""
        if photo is None or steps is None:
            # Without a photo the page goes on saying why; an empty field is one that is being typed into.
            return gr.skip(), gr.skip(), gr.skip()
        taken, shown = self._steps(steps)
        return *self.show(photo, taken), shown

    def show_upload(self, photo: Image | Refused | None, steps: float | None) -> tuple[Any, str, str, str, Any]:
        """Photo, answer, figures, no credit, and steps; what is no photo leaves the page, with its reason."""
        taken, shown = self._steps(steps)
        return None if isinstance(photo, Refused) else gr.skip(), *self.show(photo, taken), "", shown

    def show_example(self, steps: float | None, event: gr.EventData) -> tuple[Image, str, str, str, Any]:
        """Photo, answer, figures, credit and steps of the example whose button was pressed."""
        # The index comes from the browser.
        index = getattr(event, "index", None)
        if not isinstance(index, int) or not 0 <= index < len(self.examples):
            raise refusal("there is no such example")
        photo = self.open_example(index)
        taken, shown = self._steps(steps)
        return photo, *self.show(photo, taken), markup.credit(self.examples[index]), shown

    def show_nothing(self) -> tuple[str, str, str]:
        """No answer, figures or credit: there is no photo."""
        return markup.NO_PHOTO, "", ""

    def name_classes(self, photo: Image | Refused | None) -> dict[str, float]:
        """Every class with its probability, best first."""
        if photo is None:
            raise refusal("send a photo")
        if isinstance(photo, Refused):
            raise refusal(photo.reason)
        try:
            return dict(classify(self.model, photo).probabilities)
        except PhantomGradError as error:
            raise refusal(str(error)) from error

    def open_example(self, index: int) -> Image:
        """An example photo."""
        path = self.examples[index].find()
        if path is None:
            raise refusal("this example is no longer there")
        return read_photo(path)

    def _steps(self, wanted: float | None) -> tuple[int, Any]:
        """The number of steps nearest to the one asked for, and what the slider is to show."""
        taken = self.most_steps if wanted is None else round(min(max(wanted, 1), self.most_steps))
        return taken, gr.skip() if taken == wanted else taken
