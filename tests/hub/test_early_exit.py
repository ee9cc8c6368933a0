"""Classifying with as many solver steps as an answer needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small import pooled_config
from torch import Tensor

from phantomgrad import Anderson, FixedPointIteration, NotConvergedWarning, attachments
from phantomgrad_hub import MDEQ, classify_early
from phantomgrad_hub.early_exit import AnswerWatch, lead_of

SOLVER = FixedPointIteration(damping=0.7, max_steps=7, rtol=0.0, atol=0.0, keep="last")
pytestmark = pytest.mark.filterwarnings(f"ignore::{NotConvergedWarning.__module__}.NotConvergedWarning")


@pytest.fixture(scope="module")
def model() -> MDEQ:
    torch.manual_seed(0)
    return MDEQ(pooled_config(eval_solver=SOLVER)).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _answers(model: MDEQ, images: Tensor) -> Tensor:
    """Probabilities after every number of steps, by as many solves: shape (steps, images, classes)."""
    [attachment] = attachments(model.block)
    found: list[Tensor] = []
    with torch.no_grad():
        for steps in range(1, SOLVER.max_steps + 1):
            with attachment.using(solver=replace(SOLVER, max_steps=steps)):
                found.append(model(images).softmax(1))
    return torch.stack(found)


@pytest.mark.parametrize("lead", [0.0, 0.3, 1.0, 3.0, 1e9])
@pytest.mark.parametrize("first", [2, 4])
def test_each_image_stops_at_the_first_step_that_meets_the_rule(
    lead: float, first: int, model: MDEQ, images: Tensor
) -> None:
    answers = _answers(model, images)
    expected: list[int] = []
    for image in range(len(images)):
        for step in range(first, SOLVER.max_steps + 1):
            now, before = answers[step - 1, image].double(), answers[step - 2, image].double()
            best = sorted(now.tolist(), reverse=True)
            if best[0] - best[1] >= lead * (now - before).abs().sum() or step == SOLVER.max_steps:
                expected.append(step)
                break
    found = classify_early(model, images, lead=lead, first=first)
    assert found.steps.tolist() == expected
    rows = torch.arange(len(images))
    torch.testing.assert_close(found.logits.softmax(1), answers[found.steps - 1, rows], rtol=1e-4, atol=1e-5)


def test_the_cases_above_differ(model: MDEQ, images: Tensor) -> None:
    """Images stop at different steps, so that the test above has something to tell apart."""
    steps = classify_early(model, images, lead=1.0, first=2).steps
    assert len(set(steps.tolist())) > 1


def test_what_converges_first_stops_as_it_does_without(model: MDEQ, images: Tensor) -> None:
    solver = Anderson(rtol=0.4, max_steps=40)
    [attachment] = attachments(model.block)
    with torch.no_grad(), attachment.using(solver=solver):
        logits = model(images)
    found = classify_early(model, images, lead=1e9, solver=solver)
    assert attachment.solution is not None
    assert attachment.solution.converged.all()
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)


def test_the_head_runs_for_the_images_that_are_left() -> None:
    seen: list[int] = []

    def head(state: tuple[Tensor, ...]) -> Tensor:
        seen.append(len(state[0]))
        return state[0]

    watch = AnswerWatch(head, lead=0.5, first=2)
    start = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    assert watch(1, (start,), torch.zeros(3)) is None
    sure = torch.tensor([[5.0, 0.0], [0.0, 0.1], [0.0, 0.0]])
    assert watch(2, (sure,), torch.zeros(3)).tolist() == [True, True, False]  # type: ignore[union-attr]
    assert watch(3, (sure,), torch.zeros(3)).tolist() == [True, True, True]  # type: ignore[union-attr]
    assert seen == [3, 3, 1]
    assert torch.equal(watch.answers((sure + 1,)), sure)


def test_an_answer_that_is_not_a_number_goes_on() -> None:
    watch = AnswerWatch(lambda state: state[0], lead=0.0, first=2)
    for step in (1, 2):
        stopped = watch(step, (torch.full((1, 2), torch.nan),), torch.zeros(1))
    assert stopped is not None
    assert stopped.tolist() == [False]


def test_a_single_class_leads() -> None:
    assert lead_of(torch.ones(2, 1)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lead": -1.0}, "lead must be a finite number of at least 0, got -1.0"),
        ({"lead": float("nan")}, "lead must be a finite number of at least 0, got nan"),
        ({"first": 1}, "first must be an integer of at least 2, as a change needs a step before it, got 1"),
        ({"first": True}, "first must be an integer of at least 2"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str, model: MDEQ, images: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        classify_early(model, images, **options)


def test_the_model_is_used_in_eval_mode(model: MDEQ, images: Tensor) -> None:
    expected = classify_early(model, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        found = classify_early(model, images)
        assert model.training
    finally:
        model.eval()
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
