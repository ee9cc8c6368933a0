"""Datasets that cannot be read: one line that says what, where, and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from images import write_folder, write_parquet

from phantomgrad_hub.cli.main import main
from phantomgrad_hub.data import DataError, open_source

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


def _refused(where: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        open_source(where)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith("..")
    return message


@pytest.mark.parametrize("name", ["", " ", "stream:", "cifar10:", "imagenet: "])
def test_no_name_is_not_the_current_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    assert _refused(name).startswith(f"dataset {name!r} names no folder; give ")
    assert len(open_source(".").train) == 3


@pytest.mark.parametrize("name", [None, True, ["red"], ""])
def test_a_class_table_names_a_class_by_text(tmp_path: Path, name: Any) -> None:
    write_parquet(tmp_path, "train", 2)
    rows = [{"label": label, "wnid": None, "name": each} for label, each in enumerate(("red", name, "blue"))]
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    assert _refused(tmp_path).startswith(
        f"{tmp_path / 'classes.json'}: the name of class 1 must be a text, not {name!r}"
    )
    rows[1]["name"] = "green"
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    assert [label.name for label in open_source(tmp_path).labels] == ["red", "green", "blue"]


@pytest.mark.parametrize("spoilt", ["train", "validation"])
@pytest.mark.parametrize("content", [b"PAR1 not really", b"", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, spoilt: str, content: bytes) -> None:
    for split in ("train", "validation"):
        write_parquet(tmp_path, split, 2)
    [file] = tmp_path.glob(f"{spoilt}-*")
    file.write_bytes(content)
    for where in (f"stream:{tmp_path}", str(tmp_path)):
        message = _refused(where)
        assert message.startswith(f"{tmp_path}: cannot read {file.name}: ")
        assert message.endswith(". Fetch or write it again.")


def test_a_parquet_file_that_is_damaged_further_in_is_one_line(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_parquet(tmp_path, split, 8)
    [file] = tmp_path.glob("train-*")
    data = bytearray(file.read_bytes())
    data[8:2000] = bytes(1992)
    file.write_bytes(data)
    source = open_source(f"stream:{tmp_path}")
    with pytest.raises(
        DataError, match=rf"^{tmp_path} train cannot be read: .*\. Check the file, or the connection to the Hub\.$"
    ):
        source.train.image(0)


@pytest.mark.parametrize("place", ["red/loop", "loop"])
def test_a_loop_of_links_is_named(tmp_path: Path, place: str) -> None:
    write_folder(tmp_path, 2)
    (tmp_path / place).symlink_to(tmp_path / place)
    assert _refused(tmp_path).startswith(f"{tmp_path / place} cannot be read: Too many levels of symbolic links; ")


def test_a_class_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, 2)
    scandir = os.scandir

    def refusing(folder: Path) -> Any:
        if Path(folder).name == "red":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("phantomgrad_hub.data.folders.os.scandir", refusing)
    message = f"{tmp_path / 'red'} cannot be read: Permission denied; make it readable, or remove it."
    assert _refused(tmp_path) == message
    assert main(["evaluate", "embedded", "--data", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"phantomgrad evaluate: {message}\n"
