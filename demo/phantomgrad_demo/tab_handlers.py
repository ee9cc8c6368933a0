"""What the tabs beside "Watch it settle" compute when they are asked to, each for one photo and one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """Event handlers that return a panel, or in its place why there is none."""

    page: Handlers
    accuracy: Mapping[int, float]
    """The checkpoint's accuracy by solver steps."""

    def compare(
        self,
        photo: Photo,
        first_solver: str,
        first_steps: float | None,
        second_solver: str,
        second_steps: float | None,
        second_damping: float | None,
        tolerance: float,
        damping: float | None,
    ) -> Panel:
        """Setting A, with the damping of the first tab, against setting B."""
        first, *_ = self.page.checked(first_solver, first_steps, tolerance, damping)
        second, *_ = self.page.checked(second_solver, second_steps, tolerance, second_damping)

        def panel(given: Image) -> Panel:
            solves = [Settling(self.page.model, given, each).run() for each in (first, second)]
            if not all(each.steps for each in solves):
                return panels.hint("The network gave no finite state for this photo.")
            return panels.compared(solves[0], solves[1], self.page.model.labels, self.accuracy)

        return self._panel(photo, panel)

    def gradients(self, photo: Photo, steps: float | None, damping: float | None) -> Panel:
        """Saliency by every gradient, the phantom ones with so many steps and so much damping."""
        taken = 5 if steps is None else round(min(max(steps, 1), MOST_PHANTOM_STEPS))
        damped = 0.5 if damping is None else min(max(damping, 0.1), 1.0)

        def panel(given: Image) -> Panel:
            found = saliencies(self.page.model, given, self.page.settings, steps=taken, damping=damped)
            return panels.saliency_maps(found, panels.seen_by(self.page.model, given))

        return self._panel(photo, panel)

    def nearby(
        self,
        photo: Photo,
        change: str,
        amount: float | None,
        solver: str,
        steps: float | None,
        tolerance: float,
        damping: float | None,
    ) -> Panel:
        """The changed photo solved warm and cold, with the settings of the first tab."""
        settings, *_ = self.page.checked(solver, steps, tolerance, damping)
        percent = 5.0 if amount is None else min(max(amount, 0.0), float(MOST_PERCENT))

        def panel(given: Image) -> Panel:
            found = solve_nearby(self.page.model, given, settings, change=cast(Change, change), percent=percent)
            seen = [panels.seen_by(self.page.model, each) for each in (given, found.photo)]
            return panels.nearby_curves(found, seen, self.page.model.labels)

        return self._panel(photo, panel)

    def _panel(self, photo: Photo, panel: Callable[[Image], Panel]) -> Panel:
        if photo is None:
            return panels.hint(markup.NO_PHOTO)
        if isinstance(photo, Refused):
            return panels.hint(photo.reason)
        try:
            return panel(photo)
        except SettingsError as error:
            raise refusal(str(error)) from error
        except PhantomGradError as error:
            return panels.hint(f"This did not work: {error}.")
