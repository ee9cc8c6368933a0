"""What the page's events do, for one model. Visitors' settings travel with each call; nothing of one is kept."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr
from PIL.Image import Image

from phantomgrad import PhantomGradError
from phantomgrad_hub import MDEQ
from phantomgrad_hub.photos import read_photo

from . import markup
from .answer import Answer
from .figures import answer_bars, curves
from .guard import refusal
from .inference import classify, solver_of
from .photos import ExamplePhoto


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """Event handlers: photos come upright and in RGB from the guard, steps as the slider sends them."""

    model: MDEQ
    examples: tuple[ExamplePhoto, ...]

    @property
    def most_steps(self) -> int:
        """The most steps a visitor may ask for: what the checkpoint's own solver takes."""
        return solver_of(self.model).max_steps

    def show(self, photo: Image | None, steps: int) -> tuple[str, str]:
        """The answer and its figures as HTML."""
        if photo is None:
            return markup.NO_PHOTO, ""
        answer = self._answer(photo, steps)
        return answer_bars(answer), curves(answer)

    def show_upload(self, photo: Image | None, steps: int) -> tuple[str, str, str]:
        """The same, and no credit."""
        return *self.show(photo, steps), ""

    def show_example(self, steps: int, event: gr.EventData) -> tuple[Image, str, str, str]:
        """The photo, answer, figures and credit of the example whose button was pressed."""
        # The index comes from the browser.
        index = getattr(event, "index", None)
        if not isinstance(index, int) or not 0 <= index < len(self.examples):
            raise refusal("there is no such example")
        photo = self.open_example(index)
        return photo, *self.show(photo, steps), markup.credit(self.examples[index])

    def show_nothing(self) -> tuple[str, str, str]:
        """No answer, figures or credit: what was sent could not be used."""
        return markup.NO_PHOTO, "", ""

    def name_classes(self, photo: Image | None) -> dict[str, float]:
        """Every class with its probability, best first."""
        if photo is None:
            raise refusal("send a photo")
        return dict(self._answer(photo, self.most_steps).probabilities)

    def open_example(self, index: int) -> Image:
        """An example photo."""
        path = self.examples[index].find()
        if path is None:
            raise refusal("this example is no longer there")
        return read_photo(path)

    def _answer(self, photo: Image, steps: int) -> Answer:
        try:
            # Gradio does not hold visitors to the slider's range.
            return classify(self.model, photo, max_steps=min(max(int(steps), 1), self.most_steps))
        except PhantomGradError as error:
            raise refusal(str(error)) from error
