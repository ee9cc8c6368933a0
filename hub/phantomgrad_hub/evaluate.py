"""How good a model is on labelled images, and how far its block settles on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phantomgrad import NotConvergedWarning, Solution, attachments

from .data.errors import DataError
from .data.transforms import MOST_UNREADABLE, most_unreadable
from .evaluation import Evaluation
from .labels import ClassLabel, plain_name

if TYPE_CHECKING:
    from .data.sources import ImageSplit
    from .models.mdeq import MDEQ

BATCH_SIZE = 100
Progress = Callable[[int, int], None]
"""Called with the number of images done and of all images."""


def evaluate(
    model: MDEQ,
    images: ImageSplit,
    labels: Sequence[ClassLabel],
    *,
    steps: Sequence[int] = (),
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Evaluation:
    """Classify every image of `images`, whose class indices mean `labels`, with the model's own preprocessing.

    Runs in float32 with the model's evaluation solver. `steps` asks for the accuracy after each of these numbers of
    solver steps too, and changes nothing else. Classes are matched by identifier or name. Raises `DataError` for one
    that the model lacks, and where more than 1 % of the images cannot be read.
    """
    return summarise(evaluate_images(model, images, labels, steps=steps, batch_size=batch_size, progress=progress))


def summarise(records: dict[str, Tensor]) -> Evaluation:
    """The figures of the records that `evaluate_images` made, over the images that could be read.

    Raises `DataError` where none could.
    """
    readable = records["readable"]
    if not readable.any():
        raise DataError("none of the images to evaluate can be read")
    kept = {name: values[readable] for name, values in records.items()}
    residual = kept["residual"].double()
    by_steps = {int(name.split("_")[-1]): values for name, values in kept.items() if name.startswith("right_after_")}
    return Evaluation(
        count=len(residual),
        top1=_mean(kept["rank"] < 1),
        top5=_mean(kept["rank"] < 5),
        steps_mean=_mean(kept["steps"]),
        residual_median=float(residual.quantile(0.5)),
        residual_p90=float(residual.quantile(0.9)),
        unconverged=int((~kept["converged"]).sum()),
        unreadable=int((~readable).sum()),
        accuracy_by_steps={count: _mean(values) for count, values in sorted(by_steps.items())},
    )


def evaluate_images(
    model: MDEQ,
    images: ImageSplit,
    labels: Sequence[ClassLabel],
    *,
    steps: Sequence[int] = (),
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
    whole: int | None = None,
) -> dict[str, Tensor]:
    """Per image: `rank` of the true class (0 is best), solver `steps`, final `residual`, `converged`, `readable`, and
    `right_after_N` for each number N in `steps`. All on the CPU, in the order of the images. Where `readable` is False the
    other figures are those of a blank image; raises `DataError` where they are more than 1 % of `images`, or of `whole`
    images."""
    if any(count < 1 for count in steps):
        raise ValueError(f"steps must be at least 1, not {min(steps)}")
    if not len(images):
        raise DataError("there are no images to evaluate")
    classes = torch.tensor(match_classes(model.classes, labels))
    targets = classes[torch.tensor(images.targets)]
    device = next(model.parameters()).device
    batches: list[dict[str, Tensor]] = []
    done = 0
    with _evaluating(model):
        for batch, readable in _preprocessed(model, images, batch_size, len(images) if whole is None else whole):
            target = targets[done : done + len(batch)].to(device)
            batches.append({**_classified(model, batch.to(device), target, steps), "readable": readable})
            done += len(batch)
            if progress is not None:
                progress(done, len(images))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def ranks_of(logits: Tensor, targets: Tensor) -> Tensor:
    """How many other classes have no smaller logit than the true one, of logits `(B, classes)` and `targets` `(B,)`.

    So a tie counts against the model, and among logits that are not all finite the true class is behind any number.
    """
    own = logits.gather(1, targets[:, None])
    ranks = (logits >= own).sum(1) - 1
    return ranks.masked_fill(~logits.isfinite().all(1), torch.iinfo(ranks.dtype).max)


def default_steps(model: MDEQ) -> tuple[int, ...]:
    """Solver steps worth a look: 1, 2, 3, 4, 6, 8, 12, ... up to what the model's evaluation solver may take."""
    [attachment] = attachments(model.block)
    most = (attachment.eval_solver or attachment.solver).max_steps
    doubling = {base * 2**power for base in (2, 3) for power in range(16)}
    return tuple(count for count in sorted(doubling | {1, most}) if count <= most)


