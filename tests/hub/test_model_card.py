"""Cards: what is known is told, nothing else is, edits are noticed, and the metadata is the Hub's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small import official_config, pooled_config

from phantomgrad_hub import MDEQ, CheckpointError, ConfigError
from phantomgrad_hub.checkpoint import read_description
from phantomgrad_hub.evaluation import Evaluation
from phantomgrad_hub.facts import Facts, Source
from phantomgrad_hub.files import EMBEDDED_FOLDER
from phantomgrad_hub.remote.card import is_free, is_rendered, render_card, with_source, without_source
from phantomgrad_hub.remote.push import plan

hub = pytest.importorskip("huggingface_hub")

FOUND = Evaluation(
    count=1000,
    top1=0.4321,
    top5=0.75,
    steps_mean=11.5,
    residual_median=2e-4,
    residual_p90=9e-4,
    unconverged=3,
    accuracy_by_steps={1: 0.1, 4: 0.4, 16: 0.4321},
)
FACTS = Facts(
    title="Ants and bees",
    data="Insects",
    data_id="ann/insects",
    split="validation",
    terms="CC BY 4.0.",
    license="cc-by-4.0",
    command="phantomgrad train finetune --data ann/insects --init embedded --out RUN",
    machine="2 CPU cores",
    hours=0.5,
    base="bob/base@" + "a" * 40,
    evaluation=FOUND,
)
SOURCE = Source(repository="ann/model", commit="0123456789abcdef0123456789abcdef01234567")


def card(tmp_path: Path, facts: Facts, labels: list[str] | None = None) -> str:
    model = MDEQ(pooled_config(), labels=labels)
    model.facts = facts
    model.save_pretrained(tmp_path / "model")
    return render_card(read_description(tmp_path / "model"), "ann/model", 12_345)


def test_what_is_known_is_told(tmp_path: Path) -> None:
    text = card(tmp_path, FACTS, ["ant", "bee", "cat", "dog", "eel"])
    for part in (
        "# Ants and bees\n",
        "12,345 parameters",
        "in 5 classes (ant, bee, cat, ...)",
        'MDEQ.from_pretrained("ann/model")',
        "| on 1000 images of Insects, validation | |",
        "| top-1 | 43.21 % |",
        "| 4 | 40.00 % |",
        "| 16 | 43.21 % |",
        "    phantomgrad train finetune --data ann/insects --init embedded --out RUN\n",
        "30 minutes on 2 CPU cores.",
        "It began with [bob/base](https://huggingface.co/bob/base/tree/" + "a" * 40 + ") at commit `aaaaaaaaaaaa`.",
        "CC BY 4.0.",
        "`UnrolledPhantom(steps=3, damping=0.7)`",
        "geng2021training",
    ):
        assert part in text, part
    read = hub.ModelCard(text).data
    assert (read.library_name, read.pipeline_tag, read.license) == ("phantomgrad", "image-classification", "cc-by-4.0")
    assert read.datasets == ["ann/insects"]
    assert read.base_model == "bob/base"
    assert [(found.metric_type, found.metric_value) for found in read.eval_results] == [
        ("accuracy", 0.4321),
        ("top-5-accuracy", 0.75),
    ]


def test_nothing_else_is_told(tmp_path: Path) -> None:
    text = card(tmp_path, Facts())
    assert "# model\n" in text
    assert "Not measured." in text
    assert "in 5 classes." in text
    for absent in ("None", "nan", "model-index", "license:", "datasets:", "base_model", "It began", "%", "hours"):
        assert absent not in text.split("## Citation")[0], absent
    assert "has not stated them here" in text


@pytest.mark.parametrize(
    "facts", [Facts(), FACTS, replace(FACTS, hours=None), replace(FACTS, machine=None, base="embedded")]
)
def test_every_card_is_known_again_and_an_edit_is_noticed(facts: Facts, tmp_path: Path) -> None:
    text = card(tmp_path, facts)
    assert "\n\n\n" not in text
    assert is_rendered(text)
    assert is_free(text.replace("\n", "\r\n").encode())
    assert is_free(with_source(text.encode(), SOURCE))
    for edited in (text.replace("MDEQ", "MDQE", 1), text + "More.\n", "", "# A card\n", text.split("-->\n")[1]):
        assert not is_rendered(edited)


def test_the_source_is_told_once_and_taken_away_again(tmp_path: Path) -> None:
    text = card(tmp_path, FACTS).encode()
    copied = with_source(text, SOURCE)
    link = f"[ann/model](https://huggingface.co/ann/model/tree/{SOURCE.commit})"
    assert copied.endswith(f"Fetched from {link} at commit `{SOURCE.commit}`.\n".encode())
    assert with_source(copied, replace(SOURCE, repository="bob/x")).count(b"Fetched from") == 1


@pytest.mark.parametrize(
    "content", [b"", b"# Mine", b"# Mine\n", b"# Mine\r\nTwo\r\n\r\n", "# Caf\xe9".encode("latin-1"), b"\n\n\n"]
)
def test_a_card_comes_back_byte_by_byte(content: bytes) -> None:
    assert without_source(with_source(content, SOURCE)) == content
    assert without_source(content) == content


@pytest.mark.parametrize(
    ("content", "free"),
    [
        (b"", True),
        (b"---\nlicense: mit\n---\n", True),
        (b"---\nlicense: mit\n---", True),
        (b"---\nlicense: mit\n---\n# Mine\n", False),
        (b"# Mine\n", False),
        ("# Caf\xe9".encode("latin-1"), False),
    ],
)
def test_a_card_without_text_belongs_to_nobody(content: bytes, free: bool) -> None:
    assert is_free(content) == free


def test_facts_and_source_stay_with_the_model(tmp_path: Path) -> None:
    model = MDEQ(official_config())
    model.facts, model.source = FACTS, SOURCE
    model.save_pretrained(tmp_path / "model")
    again = MDEQ.from_pretrained(tmp_path / "model")
    assert (again.facts, again.source) == (FACTS, SOURCE)
    other = MDEQ.from_pretrained(tmp_path / "model", labels=["x", "y"])
    # What was measured does not hold for another head; where the rest comes from does.
    assert (other.facts, other.source) == (Facts(base=str(SOURCE)), None)
    MDEQ(official_config()).save_pretrained(tmp_path / "model")
    again = MDEQ.from_pretrained(tmp_path / "model")
    assert (again.facts, again.source) == (Facts(), None)


def test_figures_that_are_not_finite_survive_json(tmp_path: Path) -> None:
    found = replace(FOUND, residual_p90=math.inf, top5=math.nan)
    again = Evaluation.from_dict(found.to_dict())
    assert math.isnan(again.residual_p90)
    assert "| top-5 | not known |" in card(tmp_path, Facts(evaluation=found))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "a JSON object, not list"),
        ({"colour": 1}, "unknown keys: colour"),
        ({"title": ""}, "title must be a text"),
        ({"title": "a\x1b[31m"}, "title must be a text"),
        ({"terms": "x" * 2001}, "terms must be a text"),
        ({"hours": -1}, "hours must be a number"),
        ({"hours": True}, "hours must be a number"),
        ({"held_out_seed": -1}, "held_out_seed must be an integer of at least 0"),
        ({"held_out_seed": True}, "held_out_seed must be an integer of at least 0"),
        ({"license": "MIT License"}, "license must be an identifier"),
        ({"license_link": "javascript:alert(1)"}, "license_link must be an address"),
        ({"title": "a\n# b"}, "title must be a text"),
        ({"base": "ann/model@main"}, "base must be embedded"),
        ({"data_id": "../../etc"}, "data_id must be a dataset repository"),
        ({"evaluation": {"count": 1}}, "missing keys in the evaluation: top1"),
        ({"evaluation": {**FOUND.to_dict(), "top1": 43.2}}, "top1 of the evaluation must be between 0 and 1"),
        ({"evaluation": {**FOUND.to_dict(), "accuracy_by_steps": {"x": 1}}}, "must map numbers of steps"),
    ],
)
def test_facts_that_cannot_be_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Facts.from_dict(values)


def test_a_damaged_file_of_facts_is_named(tmp_path: Path) -> None:
    MDEQ(pooled_config()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "card.json").write_text('{"hours": "two"}')
    with pytest.raises(CheckpointError, match=r"card\.json: hours must be a number"):
        MDEQ.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "card.json").write_text('{"hours": 1, "hours": 2}')
    with pytest.raises(CheckpointError, match="the key 'hours' is there twice"):
        MDEQ.from_pretrained(tmp_path / "model")


def test_a_plan_renders_for_its_repository_and_leaves_a_written_card_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    MDEQ(pooled_config()).save_pretrained(folder)
    planned = plan(folder, "ann/model")
    assert planned.rendered
    assert 'from_pretrained("ann/model")' in planned.card
    (folder / "README.md").write_text(planned.card, encoding="utf-8")
    assert 'from_pretrained("bob/other")' in plan(folder, "bob/other").card
    for content in ("", "---\nlicense: mit\n---\n"):
        (folder / "README.md").write_text(content, encoding="utf-8")
        assert plan(folder, "bob/other").rendered
    (folder / "README.md").write_bytes("# Caf\xe9".encode("latin-1"))
    with pytest.raises(CheckpointError, match="save it as UTF-8"):
        plan(folder, "bob/other")
    (folder / "README.md").write_bytes(b"#" * 2**21)
    with pytest.raises(CheckpointError, match="more than the 1,048,576 of a card"):
        plan(folder, "bob/other")
    (folder / "README.md").unlink()
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is no file of this folder"):
        plan(folder, "bob/other")
    (folder / "README.md").unlink()
    (folder / "README.md").write_text("# My own\r\n", encoding="utf-8", newline="")
    written = plan(folder, "bob/other")
    assert (written.rendered, written.card) == (False, "# My own\r\n")
    assert set(written.sizes) == {"config.json", "labels.json", "preprocessor.json", "model.safetensors", "README.md"}
    assert written.sizes["model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_the_embedded_card_is_rendered_from_its_facts() -> None:
    description = read_description(EMBEDDED_FOLDER)
    parameters = sum(parameter.numel() for parameter in MDEQ.from_pretrained("embedded").parameters())
    text = (EMBEDDED_FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == render_card(description, "embedded", parameters)
    assert description.facts.evaluation is not None
