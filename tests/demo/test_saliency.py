"""Gradients of the answer's score: the exact one agrees with differences, the phantom ones approach it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from phantomgrad import attachments
from phantomgrad_demo.panels import coloured, saliency_maps, seen_by
from phantomgrad_demo.saliency import EXACT, Saliencies, UnsolvedError, saliencies
from phantomgrad_demo.settings import Settings
from phantomgrad_demo.trajectory import Settling
from phantomgrad_hub import MDEQ


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = torch.randint(0, 256, (40, 60, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((240, 160))


@pytest.fixture(scope="module")
def found(model: MDEQ, photo: Image.Image) -> Saliencies:
    return saliencies(model, photo, Settings.of_model(model), steps=5, damping=0.7)


def test_the_exact_gradient_agrees_with_plain_backpropagation(
    model: MDEQ, photo: Image.Image, found: Saliencies
) -> None:
    images = model.preprocess(photo).requires_grad_()
    [attachment] = attachments(model.block)
    injection = model.inject(images)
    z = model.initial_state(injection)
    for _ in range(60):
        z = tuple(0.3 * old + 0.7 * new for old, new in zip(z, attachment.step(z, injection), strict=True))
    target = model.labels.index(found.label)
    [expected] = torch.autograd.grad(model.head(z)[0, target], images)
    exact = found.found[EXACT]
    assert exact.settled
    assert exact.cosine == pytest.approx(1.0)
    difference = (exact.map - expected[0].abs().amax(0)).norm() / expected[0].abs().amax(0).norm()
    assert difference < 0.02


def test_phantom_gradients_are_close_for_fewer_products(found: Saliencies) -> None:
    exact = found.found[EXACT]
    for name in ("unrolled phantom", "Neumann phantom", "Krylov phantom"):
        assert found.found[name].products == 5 < exact.products
        assert found.found[name].cosine > 0.9
    assert found.found["one step"].products == 1


def test_more_steps_are_closer(model: MDEQ, photo: Image.Image) -> None:
    settings = Settings.of_model(model)
    by_steps = [saliencies(model, photo, settings, steps=steps, damping=0.5) for steps in (1, 4, 12)]
    cosines = [each.found["Neumann phantom"].cosine for each in by_steps]
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.95


def test_the_shared_attachment_is_left_alone(model: MDEQ, found: Saliencies) -> None:
    [attachment] = attachments(model.block)
    assert attachment.gradient == model.config.gradient
    assert attachment.solver == model.config.solver
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_solution_there_is_nothing_to_differentiate(
    model: MDEQ, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.of_model(model)
    stopped = Settling(model, photo, replace(settings, tolerance=1e-5), seconds=0.0).run()
    monkeypatch.setattr(Settling, "run", lambda _: stopped)
    with pytest.raises(UnsolvedError, match=r"^the network found no equilibrium of this photo"):
        saliencies(model, photo, settings, steps=5, damping=0.7)


def test_the_panel_tells_products_cosines_and_times(model: MDEQ, photo: Image.Image, found: Saliencies) -> None:
    panel = saliency_maps(found, seen_by(model, photo))
    exact = found.found[EXACT].products
    assert f"map, 5 products instead of {exact}: the Neumann phantom gradient&#x27;s cosine" in panel.takeaway
    assert panel.result.count("<img") == 6
    assert panel.result.count("cosine 0.") + panel.result.count("cosine 1.") >= 4
    assert 'alt="Saliency by the exact gradient' in panel.result


def test_colours_go_from_dark_to_yellow() -> None:
    image = coloured(torch.tensor([[0.0, 1.0, 5.0, 0.5]]), top=1.0)
    assert [image.getpixel((x, 0)) for x in range(4)] == [(68, 1, 84), (253, 231, 37), (253, 231, 37), (33, 145, 140)]
