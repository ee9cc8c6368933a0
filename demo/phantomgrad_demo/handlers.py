"""What the page's events do, for one model. Visitors' settings travel with each call; nothing of one is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import gradio as gr
from PIL.Image import Image

from phantomgrad import PhantomGradError
from phantomgrad_hub import MDEQ
from phantomgrad_hub.photos import read_photo

from . import markup
from .guard import Refused, refusal
from .photos import ExamplePhoto
from .settings import MOST_STEPS, Settings, SettingsError, SolverName, tolerances_for
from .trajectory import Settling
from .view import message, view

Photo = Image | Refused | None
View = dict[str, Any]
SMALLEST_DAMPING = 0.1


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """Event handlers: photos and numbers come as the guard gives them, choices as Gradio has checked them."""

    model: MDEQ
    examples: tuple[ExamplePhoto, ...]
    checkpoint: str
    """What `MDEQ.from_pretrained` takes, for the Python that the page shows."""

    @cached_property
    def settings(self) -> Settings:
        """The checkpoint's own, on which the page opens."""
        return Settings.of_model(self.model)

    def solve(self, photo: Photo, example: str, settings: Settings) -> Iterator[View]:
        """What the page shows, again and again while the solver runs."""
        if photo is None:
            yield message(markup.NO_PHOTO)
            return
        if isinstance(photo, Refused):
            yield message(f"{photo.reason} Choose another photo.")
            return
        try:
            with Settling(self.model, photo, settings) as settling:
                for _ in settling.batches():
                    if settling.trajectory.reason is None:
                        yield self._view(settling, example)
            yield self._view(settling, example)
        except PhantomGradError as error:
            yield message(f"This photo could not be classified: {error}.")

    def show_settings(
        self, photo: Photo, example: str, solver: str, steps: float | None, tolerance: float, damping: float | None
    ) -> Iterator[tuple[Any, Any, Any]]:
        """The answer, and what both sliders are to show, after a setting was changed."""
        if photo is None or steps is None or damping is None:
            # Without a photo the page goes on saying why; an empty field is one that is being typed into.
            yield gr.skip(), gr.skip(), gr.skip()
            return
        settings, *shown = self.checked(solver, steps, tolerance, damping)
        for each in self.solve(photo, self.known(example), settings):
            yield each, *shown

    def show_upload(
        self, photo: Photo, solver: str, steps: float | None, tolerance: float, damping: float | None
    ) -> Iterator[tuple[Any, ...]]:
        """Photo, answer, credit, example, and both sliders; what is no photo leaves the page, with its reason."""
        settings, *shown = self.checked(solver, steps, tolerance, damping)
        for each in self.solve(photo, "", settings):
            yield None if isinstance(photo, Refused) else gr.skip(), each, "", "", *shown

    def show_example(
        self, solver: str, steps: float | None, tolerance: float, damping: float | None, event: gr.EventData
    ) -> Iterator[tuple[Any, ...]]:
        """Photo, answer, credit, example, and both sliders, after the button of an example was pressed."""
        # The name comes from the browser.
        key = self.known(getattr(event, "example", None))
        if not key:
            raise refusal("there is no such example")
        photo = self.open_example(key)
        settings, *shown = self.checked(solver, steps, tolerance, damping)
        for number, each in enumerate(self.solve(photo, key, settings)):
            first = number == 0
            yield photo if first else gr.skip(), each, self.credit(key) if first else gr.skip(), key, *shown

    def restore(self, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        """Photo, answer, credit, example, solver, steps, tolerance and damping of an address's parameters."""
        key = self.known(getattr(event, "example", None))
        if not key:
            raise refusal("the example of this link does not exist; the page shows another")
        settings = self._linked(event)
        photo = self.open_example(key)
        controls = (settings.solver, settings.max_steps, settings.tolerance, settings.damping)
        for number, each in enumerate(self.solve(photo, key, settings)):
            first = number == 0
            rest = (photo, self.credit(key), key, *controls) if first else (gr.skip(),) * 7
            yield rest[0], each, *rest[1:]

    def show_nothing(self) -> tuple[View, str, str]:
        """No answer, credit or example: there is no photo."""
        return message(markup.NO_PHOTO), "", ""

    def checked(
        self, solver: str, steps: float | None, tolerance: float, damping: float | None
    ) -> tuple[Settings, Any, Any]:
        """The settings nearest to those asked for, and what the sliders of steps and damping are to show."""
        own = self.settings
        taken = own.max_steps if steps is None else round(min(max(steps, 1), MOST_STEPS))
        damped = own.damping if damping is None else min(max(damping, SMALLEST_DAMPING), 1.0)
        try:
            settings = Settings(solver=cast(SolverName, solver), max_steps=taken, tolerance=tolerance, damping=damped)
        except SettingsError as error:
            raise refusal(str(error)) from error
        return settings, gr.skip() if taken == steps else taken, gr.skip() if damped == damping else damped

    def known(self, key: object) -> str:
        """The name of an example that there is; empty for anything else."""
        return next((each.key for each in self.examples if each.key == key), "")

    def open_example(self, key: str) -> Image:
        """An example photo."""
        path = next(each for each in self.examples if each.key == key).find()
        if path is None:
            raise refusal("this example is no longer there")
        return read_photo(path)

    def credit(self, key: str) -> str:
        """Whom to thank for an example."""
        return markup.credit(next(each for each in self.examples if each.key == key))

    def _view(self, settling: Settling, example: str) -> View:
        return view(settling.trajectory, self.model.labels, example=example, checkpoint=self.checkpoint)

    def _linked(self, event: gr.EventData) -> Settings:
        """The settings in an address; what it lacks or what cannot be read is the checkpoint's own."""
        own = self.settings
        solver = getattr(event, "solver", own.solver)
        steps = _number(getattr(event, "steps", None), own.max_steps)
        tolerance = _number(getattr(event, "tolerance", None), own.tolerance)
        damping = _number(getattr(event, "damping", None), own.damping)
        nearest = min(tolerances_for(own), key=lambda each: abs(math.log(each) - math.log(max(tolerance, 1e-30))))
        return self.checked(solver, steps, nearest, damping)[0]


def _number(text: object, otherwise: float) -> float:
    try:
        value = float(text)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return otherwise
    return value if math.isfinite(value) else otherwise
