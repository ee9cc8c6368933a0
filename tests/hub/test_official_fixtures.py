"""MDEQ and the conversion against checkpoint files of both official codes and what those codes compute from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from phantomgrad import Attachment, FixedPointIteration, UnrolledPhantom, attachments
from phantomgrad_hub import MDEQ, MDEQConfig, convert_official
from phantomgrad_hub.convert import convert_key

safetensors = pytest.importorskip("safetensors.torch")

TOLERANCE = 1e-9
LOCUSLAB = ("imagenet-narrow", "cifar-tiny-narrow")


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "fixtures" / "mdeq-official"


def locuslab_config(folder: Path, name: str) -> MDEQConfig:
    """The config that the official settings of a file describe."""
    model = json.loads((folder / "locuslab-deq.configs.json").read_text())[name]["MODEL"]
    stage = model["EXTRA"]["FULL_STAGE"]
    return MDEQConfig(
        channels=tuple(stage["NUM_CHANNELS"]),
        blocks=tuple(stage["NUM_BLOCKS"]),
        head_channels=tuple(stage["HEAD_CHANNELS"]),
        final_channels=stage["FINAL_CHANSIZE"],
        num_classes=model["NUM_CLASSES"],
        image_size=model["IMAGE_SIZE"][0],
        input_downsamplings=model["DOWNSAMPLE_TIMES"],
        injection_layer=model["DOWNSAMPLE_TIMES"] > 0 or stage["NUM_BRANCHES"] > 2,
        groups=model["NUM_GROUPS"],
        expansion=model["EXPANSION_FACTOR"],
        dropout=model["DROPOUT"],
        block_affine=model["BLOCK_GN_AFFINE"],
        fuse_affine=model["FUSE_GN_AFFINE"],
        post_fuse_affine=model["POST_GN_AFFINE"],
        weight_norm_branches=model["WNORM"],
        weight_norm_post_fuse=model["WNORM"],
    )


def attachment_of(model: MDEQ) -> Attachment:
    [attachment] = attachments(model)
    return attachment


def largest_difference(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


@pytest.mark.parametrize("name", LOCUSLAB)
def test_locuslab_states_and_logits(folder: Path, name: str, record_testsuite_property: Any) -> None:
    expected = safetensors.load_file(folder / f"locuslab-deq-{name}.expected.safetensors")
    model = convert_official(folder / f"locuslab-deq-{name}.pkl", locuslab_config(folder, name)).double()
    step = attachment_of(model).step
    with torch.no_grad():
        injection = model.inject(expected["input"])
        pairs = [(injection, expected["injection"])]
        z = model.initial_state(injection)
        for number in (1, 2, 3):
            z = step(z, injection)
            pairs += [(x, expected[f"z{number}.branch{branch}"]) for branch, x in enumerate(z)]
        pairs.append((model.head(z), expected["logits_after_3_steps"]))
    error = largest_difference(pairs)
    record_testsuite_property(f"largest error, locuslab fixture, {name}", error)
    assert error < TOLERANCE


def test_locuslab_widths_are_inferred_from_the_shapes(folder: Path) -> None:
    with pytest.warns(UserWarning, match="widths of no official model"):
        inferred = convert_official(folder / "locuslab-deq-imagenet-narrow.pkl").config
    given = locuslab_config(folder, "imagenet-narrow")
    for option in ("channels", "blocks_per_branch", "expansion_per_branch", "head_channels", "final_channels"):
        assert getattr(inferred, option) == getattr(given, option)
    for option in ("num_classes", "groups", "input_downsamplings", "injection_layer", "stem_widths"):
        assert getattr(inferred, option) == getattr(given, option)
    for option in ("weight_norm_branches", "weight_norm_fuse", "weight_norm_post_fuse", "post_fuse_affine"):
        assert getattr(inferred, option) == getattr(given, option)


def test_torchdeq_logits_loss_and_every_phantom_gradient(folder: Path, record_testsuite_property: Any) -> None:
    expected = safetensors.load_file(folder / "torchdeq-zoo-imagenet-narrow.expected.safetensors")
    with pytest.warns(UserWarning, match="assuming 8 groups and 2 input downsamplings"):
        model = convert_official(folder / "torchdeq-zoo-imagenet-narrow.pth").double()
    assert model.config.channels == (8, 16, 32, 64)
    assert not model.config.weight_norm_post_fuse
    attachment = attachment_of(model)

    with torch.no_grad():
        injection = model.inject(expected["input"])
        z = model.initial_state(injection)
        for _ in range(3):
            z = tuple(0.6 * fz + 0.4 * x for fz, x in zip(attachment.step(z, injection), z, strict=True))
        errors = {"eval logits": largest_difference([(model.head(z), expected["logits_eval_3_damped_steps"])])}

    # The contract's solution is the image of the last iterate; the fixture's is the iterate itself, hence max_steps=0.
    here = FixedPointIteration(max_steps=0)
    with attachment.using(gradient=UnrolledPhantom(steps=5, damping=0.6), solver=here):
        logits = model.head(model.block(z, model.inject(expected["input"])))
    loss = cross_entropy(logits, expected["labels"].long())
    loss.backward()
    errors["train logits"] = largest_difference([(logits, expected["logits_train"])])
    errors["loss"] = largest_difference([(loss, expected["loss"])])
    gradients = {name.removeprefix("grad."): value for name, value in expected.items() if name.startswith("grad.")}
    parameters = dict(model.named_parameters())
    assert {convert_key(name) for name in gradients} == set(parameters)
    for name, gradient in gradients.items():
        ours = parameters[str(convert_key(name))].grad
        assert ours is not None
        assert ours.abs().max() > 0
        errors[name] = largest_difference([(ours, gradient)])
    record_testsuite_property("largest error, torchdeq fixture", max(errors.values()))
    assert max(errors.values()) < TOLERANCE, max(errors, key=errors.__getitem__)
