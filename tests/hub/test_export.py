"""Exported files give the model's logits after as many steps, and carry what a service needs."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from images import NAMES
from small import official_config, pooled_config
from torch import Tensor, nn

import phantomgrad_hub.export as export_module
from phantomgrad import Anderson, FixedPointIteration, NeumannPhantom, UnrolledPhantom, attachments
from phantomgrad_hub import MDEQ, ExportError, MDEQConfig, MissingExtraError, Preprocessing
from phantomgrad_hub.cli.main import main
from phantomgrad_hub.export import DEFAULT_STEPS, Exported, default_solver, export
from phantomgrad_hub.labels import parse_labels

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="needs phantomgrad[export]",
)
STEPS, DAMPING, SIZE = 4, 0.6, 16


def small_config(**changes: Any) -> MDEQConfig:
    """Two branches with weight norm; the solver's own tolerance would stop it at another step."""
    options = {"channels": (8, 8), "expansion": 1, "blocks": 1, "num_classes": 3, "image_size": SIZE}
    solver = FixedPointIteration(damping=DAMPING, max_steps=STEPS)
    return pooled_config(**{**options, "solver": solver, "weight_norm_branches": True, **changes})


def small_model(config: MDEQConfig | None = None) -> MDEQ:
    """A model whose weights and statistics are not those of a fresh one."""
    torch.manual_seed(0)
    preprocessing = Preprocessing(size=SIZE, resize=SIZE + 4, interpolation="bicubic", mean=(0.4, 0.5, 0.6))
    labels = [{"id": f"n{index:08}", "name": name} for index, name in enumerate(NAMES)]
    model = MDEQ(config or small_config(), labels=labels, preprocessing=preprocessing).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.uniform_(-0.2, 0.2)
    return model


