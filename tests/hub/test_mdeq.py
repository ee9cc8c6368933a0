"""MDEQ as a module: shapes, purity of the block, equilibrium, gradients, dtypes, copies, classification."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small import official_config, pooled_config
from torch.nn.functional import cross_entropy, interpolate

from phantomgrad import Anderson, FixedPointIteration, attach, attachments, is_attached
from phantomgrad_hub import MDEQ, LabelError, MDEQConfig, Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore::phantomgrad.NotConvergedWarning")

BOTH_HEADS = pytest.mark.parametrize("config", [pooled_config(), official_config()], ids=["pooled", "official"])


def images_for(config: MDEQConfig, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, config.image_size, config.image_size)


@BOTH_HEADS
def test_logits_and_states_have_the_promised_shapes(config: MDEQConfig) -> None:
    model = MDEQ(config)
    images = images_for(config)
    injection = model.inject(images)
    assert injection.shape == (2, 8, 8, 8)
    z = model.equilibrium(injection)
    assert [tuple(x.shape) for x in z] == [(2, 8, 8, 8), (2, 16, 4, 4), (2, 16, 2, 2)]
    assert [x.shape for x in model.initial_state(injection)] == [x.shape for x in z]
    assert all(not x.any() for x in model.initial_state(injection))
    assert model(images).shape == (2, 5)


@pytest.mark.parametrize("size", [(64, 64), (37, 50), (9, 9)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    model = MDEQ(official_config()).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


@BOTH_HEADS
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_has_no_logits(config: MDEQConfig, training: bool) -> None:
    model = MDEQ(config).train(training)
    assert model(images_for(config, 0)).shape == (0, 5)
    with torch.no_grad():
        assert model(images_for(config, 0)).shape == (0, 5)


@pytest.mark.parametrize(
    ("images", "error", "got"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "torch.uint8"),
        ([1.0], TypeError, "list"),
        (torch.zeros(2, 1, 32, 32), ValueError, "shape (2, 1, 32, 32)"),
        (torch.zeros(3, 32, 32), ValueError, "shape (3, 32, 32)"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error, match=re.escape(f"expected float images (B, 3, H, W), got {got}")):
        MDEQ(pooled_config())(images)


@BOTH_HEADS
def test_one_evaluation_is_a_pure_function(config: MDEQConfig) -> None:
    model = MDEQ(config)
    injection = model.inject(images_for(config)).detach()
    z = tuple(torch.randn_like(x) for x in model.initial_state(injection))
    before = copy.deepcopy((z, injection))
    [attachment] = attachments(model)
    first, second = attachment.step(z, injection), attachment.step(z, injection)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*z, injection), (*before[0], before[1]), strict=True))
    pointers = {x.untyped_storage().data_ptr() for x in (*z, injection)}
    assert not pointers & {x.untyped_storage().data_ptr() for x in first}


def test_fusion_equals_the_sum_written_out() -> None:
    model = MDEQ(pooled_config()).double()
    block = model.block
    features = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in zip((8, 16, 16), (8, 4, 2), strict=True)]
    for target in range(3):
        expected = features[target].clone()
        for source in range(3):
            if source != target:
                moved = block.fuse[f"{source}_to_{target}"](features[source])
                expected += interpolate(moved, scale_factor=2 ** max(0, source - target), mode="nearest")
        torch.testing.assert_close(block._fused(features, target), expected, rtol=0, atol=1e-12)


def test_the_block_returns_its_equilibrium() -> None:
    config = pooled_config(image_size=16, solver=FixedPointIteration(max_steps=100, rtol=1e-10))
    model = MDEQ(config).double().eval()
    with torch.no_grad():
        # Training makes a block contract; here each layer is made to depend little on the state.
        for name, parameter in model.block.named_parameters():
            if name.endswith("norm1.weight") or (name.startswith("post_fuse") and name.endswith("norm.weight")):
                parameter.fill_(0.02)
            if name.endswith("norm1.bias"):
                parameter.fill_(1.0)
        injection = model.inject(images_for(config).double())
        z = model.equilibrium(injection)
        [attachment] = attachments(model)
        image = attachment.step(z, injection)
    assert attachment.solution is not None
    assert attachment.solution.converged.all()
    for x, fx in zip(z, image, strict=True):
        torch.testing.assert_close(x, fx, rtol=0, atol=1e-7)


@BOTH_HEADS
def test_training_moves_every_weight_and_lowers_the_loss(config: MDEQConfig) -> None:
    model = MDEQ(config).train()
    images, targets = images_for(config, 10), torch.arange(10) % 5
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(5):
        loss = cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_eval_mode_treats_images_independently() -> None:
    config = official_config()
    model = MDEQ(config).eval()
    images = images_for(config, 3)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@BOTH_HEADS
@pytest.mark.parametrize("channels_last", [False, True])
def test_bfloat16_autocast_trains(config: MDEQConfig, channels_last: bool) -> None:
    model, images = MDEQ(config), images_for(config, 4)
    if channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        injection = model.inject(images)
        z0 = model.initial_state(injection)
        logits = model(images)
    if channels_last:
        assert injection.is_contiguous(memory_format=torch.channels_last)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in z0)
    assert {x.dtype for x in z0} == {injection.dtype}
    logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_channels_last_gives_the_same_logits() -> None:
    config = official_config()
    model, images = MDEQ(config).double().eval(), images_for(config).double()
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("training", [False, True])
def test_photos_that_have_converged_leave_the_batch_and_change_no_answer(training: bool) -> None:
    torch.manual_seed(1)
    solver = Anderson(max_steps=20, rtol=0.4)
    model = MDEQ(pooled_config(solver=solver, dropout=0.5)).double().train(training)
    injection = model.inject(images_for(model.config, 6).double()).detach()
    z0, inputs = model.initial_state(injection), model.block_inputs(injection)
    assert len(inputs) == 1 + training
    rows: list[int] = []
    layer: Any = model.block.branches[0]
    layer[0].register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    results, fewest = [], []
    [attachment] = attachments(model)
    for _ in range(2):
        with torch.no_grad():
            results.append(model.block(z0, *inputs))
        fewest.append(min(rows))
        rows.clear()
        attachment.remove()
        attachment = attach(model.block, solver=solver)
    assert fewest[0] < fewest[1] == 6
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_dropout_holds_one_mask_for_a_solve() -> None:
    config = pooled_config(dropout=0.5)
    model = MDEQ(config).train()
    injection = model.inject(images_for(config)).detach()
    masks = model._draw_masks(injection)
    assert masks is not None
    assert {float(value) for value in masks[0][0].unique()} <= {0.0, 2.0}
    [attachment] = attachments(model)
    z = tuple(torch.randn_like(x) for x in model.initial_state(injection))
    once, twice = attachment.step(z, injection, masks), attachment.step(z, injection, masks)
    assert torch.equal(once[0], twice[0])
    assert not torch.equal(once[0], attachment.step(z, injection, model._draw_masks(injection))[0])
    assert model.eval()._draw_masks(injection) is None
    model.train()(images_for(config)).sum().backward()


def test_blocks_and_expansion_per_branch() -> None:
    config = pooled_config(blocks=(1, 2, 1), expansion=(1, 2, 3), stem_channels=12, input_downsamplings=3)
    model = MDEQ(config)
    assert [len(branch) for branch in model.block.branches] == [1, 2, 1]
    assert [layer.conv.out_channels for layer in model.stem.layers] == [12, 12, 8]
    assert model.inject(images_for(config)).shape == (2, 8, 4, 4)
    model(images_for(config)).sum().backward()


def test_weight_norm_where_the_config_says() -> None:
    for layer in ("branches", "fuse", "post_fuse"):
        flags = {f"weight_norm_{name}": name == layer for name in ("branches", "fuse", "post_fuse")}
        keys = [key for key in MDEQ(pooled_config(**flags)).state_dict() if "parametrizations" in key]
        assert keys
        assert all(key.startswith(f"block.{layer}.") for key in keys)


def test_initial_weights_follow_conv_init_std() -> None:
    model = MDEQ(pooled_config(channels=(64, 64), conv_init_std=0.01))
    assert model.stem.layers[1].conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.block.branches[0][0].conv1.weight.std().item() > 0.02


def test_a_deep_copy_is_independent_and_attached() -> None:
    config = pooled_config()
    model = MDEQ(config).eval()
    images = images_for(config)
    expected = model(images).detach()
    clone = copy.deepcopy(model)
    assert is_attached(clone.block)
    torch.testing.assert_close(clone(images), expected)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(images), expected)


def test_the_attachment_is_that_of_the_config() -> None:
    config = pooled_config(eval_solver=FixedPointIteration(max_steps=7))
    [attachment] = attachments(MDEQ(config))
    assert attachment.gradient == config.gradient
    assert attachment.solver == config.solver
    assert attachment.eval_solver == config.eval_solver


def test_classify(tmp_path: Path) -> None:
    model = MDEQ(pooled_config(), labels=["ant", "bee", "cat", "dog", "eel"])
    photo = Image.effect_noise((50, 40), 80).convert("RGB")
    photo.save(tmp_path / "photo.png")
    result = model.classify(photo)
    names, probabilities = zip(*result, strict=True)
    assert set(names) == set(model.labels)
    assert list(probabilities) == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1.0, abs=1e-5)
    assert all(isinstance(value, float) for value in probabilities)
    assert model.training
    assert len(model.classify(photo, top=2)) == 2
    assert len(model.classify(photo, top=99)) == 5
    several = model.classify([photo, tmp_path / "photo.png", str(tmp_path / "photo.png")], top=1)
    assert [row[0][0] for row in several] == [names[0]] * 3
    assert model.classify([]) == []
    with pytest.raises(ValueError, match="top must be an integer of at least 1, got 0"):
        model.classify(photo, top=0)


def test_preprocess_is_the_models_own() -> None:
    model = MDEQ(pooled_config(), preprocessing=Preprocessing(size=48, mean=(0, 0, 0), std=(1, 1, 1)))
    pixels = model.preprocess(Image.new("RGB", (100, 60), (255, 0, 51)))
    assert pixels.shape == (1, 3, 48, 48)
    torch.testing.assert_close(pixels[0, :, 5, 5], torch.tensor([1.0, 0.0, 0.2]))
    assert MDEQ(pooled_config()).preprocess(Image.new("L", (9, 9))).shape == (1, 3, 32, 32)


def test_labels() -> None:
    config = pooled_config()
    assert MDEQ(config).labels == ["class 0", "class 1", "class 2", "class 3", "class 4"]
    records = [{"id": f"n0000000{i}", "name": f"thing {i}"} for i in range(5)]
    model = MDEQ(config, labels=records)
    assert model.labels == [record["name"] for record in records]
    assert [label.to_dict() for label in model.classes] == records
    with pytest.raises(LabelError, match="labels names 1 classes, num_classes is 5"):
        MDEQ(config, labels=["one"])
    with pytest.raises(LabelError, match="class names must be unique, repeated: a"):
        MDEQ(config, labels=["a", "a", "b", "c", "d"])
    with pytest.raises(LabelError, match="class ids must be unique"):
        MDEQ(replace(config, num_classes=2), labels=[{"id": "n1", "name": "a"}, {"id": "n1", "name": "b"}])
    with pytest.raises(LabelError, match="1 to 300 printable characters"):
        MDEQ(replace(config, num_classes=2), labels=["a", " "])
    with pytest.raises(LabelError, match="a class has an id and a name, not colour"):
        MDEQ(replace(config, num_classes=1), labels=[{"name": "a", "colour": "red"}])
