"""Evaluation: the figures are those of the plain forward pass, classes are matched by what they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from images import NAMES, write_folder
from small import pooled_config

from phantomgrad import FixedPointIteration, attachments
from phantomgrad_hub import MDEQ, ClassLabel
from phantomgrad_hub.data import DataError, Source, Subset, open_source
from phantomgrad_hub.evaluate import Evaluation, default_steps, evaluate, evaluate_images, match_classes, ranks_of

LABELS = tuple(ClassLabel(name=name, id=f"n{index}") for index, name in enumerate(sorted(NAMES)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", 1)
    write_folder(folder / "val", 7)
    return open_source(folder)


@pytest.fixture
def model() -> MDEQ:
    config = pooled_config(
        channels=(8, 8), num_classes=3, image_size=16, eval_solver=FixedPointIteration(damping=0.7, max_steps=6)
    )
    return MDEQ(config, labels=LABELS)


@pytest.mark.filterwarnings("ignore::phantomgrad.NotConvergedWarning")
def test_figures_are_those_of_the_plain_forward_pass(model: MDEQ, source: Source) -> None:
    found = evaluate(model, source.validation, source.labels, batch_size=4)
    assert model.training
    model.eval()
    [attachment] = attachments(model)
    right, residuals = [], []
    with torch.no_grad():
        for index in range(len(source.validation)):
            logits = model(model.preprocess(source.validation.image(index)))
            right.append(int(logits.argmax()) == source.validation.targets[index])
            assert attachment.solution is not None
            residuals.append(float(attachment.solution.residual))
    assert found.count == 21
    assert found.top1 == pytest.approx(sum(right) / 21)
    assert found.top5 == 1.0
    assert found.steps_mean == 6
    assert found.unconverged == 21
    assert found.residual_median == pytest.approx(sorted(residuals)[10], rel=1e-4)
    assert found.residual_p90 == pytest.approx(sorted(residuals)[18], rel=1e-4)
    assert found.accuracy_by_steps == {}


@pytest.mark.filterwarnings("ignore::phantomgrad.NotConvergedWarning")
def test_accuracy_by_steps_is_that_of_a_solver_with_so_many_steps(model: MDEQ, source: Source) -> None:
    model.double().eval()
    model.preprocess = lambda image: model.preprocessing(image).double()  # type: ignore[method-assign]
    records = evaluate_images(model, source.validation, source.labels, steps=(1, 3, 9))
    [attachment] = attachments(model)
    targets = torch.tensor(source.validation.targets)
    images = torch.cat([model.preprocess(source.validation.image(index)) for index in range(len(targets))])
    for steps in (1, 3, 9):
        solver = FixedPointIteration(damping=0.7, max_steps=steps)
        with torch.no_grad(), attachment.using(solver=solver):
            expected = model(images).argmax(1) == targets
        assert torch.equal(records[f"right_after_{steps}"], expected)


@pytest.mark.parametrize("steps", [(1, 2), (6,), (50,)])
@pytest.mark.parametrize("check_every", [1, 4])
def test_the_headline_is_that_of_the_models_own_solver(
    model: MDEQ, source: Source, steps: tuple[int, ...], check_every: int
) -> None:
    solver = FixedPointIteration(damping=0.7, max_steps=6, check_every=check_every)
    other = MDEQ(replace(model.config, eval_solver=solver), labels=LABELS)
    expected = evaluate_images(other, source.validation, source.labels)
    records = evaluate_images(other, source.validation, source.labels, steps=steps)
    for name, values in expected.items():
        torch.testing.assert_close(records[name], values)
    assert set(records) - set(expected) == {f"right_after_{count}" for count in steps}


def test_batch_size_does_not_matter(model: MDEQ, source: Source) -> None:
    one = evaluate_images(model, source.validation, source.labels, batch_size=1, steps=(2,))
    many = evaluate_images(model, source.validation, source.labels, batch_size=16, steps=(2,))
    assert torch.equal(one["rank"], many["rank"])
    assert torch.equal(one["right_after_2"], many["right_after_2"])
    torch.testing.assert_close(one["residual"], many["residual"], rtol=1e-3, atol=1e-6)


def test_a_saved_checkpoint_gives_the_same_figures(model: MDEQ, source: Source, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "checkpoint")
    steps = default_steps(model)
    again = MDEQ.from_pretrained(tmp_path / "checkpoint")
    expected = evaluate(model, source.validation, source.labels, steps=steps)
    assert evaluate(again, source.validation, source.labels, steps=steps) == expected
    assert Evaluation.from_dict(expected.to_dict()) == expected


def test_classes_are_matched_by_identifier_then_name_never_by_position() -> None:
    data = [ClassLabel(name="RED"), ClassLabel(name="sky", id="n0"), ClassLabel(name="green")]
    assert match_classes(LABELS, data) == [2, 0, 1]
    with pytest.raises(DataError, match="2 of 3 classes of the data are unknown to the model: 'mauve', 'sky'"):
        match_classes(LABELS, [ClassLabel(name="mauve"), ClassLabel(name="red"), ClassLabel(name="sky", id="n9")])


def test_names_are_compared_loosely_and_a_name_may_be_an_identifier() -> None:
    known = [ClassLabel(name="king penguin", id="n02056570"), ClassLabel(name="goldfish", id="n01443537")]
    assert match_classes(known, [ClassLabel(name="n01443537"), ClassLabel(name="King_Penguin")]) == [1, 0]
    assert match_classes(known, [ClassLabel(name="king  penguin", id="n9")]) == [0]
    with pytest.raises(DataError, match="1 of 1 classes of the data are unknown to the model: 'kingpenguin'"):
        match_classes(known, [ClassLabel(name="kingpenguin")])


def test_a_model_whose_classes_are_in_another_order_has_the_same_accuracy(model: MDEQ, source: Source) -> None:
    order = [2, 0, 1]
    other = MDEQ(model.config, labels=[LABELS[index] for index in order])
    weights = model.state_dict()
    for key in ("head.classifier.weight", "head.classifier.bias"):
        weights[key] = weights[key][order]
    other.load_state_dict(weights)
    expected = evaluate(model, source.validation, source.labels)
    assert evaluate(other, source.validation, source.labels).top1 == expected.top1


def test_default_steps_end_where_the_solver_does(model: MDEQ) -> None:
    assert default_steps(model) == (1, 2, 3, 4, 6)
    config = replace(model.config, eval_solver=FixedPointIteration(max_steps=20))
    assert default_steps(MDEQ(config)) == (1, 2, 3, 4, 6, 8, 12, 16, 20)


def test_steps_below_one_are_refused(model: MDEQ, source: Source) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        evaluate(model, source.validation, source.labels, steps=(0, 2))


def test_a_few_unreadable_images_are_left_out_and_counted(model: MDEQ, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 1)
    write_folder(tmp_path / "val", 70)
    source = open_source(tmp_path)
    whole = evaluate_images(model, source.validation, source.labels, steps=(2,), batch_size=16)
    for index in (3, 209):
        Path(source.validation.name(index)).write_bytes(b"garbage")
    records = evaluate_images(model, source.validation, source.labels, steps=(2,), batch_size=16)
    assert (~records["readable"]).nonzero().flatten().tolist() == [3, 209]
    kept = records["readable"]
    for name, values in whole.items():
        torch.testing.assert_close(records[name][kept], values[kept], rtol=1e-3, atol=1e-6)
    found = evaluate(model, source.validation, source.labels, batch_size=16)
    assert (found.count, found.unreadable) == (208, 2)
    assert found.top1 == pytest.approx(float((whole["rank"][kept] < 1).double().mean()))
    assert Evaluation.from_dict(found.to_dict()) == found
    Path(source.validation.name(5)).write_bytes(b"garbage")
    message = r"^3 of 210 images to evaluate cannot be read, more than 1%; repair or replace them\. The first: \S+val/blue/003\.png: "
    with pytest.raises(DataError, match=message):
        evaluate(model, source.validation, source.labels, batch_size=16)


def test_an_evaluation_of_nothing_is_refused(model: MDEQ, source: Source) -> None:
    with pytest.raises(DataError, match="there are no images to evaluate"):
        evaluate(model, Subset(source.validation, []), source.labels)


def _with_head(model: MDEQ, weight: float, bias: float) -> MDEQ:
    """The model with the same two numbers everywhere in its classifier."""
    other = MDEQ(model.config, labels=LABELS)
    with torch.no_grad():
        other.head.classifier.weight.fill_(weight)
        other.head.classifier.bias.fill_(bias)
    return other


@pytest.mark.parametrize("bias", [0.0, float("nan"), float("inf"), float("-inf")])
def test_a_tie_and_a_logit_that_is_not_finite_are_wrong(model: MDEQ, source: Source, bias: float) -> None:
    found = evaluate(_with_head(model, 0.0, bias), source.validation, source.labels, steps=(1, 6))
    assert found.top1 == 0
    assert found.accuracy_by_steps == {1: 0, 6: 0}
    # Five guesses name every one of three classes, if they are guesses at all.
    assert found.top5 == (1 if bias == 0 else 0)


def test_an_infinite_logit_of_another_class_is_wrong_too() -> None:
    infinite, finite = float("inf"), [3.0, 1.0, 2.0]
    logits = torch.tensor([finite, [3.0, -infinite, 1.0], [3.0, 1.0, float("nan")], [3.0, 3.0, 1.0], finite])
    ranks = ranks_of(logits, torch.tensor([0, 0, 0, 0, 1]))
    assert (ranks < 1).tolist() == [True, False, False, False, False]
    assert ranks[[0, 3, 4]].tolist() == [0, 1, 2]
    assert (ranks[1:3] >= 5).all()


def test_classes_that_differ_only_by_case_or_underscore_are_not_merged() -> None:
    both = [ClassLabel(name="Cat"), ClassLabel(name="hot_dog"), ClassLabel(name="hot dog")]
    assert match_classes(both, [ClassLabel(name="CAT")]) == [0]
    message = "the model's classes 'hot_dog' and 'hot dog' differ only by case or _, so that 'Hot Dog' of the data may be either"
    with pytest.raises(DataError, match=message):
        match_classes(both, [ClassLabel(name="Cat"), ClassLabel(name="Hot Dog")])
    message = "'cat' and 'Cat' of the data are one class of the model, 'Cat'"
    with pytest.raises(DataError, match=message):
        match_classes(both[:1], [ClassLabel(name="cat"), ClassLabel(name="Cat")])
    named = [ClassLabel(name="Cat", id="n1"), ClassLabel(name="cat", id="n2")]
    assert match_classes(named, named[::-1]) == [1, 0]
