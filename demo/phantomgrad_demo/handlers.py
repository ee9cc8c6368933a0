"""What the page's events do, for one model. Visitors' settings travel with each call; nothing of one is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import gradio as gr
from PIL.Image import Image

from phantomgrad import PhantomGradError
from phantomgrad_hub import MDEQ
from phantomgrad_hub.photos import read_photo

from . import markup
from .guard import UNSEEN, Refused, refusal
from .photos import ExamplePhoto
from .runs import Runs
from .settings import MOST_STEPS, SOLVERS, Settings, SettingsError, SolverName, tolerances_for
from .trajectory import Settling
from .view import message, view

Photo = Image | Refused | None
View = dict[str, Any]
SMALLEST_DAMPING = 0.1
REFUSED = "refused"
"""The source of a photo that was refused; the answer's place says why."""


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """Event handlers: photos and numbers come as the guard gives them, choices as Gradio has checked them."""

    model: MDEQ
    examples: tuple[ExamplePhoto, ...]
    checkpoint: str
    """What `MDEQ.from_pretrained` takes, for the Python that the page shows."""
    runs: Runs = field(default_factory=Runs)

    @cached_property
    def settings(self) -> Settings:
        """The checkpoint's own, on which the page opens."""
        return Settings.of_model(self.model)

    def solve(self, photo: Photo, example: str, settings: Settings) -> Iterator[View]:
        """What the page shows, again and again while the solver runs; nothing more once the run is dropped."""
        if photo is None:
            yield message(markup.NO_PHOTO)
            return
        if isinstance(photo, Refused):
            yield message(f"{photo.reason} Choose another photo.")
            return
        try:
            with Settling(self.model, photo, settings) as settling, self.runs.named(settling) as run:
                for _ in settling.batches():
                    if settling.trajectory.reason is None and run in self.runs:
                        yield self._view(settling, example, run)
                dropped = run not in self.runs
            if not dropped:
                yield self._view(settling, example, run)
        except PhantomGradError as error:
            yield message(f"This photo could not be classified: {error}.")

    def show(
        self,
        photo: Photo,
        source: object,
        solver: str,
        steps: float | None,
        tolerance: float,
        damping: float | None,
    ) -> Iterator[tuple[Any, ...]]:
        """Photo, answer, credit, source, and the sliders of steps and damping, whatever it was that changed.

        One event for all of it, which looks at the page as it is: the last of several quick changes counts, and no
        two solves write into the same places.
        """
        if _kind(source) == REFUSED:  # the reason stays
            yield (gr.skip(),) * 6
            return
        key = self.known(_kind(source))
        given = self.given(photo, source)
        new_source = f"{REFUSED}#{time.monotonic_ns()}" if isinstance(given, Refused) else gr.skip()
        new_photo, credit = _shown_anew(given, photo), self.credit(key) if key else ""
        settings, *corrected = self.checked(solver, steps, tolerance, damping)
        for each in self.solve(given, key, settings):
            yield new_photo, each, credit, new_source, *corrected
            new_photo = credit = gr.skip()

    def restore(self, event: gr.EventData) -> tuple[Any, ...]:
        """Source, solver, steps, tolerance and damping of an address's parameters."""
        key = self.known(getattr(event, "example", None))
        if not key:
            gr.Warning("The example of this link does not exist; the page shows another.")
            return (gr.skip(),) * 5
        own = self.settings
        solver = getattr(event, "solver", own.solver)
        steps = _number(getattr(event, "steps", None), own.max_steps)
        tolerance = _number(getattr(event, "tolerance", None), own.tolerance)
        damping = _number(getattr(event, "damping", None), own.damping)
        nearest = min(tolerances_for(own), key=lambda each: abs(math.log(each) - math.log(max(tolerance, 1e-30))))
        linked = self.checked(solver if solver in tuple(SOLVERS) else own.solver, steps, nearest, damping)[0]
        source = f"{key}#{time.monotonic_ns()}"
        return source, linked.solver, linked.max_steps, linked.tolerance, linked.damping

    def stop(self, event: gr.EventData) -> None:
        """End the visitor's own run; its last steps are shown."""
        self.runs.stop(getattr(event, "run", None))

    def drop(self, event: gr.EventData) -> None:
        """End the visitor's own run, which another follows."""
        self.runs.drop(getattr(event, "run", None))

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
        # An empty field is one that is being typed into.
        return settings, _corrected(steps, taken), _corrected(damping, damped)

    def given(self, photo: Photo, source: object) -> Photo:
        """The example that the source names, which the page may not show yet, or else its photo."""
        key = self.known(_kind(source))
        return self.open_example(key) if key else photo

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
        """What is right for an example, and whom to thank for it."""
        return markup.credit(next(each for each in self.examples if each.key == key), self.model.labels)

    def _view(self, settling: Settling, example: str, run: str) -> View:
        return view(settling.trajectory, self.model.labels, example=example, checkpoint=self.checkpoint, run=run)


def _kind(source: object) -> str:
    """What a source, `coffee#17`, names: an example, or one of the page's words for other photos."""
    return source.partition("#")[0] if isinstance(source, str) else ""


def _corrected(asked: float | None, taken: float) -> Any:
    return gr.skip() if asked is None or asked == taken else taken


def _shown_anew(given: Photo, shown: Photo) -> Any:
    """What the photo's place gets: nothing new where it shows what is given, nothing at all where that is no photo."""
    if isinstance(given, Refused):
        return None
    if given is None or (given is shown and not given.info.get(UNSEEN)):
        return gr.skip()
    # For the page alone; the solve takes the photo itself.
    small = given.copy()
    small.thumbnail((1024, 1024))
    same = isinstance(shown, Image) and small.size == shown.size and small.tobytes() == shown.tobytes()
    return gr.skip() if same and not given.info.get(UNSEEN) else small


def _number(text: object, otherwise: float) -> float:
    try:
        value = float(text)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        return otherwise
    return value if math.isfinite(value) else otherwise
