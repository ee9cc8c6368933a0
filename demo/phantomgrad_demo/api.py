"""The page's endpoints for programs: each takes an uploaded photo and plain values, and gives plain values.

Values out of range are refused in words, not brought into range as those of the page's sliders are.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import gradio as gr
from gradio.events import api as add_endpoint

from phantomgrad import PhantomGradError

from .card import Facts
from .guard import GuardedImage, GuardedRadio, Refused, refusal
from .handlers import Handlers, Photo
from .nearby import CHANGES, Change, solve_nearby
from .saliency import MOST_PHANTOM_STEPS, saliencies
from .settings import SOLVERS, Settings, SettingsError, SolverName
from .trajectory import Settling, Trajectory
from .wording import best


@dataclass(frozen=True, kw_only=True)
class Api:
    """The functions behind the endpoints."""

    page: Handlers
    facts: Facts

    def classify(self, photo: Photo) -> dict[str, float]:
        """The probability of every class the model knows, best first."""
        with _in_words():
            solve = Settling(self.page.model, _given(photo), self.page.settings).run()
            if not solve.steps:
                raise refusal("the network gave no finite state for this photo")
            values, indices = solve.probabilities.sort(descending=True)
            labels = self.page.model.labels
            return {labels[int(i)]: float(value) for value, i in zip(values, indices, strict=True)}

    def settle(self, photo: Photo, solver: str, max_steps: float, tolerance: float, damping: float) -> dict[str, Any]:
        """Every step of a solve: residuals, of the whole state and by resolution, and the best class so far."""
        with _in_words():
            settings = _settings(solver, max_steps, tolerance, damping)
            return self._told(Settling(self.page.model, _given(photo), settings).run())

    def gradient(self, photo: Photo, steps: float, damping: float) -> dict[str, dict[str, float]]:
        """The gradient of the answer's score by the pixels, by each method: cosine with the exact one, products, seconds."""
        with _in_words():
            if not _whole(steps) or not 1 <= steps <= MOST_PHANTOM_STEPS:
                raise SettingsError(f"the steps are a whole number from 1 to {MOST_PHANTOM_STEPS}, not {steps!r:.40}")
            found = saliencies(
                self.page.model, _given(photo), self.page.settings, steps=int(steps), damping=_damping(damping)
            )
            return {
                name: {"cosine": each.cosine, "products": each.products, "seconds": each.seconds}
                for name, each in found.found.items()
            }

    def nearby(self, photo: Photo, change: str, percent: float) -> dict[str, dict[str, Any]]:
        """The changed photo solved from zero (`cold`) and from the original's equilibrium (`warm`)."""
        with _in_words():
            found = solve_nearby(
                self.page.model, _given(photo), self.page.settings, change=cast(Change, change), percent=percent
            )
            return {"cold": self._told(found.cold), "warm": self._told(found.warm)}

    def about(self) -> dict[str, Any]:
        """The model's classes and facts, and the settings that the page opens with."""
        model, own = self.page.model, self.page.settings
        return {
            "classes": list(model.labels),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dataset": self.facts.dataset,
            "accuracy": self.facts.accuracy,
            "solver": own.solver,
            "max_steps": own.max_steps,
            "tolerance": own.tolerance,
            "damping": own.damping,
        }

    def _told(self, solve: Trajectory) -> dict[str, Any]:
        if not solve.steps:
            raise refusal("the network gave no finite state for this photo")
        answers = [best(step, self.page.model.labels) for step in solve.steps]
        return {
            "label": answers[-1][0],
            "probability": answers[-1][1],
            "settled": solve.reason == "settled",
            "steps": len(solve.steps),
            "residual": solve.residual,
            "residuals": [step.residual for step in solve.steps],
            "residuals_by_resolution": [list(step.residuals) for step in solve.steps],
            "labels": [label for label, _ in answers],
            "seconds": solve.seconds,
        }


def add_endpoints(api: Api, events: dict[str, Any]) -> None:
    """Give the page its public endpoints; `events` are the options of everything that runs the model."""
    own = api.page.settings
    # Not the page's own: that has a photo from the start, which would be a program's default.
    photo = GuardedImage(type="pil", label="photo", visible=False)
    solver = GuardedRadio(list(SOLVERS), value=own.solver, label="solver", visible=False)
    most = gr.Number(own.max_steps, label="max_steps", visible=False)
    tolerance = gr.Number(own.tolerance, label="tolerance", visible=False)
    damping = gr.Number(own.damping, label="damping", visible=False)
    steps = gr.Number(5, label="steps", visible=False)
    phantom_damping = gr.Number(0.7, label="damping", visible=False)
    change = GuardedRadio(list(CHANGES), value=CHANGES[0], label="change", visible=False)
    percent = gr.Number(5, label="percent", visible=False)
    endpoints: list[tuple[Any, str, list[Any]]] = [
        (api.classify, "classify", [photo]),
        (api.settle, "settle", [photo, solver, most, tolerance, damping]),
        (api.gradient, "gradient", [photo, steps, phantom_damping]),
        (api.nearby, "nearby", [photo, change, percent]),
    ]
    for function, name, inputs in endpoints:
        # No trigger: they are for programs, which see the parameters' names and the result.
        result = gr.JSON(visible=False, label="result")
        gr.on([], function, inputs, [result], api_name=name, api_description=function.__doc__, **events)
    add_endpoint(api.about, api_name="about", api_description=api.about.__doc__, queue=False)


@contextmanager
def _in_words() -> Generator[None, None, None]:
    """Turns errors about what was sent into the caller's message."""
    try:
        yield
    except (PhantomGradError, SettingsError) as error:
        raise refusal(str(error)) from error


def _given(photo: Photo) -> Any:
    if photo is None:
        raise refusal("send a photo")
    if isinstance(photo, Refused):
        raise refusal(photo.reason)
    return photo


def _settings(solver: str, max_steps: float, tolerance: float, damping: float) -> Settings:
    steps: Any = int(max_steps) if _whole(max_steps) else max_steps
    return Settings(solver=cast(SolverName, solver), max_steps=steps, tolerance=tolerance, damping=damping)


def _damping(value: Any) -> float:
    return Settings(solver="fixed point", max_steps=1, tolerance=0.1, damping=value).damping


def _whole(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
