"""Answers agree with the model's own, whatever the visitor's settings, and leave no trace in the model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from phantomgrad import attachments
from phantomgrad_demo.inference import classify, solver_of
from phantomgrad_demo.wording import percent, scientific, sentence
from phantomgrad_hub import MDEQ, ImageError


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((240, 160))


def test_the_answer_is_the_models_own(model: MDEQ, photo: Image.Image) -> None:
    answer = classify(model, photo)
    expected = model.classify(photo, top=len(model.labels))
    assert [label for label, _ in answer.probabilities] == [label for label, _ in expected]
    for (_, ours), (_, theirs) in zip(answer.probabilities, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert sum(probability for _, probability in answer.probabilities) == pytest.approx(1.0, abs=1e-5)


def test_steps_and_residuals_are_the_solvers(model: MDEQ, photo: Image.Image) -> None:
    answer = classify(model, photo)
    [attachment] = attachments(model.block)
    model.classify(photo)
    solution = attachment.solution
    assert solution is not None
    assert answer.settled
    assert answer.steps == int(solution.steps)
    assert answer.residual == pytest.approx(float(solution.residual))
    assert answer.checked == tuple(range(1, answer.steps + 1))
    assert answer.residuals[-1] <= answer.tolerance == 0.01
    assert min(answer.residuals) == pytest.approx(answer.residual)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_fewer_steps_are_the_beginning_of_more(model: MDEQ, photo: Image.Image, most: int) -> None:
    full, short = classify(model, photo), classify(model, photo, max_steps=most)
    assert short.steps == most
    assert not short.settled
    assert short.residuals == pytest.approx(full.residuals[:most])
    after_stop = dict(short.probabilities)
    for curve in full.leading:
        assert curve.probabilities[most - 1] == pytest.approx(after_stop[curve.label], abs=1e-6)


def test_curves_end_at_the_answer(model: MDEQ, photo: Image.Image) -> None:
    answer = classify(model, photo)
    for curve, (label, probability) in zip(answer.leading, answer.probabilities, strict=False):
        assert curve.label == label
        assert curve.probabilities[-1] == pytest.approx(probability, abs=1e-6)


def test_settings_are_per_call(model: MDEQ, photo: Image.Image) -> None:
    before = solver_of(model)
    alone = {most: classify(model, photo, max_steps=most) for most in (1, 4)}
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda most: (most, classify(model, photo, max_steps=most)), [1, 4] * 2))
    for most, answer in together:
        assert answer.steps == alone[most].steps
        assert answer.residuals == pytest.approx(alone[most].residuals, rel=1e-4)
    assert solver_of(model) == before


def test_a_file_that_is_no_photo_raises(model: MDEQ, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_text("not a photo")
    with pytest.raises(ImageError, match="not a photo in a known format"):
        classify(model, path)


def test_the_sentence_says_where_the_solver_stands(model: MDEQ, photo: Image.Image) -> None:
    settled, stopped = classify(model, photo), classify(model, photo, max_steps=1)
    label, probability = settled.probabilities[0]
    assert sentence(settled) == (
        f"After {settled.steps} steps: {label} {percent(probability)}, "
        f"relative residual {scientific(settled.residual)} (settled)"
    )
    assert sentence(stopped).startswith("After 1 step: ")
    assert sentence(stopped).endswith("(stopped before its tolerance of 1.0e-2)")


@pytest.mark.parametrize(
    ("probability", "text"), [(0.634, "63 %"), (0.02, "2 %"), (0.004, "0.4 %"), (0.0001, "< 0.1 %"), (1.0, "100.0 %")]
)
def test_percent(probability: float, text: str) -> None:
    assert percent(probability) == text


def test_scientific() -> None:
    assert scientific(0.00812) == "8.1e-3"
    assert scientific(1.0) == "1.0e0"