def match_classes(known: Sequence[ClassLabel], wanted: Sequence[ClassLabel]) -> list[int]:
    """For every label in `wanted` the index of the same class in `known`: by identifier, else by name.

    Names are compared without regard to case, and with `_` for a space; a name that is an identifier counts as one.
    Raises `DataError` where a class is not known, where it may be either of two, and where two are the same.
    """
    by_id = {label.id: index for index, label in enumerate(known) if label.id is not None}
    by_name: dict[str, list[int]] = {}
    for index, label in enumerate(known):
        by_name.setdefault(plain_name(label.name), []).append(index)
    found: dict[int, ClassLabel] = {}
    unknown: list[str] = []
    for label in wanted:
        index = by_id.get(label.id or "", by_id.get(label.name))
        named = [index] if index is not None else by_name.get(plain_name(label.name), [])
        if len(named) > 1:
            one, other = (known[place].name for place in named[:2])
            raise DataError(
                f"the model's classes {one!r} and {other!r} differ only by case or _, so that {label.name!r} of the data may "
                "be either. Give both WordNet ids, or rename one in the checkpoint's labels.json."
            )
        if not named:
            unknown.append(label.name)
        elif named[0] in found:
            raise DataError(
                f"{found[named[0]].name!r} and {label.name!r} of the data are one class of the model, "
                f"{known[named[0]].name!r}. Rename one, or make them one class."
            )
        else:
            found[named[0]] = label
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise DataError(
            f"{len(unknown)} of {len(wanted)} classes of the data are unknown to the model: {shown}. "
            "Classes are matched by name or WordNet id."
        )
    return list(found)


def best_states(solution: Solution, steps: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """The state that a solver stopped after each number of `steps` would have returned, from a solve traced by state.

    Per sample that is the image of the iterate with the smallest residual so far.
    """
    trace = solution.trace
    assert trace is not None
    assert trace.states is not None
    best: tuple[Tensor, ...] | None = None
    smallest: Tensor | None = None
    wanted = sorted(set(steps))
    for position, made in enumerate(trace.steps):
        while wanted and best is not None and wanted[0] < made:
            yield wanted.pop(0), best
        state, residual = trace.states[position], trace.residual[position]
        if best is None or smallest is None:
            best, smallest = tuple(state), residual
            continue
        better = residual < smallest
        smallest = torch.where(better, residual, smallest)
        best = tuple(
            torch.where(better.to(new.device).view(-1, *[1] * (new.dim() - 1)), new, old)
            for new, old in zip(state, best, strict=True)
        )
    for count in wanted:
        yield count, best


@contextmanager
def _evaluating(model: MDEQ) -> Generator[None, None, None]:
    """Evaluation mode without gradients."""
    was_training = model.training
    model.eval()
    try:
        # That a solve may end early is what is measured here.
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            yield
    finally:
        model.train(was_training)


def _classified(model: MDEQ, images: Tensor, targets: Tensor, steps: Sequence[int]) -> dict[str, Tensor]:
    [attachment] = attachments(model.block)
    own_solver = attachment.eval_solver or attachment.solver
    traced = own_solver
    if steps:
        most = max(own_solver.max_steps, *steps)
        traced = replace(own_solver, trace="state", check_every=1, max_steps=most)
    # One solve serves both where tracing it does not change it.
    shared = replace(traced, trace=own_solver.trace) == own_solver
    injection = model.inject(images)
    with attachment.using(solver=traced if shared else own_solver):
        logits = model.head(model.equilibrium(injection))
    solution = attachment.solution
    assert solution is not None
    record = {
        "rank": ranks_of(logits, targets),
        "steps": solution.steps,
        "residual": solution.residual,
        "converged": solution.converged,
    }
    if not shared:
        with attachment.using(solver=traced):
            model.equilibrium(injection)
        solution = attachment.solution
        assert solution is not None
    for count, state in best_states(solution, steps) if steps else ():
        record[f"right_after_{count}"] = ranks_of(model.head(state), targets) < 1
    return {name: values.cpu() for name, values in record.items()}


def _preprocessed(model: MDEQ, images: ImageSplit, batch_size: int, whole: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches `(B, 3, H, W)` in order, and which of their images `(B,)` could be read; the others are blank.

    The next batch is decoded while the model works on the last.
    """
    size, unreadable = model.preprocessing.size, dict[int, DataError]()

    def prepare(index: int) -> Tensor:
        try:
            return model.preprocess(images.image(index))
        except DataError as error:
            unreadable[index] = error
            return torch.zeros(1, 3, size, size)

    starts = range(0, len(images), batch_size)
    with ThreadPoolExecutor(max_workers=2) as pool:
        pending = [pool.submit(prepare, index) for index in range(min(batch_size, len(images)))]
        for start in starts:
            batch = torch.cat([future.result() for future in pending])
            check_unreadable(unreadable, images, whole)
            readable = torch.tensor([index not in unreadable for index in range(start, start + len(batch))])
            following = range(start + batch_size, min(start + 2 * batch_size, len(images)))
            pending = [pool.submit(prepare, index) for index in following]
            yield batch, readable


def check_unreadable(unreadable: Mapping[int, DataError | str], images: ImageSplit, whole: int) -> None:
    """Raise `DataError` where the unreadable ones of `images`, by index, are more than `MOST_UNREADABLE` of `whole`."""
    found = sorted(unreadable)
    if len(found) > MOST_UNREADABLE * whole:
        raise DataError(
            f"{len(found)} of {len(images)} images to evaluate cannot be read, more than "
            f"{most_unreadable(len(images), whole)}; repair or replace them. The first: {unreadable[found[0]]}"
        )


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
