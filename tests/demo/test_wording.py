"""The sentences of the page say where the solver stands, in numbers that readers can take in."""

from __future__ import annotations

import pytest
from samples import EXACT, LABELS, SETTLED, SINGLE, step, trajectory

from phantomgrad_demo.wording import (
    WEAK,
    chosen,
    end_sentence,
    milliseconds,
    percent,
    scientific,
    step_sentence,
    takeaway,
    weak_notice,
)


def test_a_steps_sentence() -> None:
    assert step_sentence(SETTLED.steps[1], LABELS) == "Step 2: goldfish 42 %, residual 2.0e-1"


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("settled", "Settled after 4 steps: goldfish 44 %, residual 8.1e-3"),
        ("steps", "Stopped after 4 steps, before its tolerance of 1e-2: goldfish 44 %, residual 8.1e-3"),
        ("time", "Stopped after 4 steps at the time limit, before its tolerance of 1e-2: goldfish"),
        ("stopped", "Stopped after 4 steps at your wish, before its tolerance of 1e-2: goldfish"),
        (
            "diverged",
            "Stopped after 4 steps, as the state was no longer finite, before its tolerance of 1e-2: goldfish",
        ),
    ],
)
def test_the_last_sentence_says_why_it_ended(reason: str, text: str) -> None:
    assert end_sentence(trajectory([1.0, 0.2, 0.05, 8.1e-3], reason), LABELS).startswith(text)  # pyright: ignore


def test_the_residual_told_is_that_of_the_answer() -> None:
    """The smallest, not the last: the state with the smallest residual is the solution."""
    assert end_sentence(trajectory([1.0, 0.02, 0.5], "steps"), LABELS).endswith("residual 2.0e-2")


def test_a_weak_answer_is_probably_none() -> None:
    assert weak_notice(step(1, 1.0, (WEAK - 0.01,)), 200) == "Probably none of the 200 I know."
    assert weak_notice(step(1, 1.0, (WEAK + 0.01,)), 200) == ""


def test_the_takeaway_says_what_the_solve_shows() -> None:
    assert takeaway(SETTLED, LABELS) == (
        "The state moves less and less: the residual falls from 1.0 to 8.1e-3 in 4 steps. "
        "The answer has been goldfish since step 2."
    )
    assert takeaway(EXACT, LABELS).startswith("The state moves less and less: the residual falls from 1.0 to 0.0")
    assert takeaway(SINGLE, LABELS).startswith("One step moves the state by 1.0 of its size; more steps show")
    cycling = trajectory([1.0, 0.3, 0.31, 0.3, 0.31, 0.3], "steps")
    assert takeaway(cycling, LABELS).startswith("The state keeps moving: after 6 steps the residual is still 3.0e-1.")


@pytest.mark.parametrize(
    ("probability", "text"), [(0.634, "63 %"), (0.02, "2 %"), (0.004, "0.4 %"), (0.0001, "< 0.1 %"), (1.0, "100.0 %")]
)
def test_percent(probability: float, text: str) -> None:
    assert percent(probability) == text


def test_numbers() -> None:
    assert scientific(0.00812) == "8.1e-3"
    assert scientific(0.02) == "2.0e-2"
    assert scientific(1.0) == "1.0"
    assert [chosen(value) for value in (1.0, 0.1, 1e-5, 0.1334)] == ["1", "1e-1", "1e-5", "1.3e-1"]
    assert milliseconds(0.0844) == "84 ms"
    assert milliseconds(2.14) == "2.1 s"
    assert milliseconds(0.9999) == "1.0 s"
