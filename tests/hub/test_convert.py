"""Conversion of official checkpoint files: the variants met in the wild, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phantomgrad import FixedPointIteration
from phantomgrad_hub import (
    MDEQ,
    CheckpointError,
    CheckpointNotFoundError,
    ClassLabel,
    LabelError,
    convert_official,
    mdeq_cifar_tiny,
)
from phantomgrad_hub.cli.main import main
from phantomgrad_hub.convert import convert_key
from phantomgrad_hub.labels import imagenet_labels, read_labels

_CONV_NORM = {"conv": "0", "norm": "1"}


def official_key(key: str) -> str:
    """The key in the locuslab layout of one of ours, for MDEQ-Tiny."""
    parts = key.replace("parametrizations.weight.original0", "weight_g")
    parts = parts.replace("parametrizations.weight.original1", "weight_v").split(".")
    match parts:
        case ["stem", "layers", i, kind, tensor]:
            return f"downsample.{3 * int(i) + int(_CONV_NORM[kind])}.{tensor}"
        case ["block", "branches", i, j, layer, tensor]:
            return f"fullstage.branches.{i}.blocks.{j}.{layer.replace('norm', 'gn')}.{tensor}"
        case ["block", "fuse", path, step, kind, tensor]:
            source, target = path.split("_to_")
            step = f"{step}." if target > source else ""
            return f"fullstage.fuse_layers.{target}.{source}.net.{step}{kind.replace('norm', 'gnorm')}.{tensor}"
        case ["block", "post_fuse", i, kind, tensor]:
            return f"fullstage.post_fuse_layers.{i}.{kind.replace('norm', 'gnorm')}.{tensor}"
        case ["head", "widen", i, "shortcut", kind, tensor]:
            return f"incre_modules.{i}.0.downsample.{_CONV_NORM[kind]}.{tensor}"
        case ["head", "widen", i, layer, kind, tensor]:
            number = ("reduce", "middle", "expand").index(layer) + 1
            return f"incre_modules.{i}.0.{kind.replace('norm', 'bn')}{number}.{tensor}"
        case ["head", "merge", i, kind, tensor]:
            return f"downsamp_modules.{i}.{_CONV_NORM[kind]}.{tensor}"
        case ["head", "final", kind, tensor]:
            return f"final_layer.{_CONV_NORM[kind]}.{tensor}"
        case ["head", "classifier", tensor]:
            return f"classifier.{tensor}"
    raise AssertionError(key)


@pytest.fixture(scope="module")
def tiny() -> MDEQ:
    return mdeq_cifar_tiny()


@pytest.fixture(scope="module")
def official(tiny: MDEQ) -> dict[str, Tensor]:
    return {official_key(key): value for key, value in tiny.state_dict().items()}


def test_the_key_map_is_one_to_one(tiny: MDEQ, official: dict[str, Tensor]) -> None:
    assert [convert_key(key) for key in official] == list(tiny.state_dict())


@pytest.mark.parametrize(
    "variant", ["bare", "module", "model", "both", "copy", "training", "torchdeq names", "half", "double", "legacy"]
)
def test_variants(tiny: MDEQ, official: dict[str, Tensor], variant: str, tmp_path: Path) -> None:
    prefixes = {"module": "module.", "model": "model.", "both": "module.model."}
    content: Any = {prefixes.get(variant, "") + key: value for key, value in official.items()}
    if variant == "copy":
        content |= {
            key.replace("fullstage", "fullstage_copy"): value for key, value in official.items() if "stage" in key
        }
    if variant == "torchdeq names":
        content = {key.replace("fullstage", "full_stage"): value for key, value in official.items()}
    if variant in ("half", "double"):
        dtype = {"half": torch.float16, "double": torch.float64}[variant]
        content = {key: value.to(dtype) if value.is_floating_point() else value for key, value in official.items()}
    if variant == "training":
        content = {"epoch": 3, "state_dict": content, "best_acc1": 75.0, "optimizer": {"state": {}, "param_groups": []}}
    # As torch wrote files before 1.6, when the published ones were made.
    torch.save(content, tmp_path / "official.pkl", _use_new_zipfile_serialization=variant != "legacy")
    model = convert_official(tmp_path / "official.pkl")
    assert model.config == tiny.config
    assert model.preprocessing == tiny.preprocessing
    assert not model.training
    tolerance = 1e-3 if variant == "half" else 0
    for key, value in tiny.state_dict().items():
        assert model.state_dict()[key].dtype == value.dtype
        torch.testing.assert_close(model.state_dict()[key], value, rtol=tolerance, atol=tolerance)


def test_unknown_widths_are_inferred_with_a_warning(tmp_path: Path) -> None:
    from small import official_config

    # The official code's name for the third convolution of a stem.
    config = official_config(channels=(16, 16), head_channels=(4, 4), groups=8, input_downsamplings=3)
    model = MDEQ(config)
    content = {official_key(key): value for key, value in model.state_dict().items() if not key.startswith("stem.")}
    for key, value in model.state_dict().items():
        if key.startswith("stem.injection"):
            content[key.replace("stem.injection.conv", "stage0.0").replace("stem.injection.norm", "stage0.1")] = value
        elif key.startswith("stem.layers.2"):
            content[
                key.replace("stem.layers.2.conv", "downsample.DS3").replace("stem.layers.2.norm", "downsample.DS3-BN")
            ] = value
        elif key.startswith("stem."):
            content[official_key(key)] = value
    torch.save(content, tmp_path / "official.pkl")
    with pytest.warns(
        UserWarning,
        match="assuming 8 groups and 3 input downsamplings; give a config with groups and input_downsamplings if that is wrong",
    ):
        inferred = convert_official(tmp_path / "official.pkl").config
    assert inferred.channels == (16, 16)
    assert inferred.expansion_per_branch == (2, 2)
    assert inferred.input_downsamplings == 3


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a pickle was executed",))


class _Command:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.system, ("exit 1",))


NAN = torch.full((10,), float("nan"))
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "a key that no MDEQ classifier has, such as a segmentation head": (
        {"last_layer.0.weight": torch.zeros(1)},
        "FILE holds keys of no official MDEQ classifier: last_layer.0.weight",
    ),
    "a missing key": ({"classifier.bias": None}, "FILE does not fit its config: missing head.classifier.bias"),
    "a missing key that the widths are read from": (
        {"final_layer.0.weight": None},
        "FILE is no complete MDEQ classifier: head.final.conv is missing",
    ),
    "a key of a layer that these widths have not": (
        {"stage0.1.bias": torch.zeros(24)},
        "FILE does not fit its config: unknown stem.injection.norm.bias",
    ),
    "a tensor of another shape": (
        {"classifier.bias": torch.zeros(3)},
        "FILE does not fit its config: head.classifier.bias has shape (3,) instead of (10,)",
    ),
    "a weight that is not finite": ({"classifier.bias": NAN}, "FILE does not fit its config: head.classifier.bias is infinite or NaN"),
    "a key with and without a prefix": (
        {"module.classifier.bias": torch.zeros(10)},
        "FILE holds classifier.bias twice, with different prefixes",
    ),
    "keys of both layouts": (
        {"full_stage.post_fuse_layers.0.conv.weight_g": torch.zeros(24)},
        "FILE holds block.post_fuse.0.conv.parametrizations.weight.original0 twice, in two layouts",
    ),
    "a weight of complex numbers": (
        {"classifier.bias": torch.zeros(10, dtype=torch.complex64)},
        "FILE holds classifier.bias as complex64, and floating-point numbers are expected",
    ),
    "a weight of integers": (
        {"classifier.bias": torch.zeros(10, dtype=torch.int64)},
        "FILE holds classifier.bias as int64, and floating-point numbers are expected",
    ),
    "a weight of truth values": (
        {"classifier.bias": torch.zeros(10, dtype=torch.bool)},
        "FILE holds classifier.bias as bool, and floating-point numbers are expected",
    ),
    "a sparse weight": (
        {"classifier.bias": torch.zeros(10).to_sparse()},
        "FILE holds classifier.bias as a sparse tensor, and a dense one is expected",
    ),
    "a count that is no integer": (
        {"downsample.1.num_batches_tracked": torch.tensor(1.5)},
        "FILE holds downsample.1.num_batches_tracked as float32, and an integer is expected",
    ),
    "an entry that is no tensor": ({"classifier.bias": "text"}, "FILE holds entries that are no tensors: classifier.bias"),
}  # fmt: skip
"""Changed keys of a good file, and what is said."""

DAMAGED = "FILE is damaged, or holds more than tensors, which is never loaded; download it again"
CONTENTS: dict[str, tuple[bytes | Any, str]] = {
    "an empty or damaged file": (b"\x80\x02}q\x00(", DAMAGED),
    "a hostile pickle, which is not executed": (
        {"classifier.weight": _Command()},
        "FILE holds more than tensors, posix.system, which is never loaded; have its author save the state_dict alone",
    ),
    "other objects beside the tensors": (
        {"state_dict": {}, "args": argparse.Namespace(lr=0.1)},
        "FILE holds more than tensors, argparse.Namespace, which is never loaded; have its author save the state_dict alone",
    ),
    "no dictionary of tensors": ([torch.zeros(1)], "FILE holds no dictionary of tensors"),
    "the page of a download instead of the file": (
        b"<!DOCTYPE html><html>",
        "FILE is a web page: download the file that it links to",
    ),
    "a pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "FILE is a pointer of Git LFS: fetch the file itself with git lfs pull",
    ),
}
"""What a file holds instead, and what is said."""


def _says(file: Path, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert_official(file)
    assert str(caught.value) == message.replace("FILE", str(file))


@pytest.mark.filterwarnings("ignore:.*widths of no official model")
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("what", CHANGES)
def test_files_that_do_not_fit_are_refused(official: dict[str, Tensor], what: str, tmp_path: Path) -> None:
    change, message = CHANGES[what]
    content = {key: value for key, value in {**official, **change}.items() if value is not None}
    torch.save(content, tmp_path / "official.pkl")
    _says(tmp_path / "official.pkl", message)


@pytest.mark.parametrize("what", CONTENTS)
def test_files_of_another_kind_are_refused(what: str, tmp_path: Path) -> None:
    content, message = CONTENTS[what]
    file = tmp_path / "official.pkl"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    _says(file, message)


def test_the_page_has_every_refusal() -> None:
    page = (Path(__file__).parents[2] / "docs" / "official-checkpoints.md").read_text(encoding="utf-8")
    for what, (_, message) in {**CHANGES, **CONTENTS}.items():
        assert f"| {what} | {message} |" in page


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "official.pkl"
    with pytest.raises(CheckpointNotFoundError, match="there is no file"):
        convert_official(file)
    for content in (b"", b"some text", pickle.dumps(_Bomb()), pickle.dumps({"a": 1})[:-3]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="never loaded"):
            convert_official(file)
    for value in ([torch.zeros(1)], {}, torch.zeros(2)):
        torch.save(value, file)
        with pytest.raises(CheckpointError, match="holds no dictionary of tensors"):
            convert_official(file)
    torch.save({"state_dict": {"classifier.weight": torch.zeros(10, 200)}}, file)
    with pytest.raises(CheckpointError, match="is no complete MDEQ classifier: "):
        convert_official(file)
    safe = tmp_path / "model.safetensors"
    safe.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    _says(safe, "FILE is no file of torch.save, as official checkpoints are; a checkpoint folder needs no conversion")


def test_fields_of_the_config_that_are_given_are_not_inferred(official: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "official.pkl"
    torch.save(official, file)
    solver = {"type": "FixedPointIteration", "max_steps": 7}
    config = convert_official(file, {"groups": 4, "image_size": 48, "solver": solver}).config
    assert (config.groups, config.image_size, config.channels) == (4, 48, (24, 24))
    assert config.solver == FixedPointIteration(max_steps=7)
    with pytest.raises(CheckpointError, match=r"be built: unknown keys in the model config: group$"):
        convert_official(file, {"group": 4})
    with pytest.raises(CheckpointError, match=r"be built: channels must be multiples of groups \(5, "):
        convert_official(file, {"groups": 5})
    with pytest.raises(CheckpointError, match=r"does not fit its config: .*has shape"):
        convert_official(file, {"channels": [16, 16], "head_channels": [8, 16]})


def test_classes_are_named_where_the_dataset_is_known(official: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "official.pkl"
    torch.save(official, file)
    assert convert_official(file).labels[:2] == ["airplane", "automobile"]
    own = [f"kind {index}" for index in range(10)]
    assert convert_official(file, labels=own).labels == own
    with pytest.raises(LabelError, match="labels names 3 classes, num_classes is 10"):
        convert_official(file, labels=own[:3])
    grown = {
        key: torch.zeros(1000, *value.shape[1:]) if "classifier" in key else value for key, value in official.items()
    }
    torch.save(grown, file)
    assert convert_official(file).classes == imagenet_labels()
    torch.save({key: value[:7] if "classifier" in key else value for key, value in official.items()}, file)
    assert convert_official(file).labels == [f"class {index}" for index in range(7)]


def test_imagenets_classes_are_those_of_the_class_table(shared: Path) -> None:
    table = json.loads((shared / "data" / "imagenet_classes.json").read_text())
    assert [(label.id, label.name) for label in imagenet_labels()] == [(row["wnid"], row["name"]) for row in table]


def test_imagenets_classes_are_in_the_order_of_their_ids() -> None:
    ids = [str(label.id) for label in imagenet_labels()]
    assert len(ids) == 1000
    assert ids == sorted(ids)
    assert imagenet_labels()[1] == ClassLabel(name="goldfish", id="n01443537")
    assert imagenet_labels()[999].name == "toilet paper"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red\n\n  green thing \nblue\n", ["red", "green thing", "blue"]),
        ('["red", {"name": "green thing", "id": "n1"}, "blue"]', ["red", "green thing", "blue"]),
        ('{"name": "red"}', "names no classes: it must hold a list of classes"),
        ("[1]", "names no classes: the name of a class must be"),
        ("[", "names no classes: "),
        ("red\nred", "names no classes: class names must be unique, repeated: red"),
        (b"\xff\xfe", "names no classes: "),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_of_class_names(text: str | bytes | None, expected: Any, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if isinstance(expected, list):
        assert [label.name for label in read_labels(file)] == expected
        return
    with pytest.raises(LabelError) as caught:
        read_labels(file)
    assert str(caught.value).startswith(f"{file} {expected}")


# The command.


def test_the_command_converts_names_and_says_what_it_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from small import official_config

    model = MDEQ(official_config(channels=(16, 16), head_channels=(4, 4), injection_layer=False, input_downsamplings=0))
    file, out = tmp_path / "official.pkl", tmp_path / "out"
    torch.save({official_key(key): value for key, value in model.state_dict().items()}, file)
    assert main(["convert", str(file), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == (
        f"phantomgrad convert: {file} has the widths of no official model: assuming 8 groups and 0 input downsamplings; "
        "give a config with groups and input_downsamplings if that is wrong\n"
    )
    assert printed.out.endswith("for 5 classes: without names; --labels FILE names them\n")
    (tmp_path / "config.json").write_text('{"groups": 4, "input_downsamplings": 0, "image_size": 32}')
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    extras = ["--config", str(tmp_path / "config.json"), "--labels", str(tmp_path / "names.txt")]
    assert main(["convert", str(file), "--out", str(out), *extras]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.endswith("for 5 classes: ant, bee, cat, ...\n")
    again = MDEQ.from_pretrained(out)
    assert again.labels == ["ant", "bee", "cat", "dog", "eel"]
    assert again.config.groups == 4
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert main(["convert", str(file), "--out", str(out), *extras, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["named"] is True


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "cannot be read: No such file"), ("{", "is not JSON: "), ("[]", "must hold a JSON object of fields")],
)
def test_a_bad_config_file_is_bad_usage(
    config: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    if config is not None:
        file.write_text(config)
    assert main(["convert", "x.pkl", "--out", str(tmp_path / "out"), "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"phantomgrad convert: --config {file} {message}")
    assert error.count("\n") == 1


def test_a_folder_that_is_no_checkpoint_is_left_alone(
    official: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("important")
    assert main(["convert", "x.pkl", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"phantomgrad convert: {tmp_path} is not empty and is no checkpoint; give another folder\n"
    )
    assert (tmp_path / "config.json").read_text() == "important"