@torch.no_grad()
def by_hand(model: MDEQ, images: Tensor, steps: int, damping: float = DAMPING) -> Tensor:
    """The logits after `steps` evaluations of the bare block, damped steps between them."""
    [attachment] = attachments(model.block)
    injection = model.inject(images)
    z = model.initial_state(injection)
    for _ in range(steps - 1):
        image = attachment.step(z, injection)
        z = tuple((1 - damping) * old + damping * new for old, new in zip(z, image, strict=True))
    return model.head(attachment.step(z, injection))


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """What a user of the file would call."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def pt2(folder: Path) -> Exported:
    return export(small_model(), folder / "model.pt2")


@pytest.fixture(scope="module")
def onnx(folder: Path, pt2: Exported) -> Exported:
    """Beside the other, with which it shares the description."""
    return export(small_model(), folder / "model.onnx")


@pytest.fixture(params=["pt2", pytest.param("onnx", marks=needs_onnx)])
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


def test_logits_are_the_models_for_any_batch(exported: Exported) -> None:
    model, run = small_model(), runner(Path(exported.path))
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, SIZE, SIZE)
        expected = by_hand(model, images, STEPS)
        torch.testing.assert_close(run(images), expected, rtol=0, atol=1e-5)
        other = by_hand(model, images, STEPS + 1)
        assert (other - expected).abs().max() > 1e-3, "another number of steps must be another answer"


def test_file_tells_nothing_of_the_machine_that_wrote_it(exported: Exported) -> None:
    paths = (str(Path(export_module.__file__).parent), str(Path(torch.__file__).parent))
    if exported.path.endswith(".pt2"):
        with zipfile.ZipFile(exported.path) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    else:
        content = Path(exported.path).read_bytes()
    assert not any(path.encode() in content for path in paths)


def test_report_says_what_was_written(exported: Exported) -> None:
    assert (exported.steps, exported.damping) == (STEPS, DAMPING)
    assert exported.size == os.path.getsize(exported.path)
    assert exported.difference is not None
    assert exported.difference < 1e-5
    assert exported.to_dict()["path"] == exported.path


def test_description_holds_labels_preprocessing_and_solver(exported: Exported) -> None:
    model = small_model()
    about = json.loads(Path(exported.description).read_text(encoding="utf-8"))
    assert parse_labels(about["labels"]) == model.classes
    assert Preprocessing.from_dict(about["preprocessing"]) == model.preprocessing
    assert about["input"] == {"name": "images", "dtype": "float32", "shape": ["batch", 3, SIZE, SIZE]}
    assert about["output"] == {"name": "logits", "dtype": "float32", "shape": ["batch", 3]}
    assert about["solver"] == {"type": "FixedPointIteration", "damping": DAMPING, "steps": STEPS}


@needs_onnx
def test_onnx_graph_computes_no_weight_and_names_its_free_dimension(onnx: Exported) -> None:
    import onnx as package

    graph = package.load(onnx.path).graph
    inside = small_model()
    convolutions = {
        part: sum(isinstance(each, nn.Conv2d) for each in getattr(inside, part).modules()) for part in ("stem", "block")
    }
    operators = Counter(node.op_type for node in graph.node)
    assert operators["Conv"] == convolutions["stem"] + STEPS * convolutions["block"]
    assert not {"ReduceL2", "ReduceSumSquare", "LpNormalization", "Loop", "CastLike"} & set(operators)
    weights = {entry.name for entry in graph.initializer}
    assert all(node.input[1] in weights for node in graph.node if node.op_type == "Conv")
    [images], [logits] = graph.input, graph.output
    assert [each.dim_param or each.dim_value for each in images.type.tensor_type.shape.dim] == ["batch", 3, SIZE, SIZE]
    assert [each.dim_param or each.dim_value for each in logits.type.tensor_type.shape.dim] == ["batch", 3]


def test_pt2_has_plain_weights(pt2: Exported) -> None:
    names = torch.export.load(pt2.path).state_dict
    assert any(name.endswith("conv1.weight") for name in names)
    assert not any("parametrizations" in name for name in names)


def test_model_and_random_numbers_are_left_alone(tmp_path: Path) -> None:
    model = small_model().double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    export(model, tmp_path / "model.pt2", steps=1)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert model.training
    assert len(list(attachments(model))) == 1
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    images = torch.randn(2, 3, SIZE, SIZE)
    # In float32 and eval mode, whatever the model was in.
    expected = by_hand(model.eval().float(), images, 1)
    torch.testing.assert_close(runner(tmp_path / "model.pt2")(images), expected, rtol=0, atol=1e-5)


def test_official_head_and_refining_gradient(tmp_path: Path) -> None:
    gradient = UnrolledPhantom(steps=2, refine_in_eval=True)
    model = small_model(official_config(channels=(8, 8), head_channels=(2, 4), num_classes=3, gradient=gradient))
    export(model, tmp_path / "model.pt2", steps=2)
    images = torch.randn(3, 3, SIZE, SIZE)
    torch.testing.assert_close(
        runner(tmp_path / "model.pt2")(images), by_hand(model, images, 2, damping=0.7), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("solver", "eval_solver", "steps", "damping"),
    [
        (FixedPointIteration(damping=0.5, max_steps=18), None, 18, 0.5),
        (FixedPointIteration(damping=0.5, max_steps=9), FixedPointIteration(damping=0.8, max_steps=20), 20, 0.8),
        (FixedPointIteration(damping=0.7, max_steps=8), Anderson(max_steps=32), DEFAULT_STEPS, 0.7),
        (FixedPointIteration(damping=0.7, max_steps=8), Anderson(max_steps=5), 5, 0.7),
        (Anderson(max_steps=30), None, DEFAULT_STEPS, 1.0),
    ],
)
def test_solver_that_stands_for_the_models(solver: Any, eval_solver: Any, steps: int, damping: float) -> None:
    model = MDEQ(small_config(solver=solver, eval_solver=eval_solver, gradient=NeumannPhantom()))
    found = default_solver(model)
    assert (found.max_steps, found.damping, found.keep) == (steps, damping, "last")
    assert default_solver(model, 3).max_steps == 3
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
            default_solver(model, wrong)  # pyright: ignore[reportArgumentType]


def test_existing_files_are_refused_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file, about = small_model(), tmp_path / "model.pt2", tmp_path / "model.json"
    about.write_text("{}")
    with pytest.raises(ExportError, match=r"model\.json exists; give another name, or --force"):
        export(model, file)
    assert os.listdir(tmp_path) == ["model.json"]
    about.unlink()
    file.write_text("mine")
    with pytest.raises(ExportError, match=r"model\.pt2 exists"):
        export(model, file)
    assert os.listdir(tmp_path) == ["model.pt2"]
    assert export(model, file, steps=1, force=True).size == file.stat().st_size > 1000
    # The same description, of the other format, is no obstacle; that of other steps is.
    file.rename(tmp_path / "other.pt2")
    with pytest.raises(ExportError, match=r"model\.json exists"):
        export(model, file, steps=2)
    monkeypatch.setattr(export_module, "_write_pt2", lambda graph, example, path: path.write_text("graph") and graph)
    export(model, file, steps=1)


def test_wrong_answers_fail_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (lambda logits: logits * 1.001, lambda logits: logits * float("nan")):
        monkeypatch.setattr(
            export_module,
            "_write_pt2",
            lambda graph, example, path, wrong=wrong: (
                path.write_text("graph") and (lambda images: wrong(graph(images)))
            ),
        )
        with pytest.raises(ExportError, match=r"model\.pt2 was not written: its logits differ from the model's by"):
            export(small_model(), tmp_path / "model.pt2")
        assert os.listdir(tmp_path) == []


def test_names_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(ExportError, match=r"model\.pth must end in \.pt2 or \.onnx"):
        export(model, tmp_path / "model.pth")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ExportError, match=r"folder\.pt2 is a folder"):
        export(model, tmp_path / "folder.pt2", force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        export(model, tmp_path / "file" / "model.pt2")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'phantomgrad\[export\]'"):
        export(small_model(), tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == []


@needs_onnx
def test_without_onnxruntime_the_command_says_that_nothing_was_checked(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", checkpoint, "--out", str(tmp_path / "model.onnx"), "--steps", "1"]) == 0
    assert "not checked: onnxruntime is not installed; pip install 'phantomgrad[export]'" in capsys.readouterr().out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    small_model().save_pretrained(folder)
    return str(folder)


def test_command_prints_what_it_wrote_and_checked(
    checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "new" / "model.PT2")
    assert main(["export", checkpoint, "--out", out, "--steps", "2"]) == 0
    printed = capfd.readouterr()
    first, second = printed.out.splitlines()
    assert first.startswith(f"{out}: ")
    assert "2 steps of the block damped by 0.6" in first
    assert second.startswith("checked in torch.export.load on batches of 1 and 3 random images")
    assert printed.err == ""
    assert main(["export", checkpoint, "--out", out]) == 1
    assert capfd.readouterr().err.startswith(f"phantomgrad export: {out} exists; give another name")


@needs_onnx
def test_command_prints_json(checkpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.onnx"
    assert main(["export", checkpoint, "--out", str(out), "--steps", "1", "--json"]) == 0
    printed = capfd.readouterr()
    found = json.loads(printed.out)
    assert found["path"] == str(out)
    assert found["steps"] == 1
    assert found["difference"] < 1e-5
    assert found["size"] == out.stat().st_size
    assert printed.err == ""


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--out", "model.bin"], "--out model.bin must end in .pt2 or .onnx"),
        (["--out", "model"], "--out model must end in .pt2 or .onnx"),
        (["--out", "model.onnx", "--steps", "0"], "'0' is not an integer of at least 1"),
        ([], "--out"),
    ],
)
def test_bad_usage_of_export(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "embedded", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert part in line


@needs_onnx
@pytest.mark.filterwarnings("ignore::phantomgrad.NotConvergedWarning")
def test_photos_get_the_class_that_the_model_itself_gives(shared: Path, tmp_path: Path) -> None:
    photos = sorted((shared / "data" / "imagenet-samples").glob("*.JPEG"))
    assert len(photos) == 40
    model = MDEQ.from_pretrained("embedded")
    [attachment] = attachments(model.block)
    own = [best[0][0] for best in model.classify(list(photos), top=1)]
    with attachment.using(solver=default_solver(model)):
        stepped = model.classify(list(photos))
    made = export(model, tmp_path / "model.onnx")
    service = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "service.py"))["Classifier"](made.path)
    found = [service(photo.read_bytes()) for photo in photos]
    for one, other in zip(found, stepped, strict=True):
        assert dict(one) == pytest.approx(dict(other), abs=1e-3)
    assert sum(one[0][0] == name for one, name in zip(found, own, strict=True)) >= 39
