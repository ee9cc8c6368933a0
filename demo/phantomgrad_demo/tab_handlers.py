"""What the tabs beside "Watch it settle" compute when they are asked to, each for one photo and one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from PIL.Image import Image

from phantomgrad import PhantomGradError

from . import markup, panels
from .guard import Refused, refusal
from .handlers import Handlers, Photo
from .nearby import MOST_PERCENT, Change, solve_nearby
from .panels import Panel
from .saliency import MOST_PHANTOM_STEPS, saliencies
from .settings import SettingsError
from .trajectory import Settling


@dataclass(frozen=True, kw_only=True)
class TabHandlers:
    """Event handlers that give a panel, or in its place why there is none; before it, that it is being computed.

    Generator functions, as Gradio looks at the function itself.
    """

    page: Handlers
    accuracy: Mapping[int, float]
    """The checkpoint's accuracy by solver steps."""

    def compare(
        self,
        photo: Photo,
        source: object,
        first_solver: str,
        first_steps: float | None,
        second_solver: str,
        second_steps: float | None,
        second_damping: float | None,
        tolerance: float,
        damping: float | None,
    ) -> Iterator[Panel]:
        """Setting A, with the damping of the first tab, against setting B."""
        first, *_ = self.page.checked(first_solver, first_steps, tolerance, damping)
        second, *_ = self.page.checked(second_solver, second_steps, tolerance, second_damping)

        def panel(given: Image) -> Panel:
            solves = [Settling(self.page.model, given, each).run() for each in (first, second)]
            if not all(each.steps for each in solves):
                return panels.hint("The network gave no finite state for this photo.")
            return panels.compared(solves[0], solves[1], self.page.model.labels, self.accuracy, self.page.settings)

        yield from self._panel(photo, source, panel, panels.COMPARE_HINT)

    def gradients(self, photo: Photo, source: object, steps: float | None, damping: float | None) -> Iterator[Panel]:
        """Saliency by every gradient, the phantom ones with so many steps and so much damping."""
        taken = 5 if steps is None else round(min(max(steps, 1), MOST_PHANTOM_STEPS))
        damped = 0.5 if damping is None else min(max(damping, 0.1), 1.0)

        def panel(given: Image) -> Panel:
            found = saliencies(self.page.model, given, self.page.settings, steps=taken, damping=damped)
            return panels.saliency_maps(found, panels.seen_by(self.page.model, given))

        yield from self._panel(photo, source, panel, panels.GRADIENT_HINT)

    def nearby(
        self,
        photo: Photo,
        source: object,
        change: str,
        amount: float | None,
        solver: str,
        steps: float | None,
        tolerance: float,
        damping: float | None,
    ) -> Iterator[Panel]:
        """The changed photo solved warm and cold, with the settings of the first tab."""
        settings, *_ = self.page.checked(solver, steps, tolerance, damping)
        percent = 5.0 if amount is None else min(max(amount, 0.0), float(MOST_PERCENT))

        def panel(given: Image) -> Panel:
            found = solve_nearby(self.page.model, given, settings, change=cast(Change, change), percent=percent)
            seen = [panels.seen_by(self.page.model, each) for each in (given, found.photo)]
            return panels.nearby_curves(found, seen, self.page.model.labels)

        yield from self._panel(photo, source, panel, panels.NEARBY_HINT)

    def _panel(self, photo: Photo, source: object, panel: Callable[[Image], Panel], otherwise: str) -> Iterator[Panel]:
        given = self.page.given(photo, source)
        if given is None:
            yield panels.hint(markup.NO_PHOTO)
            return
        if isinstance(given, Refused):
            yield panels.hint(given.reason)
            return
        whose = source if isinstance(source, str) else ""
        yield panels.belonging(panels.WORKING, whose, otherwise)
        try:
            yield panels.belonging(panel(given), whose, otherwise)
        except SettingsError as error:
            raise refusal(str(error)) from error
        except PhantomGradError as error:
            yield panels.belonging(panels.hint(f"This did not work: {error}."), whose, otherwise)
