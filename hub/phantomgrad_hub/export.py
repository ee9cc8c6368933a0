"""A trained model as one file that runs without this package: torch.export's `.pt2`, or ONNX.

The graph is stem, a fixed number of damped steps of the block, and head. The steps are written out one after the other:
a loop in the graph would make a smaller file and a slower program. Weight norms are folded into plain weights.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from phantomgrad import FixedPointIteration, NotConvergedWarning, OneStep, attachments
from phantomgrad_hub.errors import ExportError
from phantomgrad_hub.extras import require
from phantomgrad_hub.json_text import json_text

if TYPE_CHECKING:
    from phantomgrad_hub.models.mdeq import MDEQ

FORMAT_VERSION = 1
ENDINGS = (".pt2", ".onnx")
DEFAULT_STEPS = 12
"""Steps of a model whose own solver accelerates the iteration; docs/export.md has what they cost in accuracy."""
TOLERANCE = 1e-4
"""The largest difference from the model's own logits, relative to the largest of them."""
CHECKED_BATCHES = (1, 3)
_OPSET = 20
_TINY = 1e-6
"""Below this the largest logit counts as this: those of an untrained head may all be zero."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how far its logits were from the model's own."""

    path: str
    description: str
    """The JSON file beside it: class names, preprocessing, solver."""
    steps: int
    """Evaluations of the block."""
    damping: float
    size: int
    """Of the file, in bytes."""
    difference: float | None
    """The largest difference of a logit on random images, relative to the largest logit; None if it could not be run here."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def export(model: MDEQ, path: str | os.PathLike[str], *, steps: int | None = None, force: bool = False) -> Exported:
    """Write `model` as `path`, a `.pt2` or `.onnx` file, and what a service needs to know as JSON of the same name.

    The exported graph maps preprocessed float32 images `(B, 3, H, W)` of the model's size, for any `B`, to logits
    `(B, num_classes)`, by `steps` evaluations of the block (None: `default_solver`). Both files appear once the new
    graph, loaded from disk, has given the logits of the model itself running the same steps. Raises `ExportError` for
    another ending, for a file that exists unless `force`, and where the logits differ.
    """
    target = Path(path)
    ending = file_format(target)
    solver = default_solver(model, steps)
    description = target.with_suffix(".json")
    text = json_text(describe(model, solver), indent=2, ensure_ascii=False) + "\n"
    _check_free(target, description, text, force)
    reference, graph = _copy(model), FixedStepsMDEQ(_copy(model), solver)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            written, beside = Path(scratch) / f"model{ending}", Path(scratch) / "model.json"
            with torch.no_grad(), warnings.catch_warnings():
                # torch's exporters warn about their own insides.
                warnings.simplefilter("ignore")
                load = _write_pt2 if ending == ".pt2" else _write_onnx
                run = load(graph, _example(model), written)
                difference = None if run is None else _difference(reference, run, solver)
            if difference is not None and not difference <= TOLERANCE:
                raise ExportError(
                    f"{target} was not written: its logits differ from the model's by {difference:.1e} of the largest, "
                    f"more than {TOLERANCE:.0e}"
                )
            beside.write_text(text, encoding="utf-8")
            size = written.stat().st_size
            for file, final in ((beside, description), (written, target)):
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
                os.replace(file, final)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror or error}") from error
    return Exported(
        path=str(target),
        description=str(description),
        steps=solver.max_steps,
        damping=solver.damping,
        size=size,
        difference=difference,
    )


def file_format(path: Path) -> str:
    """`.pt2` or `.onnx`; raises `ExportError` for another ending, `MissingExtraError` where writing it needs more packages."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ExportError(f"{path} must end in {' or '.join(ENDINGS)}, which says the format")
    if ending == ".onnx":
        require("onnx", "export")
        require("onnxscript", "export")
    return ending


