"""Checkpoint folders: exact round trips, atomic writes, strict reads, new heads, the Hub's errors in one line."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import official_config, pooled_config

from phantomgrad import NotConvergedWarning, attachments
from phantomgrad_hub import MDEQ, CheckpointError, CheckpointNotFoundError, Preprocessing
from phantomgrad_hub.checkpoint import FILES, WEIGHTS_FILE

safetensors = pytest.importorskip("safetensors.torch")

from safetensors import SafetensorError  # noqa: E402

LABELS = [{"id": f"n0000000{index}", "name": name} for index, name in enumerate(["ant", "bee", "cat", "dog", "eel"])]
CLASSIFIER = ("head.classifier.weight", "head.classifier.bias")


@pytest.fixture(scope="module")
def model() -> MDEQ:
    return MDEQ(pooled_config(), labels=LABELS, preprocessing=Preprocessing(size=32, resize=40, mean=(0.5, 0.4, 0.3)))


@pytest.fixture
def folder(model: MDEQ, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = safetensors.load_file(folder / WEIGHTS_FILE)
    safetensors.save_file(change(weights), folder / WEIGHTS_FILE)


def assert_same_weights(ours: MDEQ, theirs: MDEQ, *, but: tuple[str, ...] = ()) -> None:
    first, second = ours.state_dict(), theirs.state_dict()
    assert set(first) == set(second)
    for key in set(first) - set(but):
        assert torch.equal(first[key], second[key]), key


def test_round_trip(model: MDEQ, folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    loaded = MDEQ.from_pretrained(folder)
    assert loaded.config == model.config
    assert loaded.classes == model.classes
    assert loaded.preprocessing == model.preprocessing
    assert not loaded.training
    [attachment] = attachments(loaded)
    assert attachment.solver == model.config.solver
    assert_same_weights(loaded, model)


def test_round_trip_of_the_official_head(tmp_path: Path) -> None:
    original = MDEQ(official_config()).to(memory_format=torch.channels_last)
    original.save_pretrained(str(tmp_path / "checkpoint"))
    assert_same_weights(MDEQ.from_pretrained(str(tmp_path / "checkpoint")), original)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_smaller_and_read_as_float32(model: MDEQ, folder: Path, dtype: torch.dtype) -> None:
    full = (folder / WEIGHTS_FILE).stat().st_size
    model.save_pretrained(folder, dtype=dtype)
    assert (folder / WEIGHTS_FILE).stat().st_size < 0.7 * full
    loaded = MDEQ.from_pretrained(folder).state_dict()
    for key, value in model.state_dict().items():
        assert loaded[key].dtype == value.dtype
        torch.testing.assert_close(loaded[key], value.to(dtype).to(value.dtype), rtol=0, atol=0)


def test_saving_replaces_files_and_keeps_others(model: MDEQ, folder: Path) -> None:
    (folder / "README.md").write_text("card")
    other = MDEQ(model.config, labels=LABELS)
    other.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "card"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint"]
    assert_same_weights(MDEQ.from_pretrained(folder), other)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_says(model: MDEQ, tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "checkpoint")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "checkpoint").iterdir()}
    assert modes == dict.fromkeys(FILES, mode)
    assert (tmp_path / "checkpoint").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_nothing_is_left_of_a_write_that_fails(
    kind: type[Exception], model: MDEQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise kind("no space left on device")

    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(CheckpointError, match="checkpoint cannot be written: no space left"):
        model.save_pretrained(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["/proc/nowhere", "/proc/nowhere/below", "/proc"])
def test_a_folder_that_cannot_be_written_is_named(model: MDEQ, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^the checkpoint {name} cannot be written: ") as caught:
        model.save_pretrained(name)
    assert "Errno" not in str(caught.value)


@pytest.mark.parametrize("inside", ["best", "last"])
def test_a_run_folder_says_which_folder_to_use(model: MDEQ, tmp_path: Path, inside: str) -> None:
    (tmp_path / "run" / "state").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    model.save_pretrained(tmp_path / "run" / inside)
    with pytest.raises(CheckpointNotFoundError, match=rf"run is a run folder; use \S+/run/{inside}$"):
        MDEQ.from_pretrained(tmp_path / "run")


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    broken = MDEQ(pooled_config())
    with torch.no_grad():
        broken.head.classifier.bias[0] = 1e30
    broken.save_pretrained(tmp_path / "float32")
    with pytest.raises(CheckpointError, match=r"head\.classifier\.bias is infinite or NaN as torch\.float16"):
        broken.save_pretrained(tmp_path / "float16", dtype=torch.float16)
    assert not (tmp_path / "float16").exists()
    with pytest.raises(ValueError, match="dtype must be"):
        broken.save_pretrained(tmp_path / "float64", dtype=torch.float64)


def test_other_labels_make_a_new_head(model: MDEQ, folder: Path) -> None:
    loaded = MDEQ.from_pretrained(folder, labels=["x", "y", "z"])
    assert loaded.labels == ["x", "y", "z"]
    assert loaded.config.num_classes == 3
    assert loaded.head.classifier.weight.shape[0] == 3
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in set(theirs) - set(CLASSIFIER))
    renamed = MDEQ.from_pretrained(folder, labels=["v", "w", "x", "y", "z"])
    assert not torch.equal(renamed.head.classifier.weight, model.head.classifier.weight)
    same = MDEQ.from_pretrained(folder, labels=[record["name"] for record in LABELS])
    assert_same_weights(same, model)
    assert same.classes == model.classes


def _without(key: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if name != key}


def _with(**changes: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {**weights, **{name.replace("__", "."): value for name, value in changes.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("head.norm.bias"), "missing head.norm.bias"),
        (_with(extra__weight=torch.zeros(2)), "unknown extra.weight"),
        (_with(head__classifier__bias=torch.zeros(7)), "head.classifier.bias has shape (7,) instead of (5,)"),
        (_with(head__classifier__bias=torch.zeros(5, dtype=torch.int32)), "head.classifier.bias has dtype I32"),
        (_with(head__classifier__bias=torch.zeros(5).double()), "head.classifier.bias has dtype F64"),
        (_with(head__classifier__bias=torch.full((5,), float("nan"))), "infinite or NaN weights: head.classifier.bias"),
        (_with(head__classifier__bias=torch.full((5,), float("inf"))), "infinite or NaN weights: head.classifier.bias"),
        (lambda weights: {}, "and 77 more"),
    ],
)
def test_weights_that_do_not_fit_are_listed(folder: Path, change: Callable[..., Any], message: str) -> None:
    edit_weights(folder, change)
    with pytest.raises(CheckpointError) as caught:
        MDEQ.from_pretrained(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointNotFoundError, match=f"has no {file}"):
        MDEQ.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda v: {**v, "colour": 1}, "unknown keys in the model config: colour"),
        ("config.json", lambda v: {**v, "channels": [8, 16, 10**9]}, "channels must be an integer between 1 and 8192"),
        ("config.json", lambda v: [v], "a model config is a JSON object, not list"),
        ("config.json", lambda v: {**v, "num_classes": 6}, "labels.json names 5 classes, config.json says 6"),
        ("config.json", lambda v: {**v, "expansion": 3}, "has shape"),
        ("labels.json", lambda v: v[:4] + v[:1], "class names must be unique, repeated: ant"),
        ("labels.json", lambda v: {"names": v}, "labels.json must hold a list of classes"),
        ("labels.json", lambda v: [3, *v[1:]], "the name of a class must be 1 to 300 printable characters, got 3"),
        ("preprocessor.json", lambda v: {**v, "size": 10**6}, "size must be an integer between 8 and 4096"),
        ("preprocessor.json", lambda v: {**v, "crop": 1}, "unknown preprocessing options: crop"),
    ],
)
def test_damaged_json_is_refused(folder: Path, file: str, change: Callable[[Any], Any], message: str) -> None:
    edit_json(folder / file, change)
    with pytest.raises(CheckpointError) as caught:
        MDEQ.from_pretrained(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff\xfe"])
def test_json_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        MDEQ.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_damaged_weights(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        MDEQ.from_pretrained(folder)


def test_truncated_weights(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        MDEQ.from_pretrained(folder)


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_never_loaded(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    MDEQ.from_pretrained(folder)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
        MDEQ.from_pretrained(folder)
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        MDEQ.from_pretrained(folder)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "../x/y", "~/nowhere", ""])
def test_no_such_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        MDEQ.from_pretrained(name)


@pytest.mark.parametrize("name", [None, 3, b"folder"])
def test_what_is_no_path_is_a_type_error(name: Any) -> None:
    with pytest.raises(TypeError, match=f"a checkpoint is named by a str or a path, not {type(name).__name__}"):
        MDEQ.from_pretrained(name)


def test_a_file_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is not a folder with a checkpoint"):
        MDEQ.from_pretrained(folder / "config.json")
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        MDEQ(pooled_config()).save_pretrained(folder / "config.json")


def test_revision_is_for_repositories(folder: Path) -> None:
    with pytest.raises(ValueError, match="revision is for repositories"):
        MDEQ.from_pretrained(folder, revision="main")


@pytest.mark.parametrize("version", ["1", "2"])
def test_every_format_there_was_still_loads(version: str) -> None:
    folder = Path(__file__).parent / "formats" / version
    model = MDEQ.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["format_version"] == int(version)
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        logits = model(images)
    expected = torch.tensor(json.loads((folder.parent / "logits.json").read_text()))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert model.labels == ["ant", "bee", "cat"]


def test_the_format_that_is_written_is_among_those_that_are_kept(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())["format_version"]
    assert (Path(__file__).parent / "formats" / str(written)).is_dir(), (
        "a new format needs a checkpoint in tests/hub/formats"
    )
