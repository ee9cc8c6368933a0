"""Checkpoints made to harm: each is refused with one of our errors in one printable line, and nothing of it is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import official_config, pooled_config

from phantomgrad_hub import MDEQ, CheckpointError, ConfigError, MDEQConfig
from phantomgrad_hub.config import MAX_PARAMETERS
from phantomgrad_hub.text import printable, summarise

safetensors = pytest.importorskip("safetensors.torch")

LOADED = "head.classifier.weight"
Attack = Callable[[Path], object]


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


@pytest.fixture(scope="module")
def model() -> MDEQ:
    return MDEQ(pooled_config())


@pytest.fixture
def folder(model: MDEQ, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _config(**changes: Any) -> Attack:
    def attack(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return attack


def _text(name: str, text: str | bytes) -> Attack:
    content = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(content)


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Attack:
    def attack(folder: Path) -> None:
        weights = safetensors.load_file(folder / "model.safetensors")
        change(weights)
        safetensors.save_file(weights, folder / "model.safetensors")

    return attack


def _header(change: Callable[[dict[str, Any]], object]) -> Attack:
    def attack(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return attack


def _pickled(pack: Callable[[bytes], bytes]) -> Attack:
    return lambda folder: (folder / "model.safetensors").write_bytes(pack(pickle.dumps(Bomb(str(folder / "ran")))))


def _as_torch_zip(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3")
    # As large as weights would be, so that size alone does not give it away.
    return stream.getvalue().ljust(200_000, b"\0")


def _replace(name: str, make: Callable[[Path], object]) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return attack


def _swap(header: dict[str, Any]) -> None:
    """Two tensors that claim the same bytes."""
    names = [name for name in header if name != "__metadata__"]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


def _huge(header: dict[str, Any]) -> None:
    header[LOADED]["shape"] = [2**40, 2**40]


ATTACKS: dict[str, tuple[Attack, str]] = {
    "pickle named model.safetensors": (_pickled(lambda content: content.ljust(200_000, b".")), "damaged"),
    "torch.save file named model.safetensors": (_pickled(_as_torch_zip), "damaged"),
    "pickle instead of weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "has no model.safetensors; pytorch_model.bin is a pickle, which is never loaded",
    ),
    "weights cut short": (
        lambda folder: os.truncate(folder / "model.safetensors", 150_000),
        "damaged or no safetensors file",
    ),
    "weights of 20 bytes": (lambda folder: os.truncate(folder / "model.safetensors", 20), "damaged or no safetensors file"),
    "header of 2**60 bytes": (
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + bytes(200_000)),
        "damaged or no safetensors file",
    ),
    "huge shape": (_header(_huge), "damaged or no safetensors file"),
    "overlapping tensors": (_header(_swap), "damaged or no safetensors file"),
    "path in a tensor's name": (_weights(lambda weights: weights.update({"../../x": torch.zeros(1)})), "unknown ../../x"),
    "escape codes in a tensor's name": (
        _weights(lambda weights: weights.update({"\x1b[2J\nx": torch.zeros(1)})),
        r"unknown \x1b[2J\nx",
    ),
    "a name of a million letters": (_weights(lambda weights: weights.update({"x" * 10**6: torch.zeros(1)})), "unknown xxx"),
    "NaN": (_weights(lambda weights: weights[LOADED].fill_(float("nan"))), "infinite or NaN weights"),
    "infinity": (_weights(lambda weights: weights[LOADED][0].fill_(float("inf"))), "infinite or NaN weights"),
    "complex weights": (_weights(lambda weights: weights.update({LOADED: weights[LOADED] + 0j})), "has dtype C64"),
    "integer weights": (_weights(lambda weights: weights.update({LOADED: weights[LOADED].long()})), "has dtype I64"),
    "double weights": (_weights(lambda weights: weights.update({LOADED: weights[LOADED].double()})), "has dtype F64"),
    "another shape": (_weights(lambda weights: weights.update({LOADED: weights[LOADED].T.contiguous()})), "instead of"),
    "a missing tensor": (_weights(lambda weights: weights.pop(LOADED)), f"missing {LOADED}"),
    "weights that are a folder": (_replace("model.safetensors", Path.mkdir), "has no model.safetensors"),
    "weights that are a link to a device": (
        _replace("model.safetensors", lambda file: file.symlink_to("/dev/zero")),
        "has no model.safetensors",
    ),
    "weights that are a pipe": (_replace("model.safetensors", os.mkfifo), "has no model.safetensors"),
    "config that is a link to a device": (_replace("config.json", lambda file: file.symlink_to("/dev/zero")), "has no config.json"),
    "config that is a link to another file": (
        _replace("config.json", lambda file: file.symlink_to("/etc/hostname")),
        "not valid JSON",
    ),
    "config nested 100,000 deep": (_text("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000), "not valid JSON"),
    "config with a number of 10,000 digits": (_text("config.json", '{"image_size": 1' + "0" * 10_000 + "}"), "not valid JSON"),
    "config with a key twice": (_text("config.json", '{"channels": 1, "channels": 2}'), "the key 'channels' is there twice"),
    "config that is a list": (_text("config.json", "[]"), "a model config is a JSON object, not list"),
    "config in UTF-16": (_text("config.json", "{}".encode("utf-16")), "not valid JSON"),
    "config with NaN": (_config(dropout=float("nan")), "dropout must be"),
    "config of a million unknown keys": (
        _text("config.json", json.dumps({"format_version": 1, **{f"k{index}": 1 for index in range(10**6)}})),
        "unknown keys in the model config: k0",
    ),
    "config of 900 million parameters": (
        _config(channels=[2048, 2048, 2048], expansion=1, groups=8),
        "too few for the model that its config.json describes",
    ),
    "config of a trillion parameters": (_config(channels=[8192, 8192, 8192], expansion=32), "the bound is"),
    "config of huge images": (_config(image_size=4096, stem_channels=8192), "the bound is"),
    "config of endless steps": (
        _config(solver={**official_config().to_dict()["solver"], "max_steps": 10**9}),
        "max_steps must be at most",
    ),
    "config that names a class of Python": (_config(gradient={"type": "os.system", "steps": 1}), "unknown type 'os.system'"),
    "config of a newer format": (_config(format_version=99), "update phantomgrad"),
    "config of transformers": (_text("config.json", '{"model_type": "resnet"}'), "is that of a transformers model"),
    "labels that are a bomb": (_text("labels.json", json.dumps([{"name": "x" * 10**6}])), "1 to 300 printable characters"),
    "labels with escape codes": (_text("labels.json", json.dumps(["\x1b[2J"] * 5)), "1 to 300 printable characters"),
    "too many labels": (_text("labels.json", json.dumps([f"c{index}" for index in range(10**5)])), "names 100000 classes"),
    "preprocessing of huge photos": (
        _text("preprocessor.json", json.dumps({"format_version": 1, "size": 10**6})),
        "size must be",
    ),
    "facts with escape codes": (_text("card.json", json.dumps({"title": "\x1b[2J"})), "title must be a text"),
    "a source elsewhere": (
        _text("source.json", json.dumps({"repository": "../../etc", "commit": "0" * 40})),
        "a source's repository is user/name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_checkpoint_is_refused_in_one_line(name: str, folder: Path) -> None:
    attack, message = ATTACKS[name]
    attack(folder)
    with pytest.raises(CheckpointError) as caught:
        MDEQ.from_pretrained(folder)
    told = str(caught.value)
    assert message in told
    assert len(told) < 2000
    assert told.isprintable()
    assert not (folder / "ran").exists()


def test_a_large_config_is_refused_before_memory_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _config(channels=[2048, 2048, 2048], expansion=1, groups=8)(folder)

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr(MDEQ, "__init__", fail)
    with pytest.raises(CheckpointError, match="too few for the model"):
        MDEQ.from_pretrained(folder)


@pytest.mark.parametrize("config", [pooled_config(), official_config(), pooled_config(num_classes=5000, blocks=3)])
def test_the_bounds_of_a_file_hold(config: MDEQConfig, tmp_path: Path) -> None:
    model = MDEQ(config)
    for dtype in (torch.float32, torch.bfloat16):
        model.save_pretrained(tmp_path / str(dtype), dtype=dtype)
        size = (tmp_path / str(dtype) / "model.safetensors").stat().st_size
        assert config.smallest_file <= size <= config.largest_file


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
VALID = pooled_config().to_dict()


@settings(max_examples=1500, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(VALID)), JSON | st.integers(-1, 40), max_size=4),
    st.sets(st.sampled_from(sorted(VALID)), max_size=2),
)
def test_no_config_does_more_than_raise_our_error(changes: dict[str, Any], dropped: set[str]) -> None:
    values = {key: value for key, value in {**VALID, **changes}.items() if key not in dropped}
    try:
        config = MDEQConfig.from_dict(values)
    except ConfigError:
        return
    assert config._estimate_parameters() <= MAX_PARAMETERS
    assert MDEQConfig.from_dict(config.to_dict()) == config


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=300) | JSON.map(lambda value: json.dumps(value)) | st.binary(max_size=300))
def test_no_text_in_a_json_file_does_more_than_raise_our_error(model: MDEQ, tmp_path: Path, text: str | bytes) -> None:
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        model.save_pretrained(folder)
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    for name in ("config.json", "labels.json", "preprocessor.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            MDEQ.from_pretrained(folder)
        (folder / name).write_bytes(kept)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["flip", "name", "length", "tensor", "text"]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 255),
    JSON,
)
def test_no_header_does_more_than_raise_our_error(
    model: MDEQ, tmp_path: Path, kind: str, place: int, byte: int, value: Any
) -> None:
    folder = tmp_path / "checkpoint"
    if not folder.exists():
        model.save_pretrained(folder)
    file = folder / "model.safetensors"
    kept = file.read_bytes()
    (length,) = struct.unpack("<Q", kept[:8])
    header = json.loads(kept[8 : 8 + length])
    names = sorted(name for name in header if name != "__metadata__")
    content = bytearray(kept)
    if kind == "flip":
        content[8 + place % length] ^= byte
    elif kind == "length":
        content[:8] = struct.pack("<Q", place)
    else:
        name = names[place % len(names)]
        if kind == "name":
            header[f"{name}{byte}"] = header.pop(name)
        elif kind == "tensor":
            header[name] = value
        else:
            header[name][("dtype", "shape", "data_offsets")[byte % 3]] = value
        text = json.dumps(header).encode()
        content = bytearray(struct.pack("<Q", len(text)) + text + kept[8 + length :])
    file.write_bytes(content)
    try:
        loaded = MDEQ.from_pretrained(folder)
    except CheckpointError as error:
        told = str(error)
    else:
        told = ""
        # What loads all the same, such as another space in the header, is the model that was saved.
        for key, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], weight)
    finally:
        file.write_bytes(kept)
    assert told == printable(told, longest=2000)


def test_words_of_others_are_made_printable_and_short() -> None:
    assert summarise(["a", "b"]) == "a, b"
    assert summarise(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert printable("a\x1b[31m\u202eb") == r"a\x1b[31m\u202eb"
    assert printable("x" * 200) == "x" * 50 + "..." + "x" * 25
