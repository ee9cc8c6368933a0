"""A photo's class, with every step the solver took to find it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from phantomgrad import NotConvergedWarning, Solver, attachments
from phantomgrad_hub import MDEQ
from phantomgrad_hub.evaluate import best_states
from phantomgrad_hub.photos import ImageSource

from .answer import Answer, Curve

LEADING = 3
"""How many classes are followed from step to step."""


def solver_of(model: MDEQ) -> Solver:
    """The solver that the checkpoint's config uses where no gradient is recorded."""
    [attachment] = attachments(model.block)
    return attachment.eval_solver or attachment.solver


def classify(model: MDEQ, photo: ImageSource, *, max_steps: int | None = None) -> Answer:
    """Solve for the equilibrium of `photo` within `max_steps` evaluations, the config's number if None.

    The model's own settings stay as they are: other calls, in this thread or another, do not see these.
    Raises `ImageError` where the photo cannot be read.
    """
    [attachment] = attachments(model.block)
    configured = solver_of(model)
    solver = replace(
        configured,
        max_steps=configured.max_steps if max_steps is None else max_steps,
        trace="state",
        check_every=1,
    )
    parameter = next(model.parameters())
    images = model.preprocess(photo).to(parameter.device, parameter.dtype)
    with torch.inference_mode(), warnings.catch_warnings(), attachment.using(solver=solver):
        # Whether the solve converged is part of the answer.
        warnings.simplefilter("ignore", NotConvergedWarning)
        scores = _probabilities(model(images))[0]
        solution = attachment.solution
        assert solution is not None
        assert solution.trace is not None
        order = scores.argsort(descending=True).tolist()
        paths = [
            _probabilities(model.head(state))[0, order[:LEADING]]
            for _, state in best_states(solution, solution.trace.steps)
        ]
    return Answer(
        probabilities=tuple((model.labels[index], float(scores[index])) for index in order),
        steps=int(solution.steps),
        residual=float(solution.residual),
        settled=bool(solution.converged),
        tolerance=solver.tolerances(parameter.dtype)[0],
        checked=tuple(solution.trace.steps),
        residuals=tuple(solution.trace.residual[:, 0].tolist()),
        leading=tuple(
            Curve(label=model.labels[index], probabilities=tuple(float(path[rank]) for path in paths))
            for rank, index in enumerate(order[:LEADING])
        ),
    )


def _probabilities(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=1)
