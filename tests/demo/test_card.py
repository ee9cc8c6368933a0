"""The line on the model comes from the checkpoint's card, and is shorter where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from phantomgrad_demo.card import Facts, model_line, read_facts
from phantomgrad_hub import MDEQ

CARD = """---
library_name: phantomgrad
license: other
datasets:
- zh-plus/tiny-imagenet
model-index:
- name: mdeq
  results:
  - task: {{type: image-classification}}
    dataset: {{name: Tiny ImageNet, type: tiny-imagenet, split: validation}}
    metrics:
    - {{type: accuracy, name: top-5 accuracy, value: 61.5}}
    - {{type: {metric}, value: {value}}}
---
# MDEQ
"""


@pytest.mark.parametrize(("metric", "value"), [("accuracy", 36.1), ("accuracy", 0.361), ("top1", 36.1)])
def test_reads_the_cards_front_matter(metric: str, value: float, tmp_path: Path, model: MDEQ) -> None:
    (tmp_path / "README.md").write_text(CARD.format(metric=metric, value=value))
    facts = read_facts(tmp_path)
    assert facts.dataset == "Tiny ImageNet"
    assert facts.accuracy == pytest.approx(0.361)
    line = model_line(model, facts)
    assert "trained with phantom gradients on Tiny ImageNet; 8 classes; 36.1 % of its validation images right." in line


@pytest.mark.parametrize("text", [None, "", "no front matter", "---\n: [\n---\n", "---\nmodel-index: 3\n---\n"])
def test_a_missing_or_broken_card_tells_nothing(text: str | None, tmp_path: Path, model: MDEQ) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_facts(tmp_path) == Facts()
    assert model_line(model, Facts()).endswith("parameters; 8 classes.")


def test_datasets_alone_are_enough(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ndatasets: [tiny-imagenet]\n---\n")
    assert read_facts(tmp_path) == Facts(dataset="tiny-imagenet")


def test_reads_the_table_of_accuracies_by_steps(tmp_path: Path) -> None:
    table = "| solver stopped after | top-1 |\n| --- | --- |\n| 4 | 43.64 % |\n| 1 | 1.50 % |\n\n| other | 3 |\n"
    (tmp_path / "README.md").write_text(CARD.format(metric="accuracy", value=36.1) + table)
    assert list(read_facts(tmp_path).accuracy_by_steps.items()) == [
        (1, pytest.approx(0.015)),
        (4, pytest.approx(0.4364)),
    ]
    (tmp_path / "README.md").write_text(CARD.format(metric="accuracy", value=36.1))
    assert read_facts(tmp_path).accuracy_by_steps == {}


def test_the_embedded_card_has_it() -> None:
    import phantomgrad_hub

    assert phantomgrad_hub.__file__ is not None
    assert read_facts(Path(phantomgrad_hub.__file__).parent / "embedded").accuracy_by_steps[32] == pytest.approx(0.4449)
