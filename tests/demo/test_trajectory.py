"""A trajectory agrees with the model's own solve, streams, stops when told, and leaves no trace in the model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from phantomgrad import attachments
from phantomgrad_demo.settings import SOLVERS, Settings, SolverName, solver_of
from phantomgrad_demo.trajectory import LARGEST_MAP, Settling, _over_channels
from phantomgrad_hub import MDEQ, ImageError


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((240, 160))


@pytest.fixture(scope="module")
def settings(model: MDEQ) -> Settings:
    return Settings.of_model(model)


@pytest.fixture
def slow(model: MDEQ) -> Iterator[None]:
    """Every evaluation of the block takes a twentieth of a second more."""

    def wait(*_: Any) -> None:
        time.sleep(0.05)

    hook = model.block.post_fuse[0].register_forward_pre_hook(wait)
    yield
    hook.remove()


def test_with_the_checkpoints_settings_the_answer_is_the_models_own(
    model: MDEQ, photo: Image.Image, settings: Settings
) -> None:
    trajectory = Settling(model, photo, settings).run()
    expected = dict(model.classify(photo, top=len(model.labels)))
    for label, probability in zip(model.labels, trajectory.probabilities.tolist(), strict=True):
        assert probability == pytest.approx(expected[label], abs=1e-6)
    [attachment] = attachments(model.block)
    solution = attachment.solution
    assert solution is not None
    assert trajectory.reason == "settled"
    assert [step.number for step in trajectory.steps] == list(range(1, int(solution.steps) + 1))
    assert trajectory.residual == pytest.approx(float(solution.residual))
    assert trajectory.state is not None
    for ours, theirs in zip(trajectory.state, solution.value, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_step_has_the_residual_of_every_resolution(
    model: MDEQ, photo: Image.Image, settings: Settings, solver: SolverName
) -> None:
    trajectory = Settling(model, photo, replace(settings, solver=solver)).run()
    [attachment] = attachments(model.block)
    traced = replace(replace(settings, solver=solver).build(solver_of(model)), trace="state")
    with attachment.using(solver=traced):
        model.classify(photo)
    assert attachment.solution is not None
    trace = attachment.solution.trace
    assert trace is not None
    assert trace.states is not None
    assert len(trajectory.steps) == len(trace.steps)
    for step, residual, state in zip(trajectory.steps, trace.residuals, trace.states, strict=True):
        assert step.residual == pytest.approx(float(residual), rel=1e-3)
        assert len(step.residuals) == len(step.maps) == len(step.changes) == len(state)
        # The whole is the mean of the parts, weighted by the sizes of their states.
        sizes = [float(branch.square().sum()) for branch in state]
        whole = sum(part**2 * size for part, size in zip(step.residuals, sizes, strict=True)) / sum(sizes)
        assert step.residual**2 == pytest.approx(whole, rel=1e-3)
        for shown, branch in zip(step.maps, state, strict=True):
            assert shown.shape == branch.shape[-2:]
            torch.testing.assert_close(shown, branch[0].square().mean(0).sqrt())
        for change, part, branch in zip(step.changes, step.residuals, state, strict=True):
            moved = float(change.square().sum() * branch.shape[1]) ** 0.5
            assert moved == pytest.approx(part * float(branch.norm()), rel=1e-3)


def test_probabilities_are_those_of_a_solver_stopped_there(model: MDEQ, photo: Image.Image, settings: Settings) -> None:
    full = Settling(model, photo, settings).run()
    for most in (1, 2, 5):
        short = Settling(model, photo, replace(settings, max_steps=most)).run()
        assert short.reason == "steps"
        assert [step.number for step in short.steps] == list(range(1, most + 1))
        torch.testing.assert_close(short.probabilities, full.steps[most - 1].probabilities)
        assert float(short.probabilities.sum()) == pytest.approx(1.0, abs=1e-5)


def test_steps_arrive_while_the_solver_runs(model: MDEQ, photo: Image.Image, settings: Settings, slow: None) -> None:
    with Settling(model, photo, settings) as settling:
        batches = settling.batches()
        first = next(batches)
        assert first[0].number == 1
        assert settling.trajectory.reason is None
        assert settling.trajectory.steps == tuple(first)
        rest = [step for batch in batches for step in batch]
    assert [*first, *rest] == list(settling.trajectory.steps)
    assert settling.trajectory.reason == "settled"


def test_leaving_stops_the_solve(model: MDEQ, photo: Image.Image, settings: Settings, slow: None) -> None:
    before = threading.active_count()
    with Settling(model, photo, replace(settings, tolerance=1e-5, max_steps=60)) as settling:
        next(settling.batches())
    assert threading.active_count() == before
    for _ in settling.batches():
        pass
    assert settling.trajectory.reason == "stopped"
    assert settling.trajectory.state is None
    assert 1 <= len(settling.trajectory.steps) < 20


def test_a_solve_has_a_time_limit(model: MDEQ, photo: Image.Image, settings: Settings, slow: None) -> None:
    slowest = replace(settings, tolerance=1e-5, max_steps=60)
    trajectory = Settling(model, photo, slowest, seconds=0.1).run()
    assert trajectory.reason == "time"
    assert 1 <= len(trajectory.steps) < 20


def test_from_its_own_equilibrium_one_step_is_enough(model: MDEQ, photo: Image.Image, settings: Settings) -> None:
    cold = Settling(model, photo, settings).run()
    warm = Settling(model, photo, settings, start=cold.state).run()
    assert cold.reason == warm.reason == "settled"
    assert len(warm.steps) == 1 < len(cold.steps)
    torch.testing.assert_close(warm.probabilities, cold.probabilities, atol=1e-2, rtol=0.0)


def test_settings_are_per_call(model: MDEQ, photo: Image.Image, settings: Settings) -> None:
    [attachment] = attachments(model.block)
    before = (attachment.solver, attachment.eval_solver, attachment.gradient, attachment.unconverged)
    alone = {most: Settling(model, photo, replace(settings, max_steps=most)).run() for most in (1, 4)}
    with ThreadPoolExecutor(2) as pool:
        together = list(
            pool.map(lambda most: (most, Settling(model, photo, replace(settings, max_steps=most)).run()), [1, 4] * 2)
        )
    for most, trajectory in together:
        assert [step.residual for step in trajectory.steps] == pytest.approx(
            [step.residual for step in alone[most].steps], rel=1e-4
        )
    assert before == (attachment.solver, attachment.eval_solver, attachment.gradient, attachment.unconverged)


def test_a_stopped_solve_leaves_the_model_as_it_was(model: MDEQ, photo: Image.Image, settings: Settings) -> None:
    before = model.classify(photo)
    Settling(model, photo, replace(settings, tolerance=1e-5), seconds=0.0).run()
    assert model.classify(photo) == before


def test_a_state_that_is_not_finite_ends_the_solve_with_its_best(
    model: MDEQ, photo: Image.Image, settings: Settings
) -> None:
    calls = 0

    def poison(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls > 3 else output

    hook = model.block.post_fuse[0].register_forward_hook(poison)
    try:
        trajectory = Settling(model, photo, settings).run()
    finally:
        hook.remove()
    assert trajectory.reason == "diverged"
    assert [step.number for step in trajectory.steps] == [1, 2, 3]
    assert torch.isfinite(trajectory.probabilities).all()


def test_what_goes_wrong_in_the_solve_reaches_the_caller(model: MDEQ, photo: Image.Image, settings: Settings) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no more memory")

    hook = model.block.post_fuse[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="no more memory"):
            Settling(model, photo, settings).run()
    finally:
        hook.remove()


def test_a_file_that_is_no_photo_raises(model: MDEQ, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_text("not a photo")
    with pytest.raises(ImageError, match="not a photo in a known format"):
        Settling(model, path, settings)


def test_large_maps_are_averaged() -> None:
    features = torch.randn(1, 3, 4 * LARGEST_MAP, LARGEST_MAP)
    shown = _over_channels(features)
    assert shown.shape == (LARGEST_MAP, LARGEST_MAP)
    assert float(shown.square().mean()) == pytest.approx(float(features.square().mean()), rel=1e-5)