def default_solver(model: MDEQ, steps: int | None = None) -> FixedPointIteration:
    """The damped iteration of exactly `steps` evaluations that stands for the solver of `model`.

    Its damping is that of the model's evaluation solver, else that of its training solver, else 1. `steps` None takes the
    most steps of an evaluation solver that iterates like this too; one that accelerates stands for at most `DEFAULT_STEPS`.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    [attachment] = attachments(model.block)
    own = attachment.eval_solver or attachment.solver
    plain = [each for each in (own, attachment.solver) if isinstance(each, FixedPointIteration)]
    if steps is None:
        steps = own.max_steps if own in plain else min(own.max_steps, DEFAULT_STEPS)
    damping = plain[0].damping if plain else 1.0
    return FixedPointIteration(damping=damping, max_steps=steps, check_every=steps, rtol=0.0, atol=0.0, keep="last")


def describe(model: MDEQ, solver: FixedPointIteration) -> dict[str, Any]:
    """What stands beside the graph: how a photo becomes its input, and what its outputs mean."""
    return {
        "format_version": FORMAT_VERSION,
        "input": {"name": "images", "dtype": "float32", "shape": ["batch", 3, *[model.preprocessing.size] * 2]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", len(model.classes)]},
        "solver": {"type": "FixedPointIteration", "damping": solver.damping, "steps": solver.max_steps},
        "preprocessing": model.preprocessing.to_dict(),
        "labels": [label.to_dict() for label in model.classes],
    }


class FixedStepsMDEQ(nn.Module):
    """`model` with plain weights and its solve written out; takes its modules over from `model`."""

    def __init__(self, model: MDEQ, solver: FixedPointIteration) -> None:
        super().__init__()
        for attachment in attachments(model):
            attachment.remove()
        for module in list(model.modules()):
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):  # pyright: ignore[reportArgumentType]
                    parametrize.remove_parametrizations(module, name)
        self.stem, self.block, self.head = model.stem, model.block, model.head
        self.steps, self.damping = solver.max_steps, solver.damping
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        injection = self.stem(images)
        z = self.block.initial_state(injection)
        for _ in range(self.steps - 1):
            image = self.block(z, injection)
            z = tuple(old + self.damping * (new - old) for old, new in zip(z, image, strict=True))
        return self.head(self.block(z, injection))


def _copy(model: MDEQ) -> MDEQ:
    """The same model in float32 on the CPU, in eval mode.

    Made anew, since deep copies of a parametrized module share its class, and with it what removing changes.
    """
    from phantomgrad_hub.models.mdeq import MDEQ

    with torch.random.fork_rng(devices=[]):
        copy = MDEQ(model.config, labels=model.classes, preprocessing=model.preprocessing)
    copy.load_state_dict(model.state_dict())
    return copy.eval().requires_grad_(False)


Run = Callable[[Tensor], Tensor]


def _example(model: MDEQ) -> Tensor:
    return torch.zeros(2, 3, *[model.preprocessing.size] * 2)


def _write_pt2(graph: nn.Module, example: Tensor, path: Path) -> Run:
    """Write `graph` by torch.export, without the lines and paths of its source; the result runs what was written."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(graph, (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_onnx(graph: nn.Module, example: Tensor, path: Path) -> Run | None:
    """Write `graph` as ONNX, likewise; the result runs what was written, None without onnxruntime."""
    program = torch.onnx.export(
        graph,
        (example,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()
    program.save(path, external_data=False)
    try:
        runtime: Any = require("onnxruntime", "export")
    except ImportError:
        return None
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _difference(reference: MDEQ, run: Run, solver: FixedPointIteration) -> float:
    """The largest difference of a logit on random images, relative to the largest of the model's own; NaN if any is NaN."""
    [attachment] = attachments(reference.block)
    generator, size = torch.Generator().manual_seed(0), reference.preprocessing.size
    worst = torch.zeros(())
    for batch in CHECKED_BATCHES:
        images = torch.randn(batch, 3, size, size, generator=generator)
        # A gradient that refines the solution would take steps of its own.
        with attachment.using(solver=solver, gradient=OneStep()), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            own = reference(images)
        worst = torch.maximum(worst, (run(images) - own).abs().max() / own.abs().max().clamp_min(_TINY))
    return float(worst)


def _check_free(target: Path, description: Path, text: str, force: bool) -> None:
    """Raise unless both files may be written; a description that would not change, that of the other format, may stay."""
    for file in (target, description):
        if file.is_dir():
            raise ExportError(f"{file} is a folder; give another name")
        if not file.exists() or force:
            continue
        if file == target or file.read_bytes() != text.encode():
            raise ExportError(f"{file} exists; give another name, or --force to replace it (in Python force=True)")
