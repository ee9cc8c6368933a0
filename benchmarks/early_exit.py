"""What per-photo convergence saves at test time: `python -m benchmarks.early_exit --data FOLDER`.

A fixed number of solver steps must do for the hardest photo; with a tolerance each photo stops where it has settled. Some
validation photos, drawn by a seed, serve for choosing only. One solve of them is followed step by step: the accuracy after
every number of steps, and under every tolerance. From these come the smallest fixed number within 0.1 point of the best, and
the cheapest pair of tolerance and limit that costs at most what may be lost. The other photos are then classified by the
solver as it is, once with that fixed number and once with that tolerance.

A second rule looks at the answer instead: a few steps for all photos, and for those whose two likeliest classes are close a
second solve from where the first has ended. Threshold and lengths are chosen on the same photos, at half that cost.

Prints tables and writes them as JSON. What the file already has for the same settings is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phantomgrad import Anderson, Attachment, FixedPointIteration, NotConvergedWarning, Solver, attachments
from phantomgrad_hub import MDEQ
from phantomgrad_hub.data import Subset, open_source
from phantomgrad_hub.evaluate import best_states, evaluate_images, match_classes
from phantomgrad_hub.labels import ClassLabel

RESULTS = Path(__file__).parent / "results"
MOST_STEPS = 32
FINEST = 1e-3
"""The checkpoint's own tolerance, at which the solves that serve for choosing stop."""
TOLERANCES = [round(10 ** (-exponent / 16), 4) for exponent in range(4, 49)]
NEAR_BEST, MAY_LOSE = 0.001, 0.002
"""Accuracies, as fractions: what counts as the best, and what an exit may cost."""
FURTHER = 3
"""The most steps of a second solve."""
SOLVERS: dict[str, Solver] = {
    "Anderson": Anderson(),
    "damped iteration": FixedPointIteration(damping=0.7),
}


@dataclass(frozen=True)
class Trajectories:
    """What the photos of a set do, step by step: shape (photos, steps)."""

    right: Tensor
    """Whether the answer is right if the solver stops there."""
    residual: Tensor
    """The smallest relative residual so far."""

    def fixed(self) -> Tensor:
        """The accuracy of every fixed number of steps, shape (steps,)."""
        return self.right.double().mean(0)

    def exit(self, tolerance: float, most: int) -> tuple[float, float]:
        """Mean evaluations and accuracy where each photo stops at `tolerance` or after `most` steps."""
        settled = self.residual[:, : most - 1] <= tolerance
        steps = torch.where(settled.any(1), settled.int().argmax(1), torch.tensor(most - 1))
        return steps.double().mean().item() + 1, self.right.gather(1, steps[:, None]).double().mean().item()


def follow(model: MDEQ, solver: Solver, photos: Subset, classes: list[int], batch: int) -> Trajectories:
    """Every photo's answers and residuals over the steps of one solve."""
    [attachment] = attachments(model.block)
    traced = replace(solver, max_steps=MOST_STEPS, rtol=FINEST, atol=0.0, trace="state", keep="best")
    right, residuals = [], []
    for indices, targets, images in batches(model, photos, classes, batch):
        with torch.inference_mode(), attachment.using(solver=traced):
            model.equilibrium(model.inject(images))
        solution = attachment.solution
        assert solution is not None
        assert solution.trace is not None
        residual = solution.trace.residual.cummin(0).values
        steps: list[Tensor] = []
        for step, state in best_states(solution, range(1, len(residual) + 1)):
            # Only a new best state has a new answer.
            new = torch.ones_like(targets, dtype=torch.bool)
            if step > 1:
                new = residual[step - 1] < residual[step - 2]
            answer = steps[-1].clone() if steps else torch.zeros_like(new)
            with torch.inference_mode():
                if new.any():
                    answer[new] = model.head(tuple(leaf[new] for leaf in state)).argmax(1) == targets[new]
            steps.append(answer)
        missing = MOST_STEPS - len(steps)
        right.append(torch.stack(steps + steps[-1:] * missing, 1))
        residuals.append(torch.cat([residual, residual[-1:].expand(missing, -1)]).T)
        print(f"\r{indices[-1] + 1} of {len(photos)} photos followed", end="", flush=True)
    print("\r" + " " * 40, end="\r")
    return Trajectories(torch.cat(right), torch.cat(residuals))


def choose(followed: Trajectories) -> dict[str, Any]:
    """The smallest fixed number near the best, and the cheapest exit that costs at most what it may."""
    accuracies = followed.fixed()
    best = accuracies.max().item()
    fixed = int((accuracies >= best - NEAR_BEST - 1e-9).int().argmax()) + 1
    needed = accuracies[fixed - 1].item() - MAY_LOSE - 1e-9
    exits = [
        (*followed.exit(tolerance, most), tolerance, most)
        for tolerance in TOLERANCES
        for most in range(fixed, MOST_STEPS + 1)
    ]
    evaluations, accuracy, tolerance, most = min(each for each in exits if each[1] >= needed)
    return {
        "best": best,
        "fixed": {"steps": fixed, "accuracy": accuracies[fixed - 1].item()},
        "exit": {"rtol": tolerance, "max_steps": most, "evaluations": evaluations, "accuracy": accuracy},
        "accuracy_by_steps": {str(step): value for step, value in enumerate(accuracies.tolist(), start=1)},
        "by_tolerance": [
            dict(zip(("rtol", "evaluations", "accuracy"), (rtol, *followed.exit(rtol, MOST_STEPS)), strict=True))
            for rtol in TOLERANCES
        ],
    }


def classify(
    model: MDEQ, solver: Solver, photos: Subset, labels: Sequence[ClassLabel], batch: int
) -> dict[str, Tensor]:
    """Per photo: evaluations made, and whether the answer is right."""
    [attachment] = attachments(model.block)
    attachment.solver, attachment.eval_solver = solver, None
    records = evaluate_images(
        model,
        photos,
        labels,
        batch_size=batch,
        progress=lambda done, count: print(f"\r{done} of {count} photos classified", end="", flush=True),
    )
    print("\r" + " " * 40, end="\r")
    return {"steps": records["steps"], "right": records["rank"] < 1}


@dataclass(frozen=True)
class Stages:
    """Photos whose solve is looked at once and, where the answer is unsure, goes on: a boolean or number each."""

    margin: Tensor
    """By how much the likeliest class leads the next after the first solve, a difference of probabilities."""
    right: Tensor
    """Whether that is right."""
    later: Tensor
    """Whether the answer is after every further number of steps, shape (photos, steps)."""

    def outcome(self, first: int, second: int, threshold: float) -> tuple[float, float]:
        """Mean evaluations and accuracy where answers with a margin below `threshold` get `second` more steps."""
        unsure = self.margin < threshold
        right = torch.where(unsure, self.later[:, second - 1], self.right)
        return first + second * unsure.double().mean().item(), right.double().mean().item()


def read_answer(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest class, and by how much its probability leads the next."""
    two = logits.softmax(1).topk(2, dim=1)
    return two.indices[:, 0], two.values[:, 0] - two.values[:, 1]


def follow_stages(
    model: MDEQ, solver: Solver, photos: Subset, classes: list[int], batch: int, firsts: Sequence[int]
) -> dict[int, Stages]:
    """For each number of steps in `firsts`, what a solve of so many and up to `FURTHER` steps after it give for every photo."""
    found: dict[int, list[Stages]] = {first: [] for first in firsts}
    [attachment] = attachments(model.block)
    brief = replace(solver, max_steps=max(firsts), rtol=0.0, atol=0.0, trace="state")
    further = replace(brief, max_steps=FURTHER)
    for indices, targets, images in batches(model, photos, classes, batch):
        with torch.inference_mode():
            injection = model.inject(images)
            for first, state in dict(
                solved(model, attachment, brief, model.initial_state(injection), injection)
            ).items():
                if first in found:
                    answer, margin = read_answer(model.head(state))
                    states = solved(model, attachment, further, state, injection)
                    later = torch.stack([model.head(each).argmax(1) == targets for _, each in states], 1)
                    found[first].append(Stages(margin, answer == targets, later))
        print(f"\r{indices[-1] + 1} of {len(photos)} photos followed", end="", flush=True)
    print("\r" + " " * 40, end="\r")
    return {
        first: Stages(*(torch.cat([getattr(part, name) for part in parts]) for name in ("margin", "right", "later")))
        for first, parts in found.items()
    }


def batches(model: MDEQ, photos: Subset, classes: list[int], size: int) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Positions, true classes and preprocessed images `(B, 3, H, W)` of `size` photos at a time."""
    for start in range(0, len(photos), size):
        indices = range(start, min(start + size, len(photos)))
        targets = torch.tensor([classes[photos.targets[index]] for index in indices])
        yield indices, targets, torch.cat([model.preprocess(photos.image(index)) for index in indices])


def solved(
    model: MDEQ, attachment: Attachment, solver: Solver, start: Any, injection: Tensor
) -> list[tuple[int, tuple[Tensor, ...]]]:
    """The state after every number of steps of a solve traced by state."""
    with attachment.using(solver=solver):
        model.block(start, *model.block_inputs(injection))
    assert attachment.solution is not None
    return list(best_states(attachment.solution, range(1, solver.max_steps + 1)))


def choose_stages(stages: dict[int, Stages], needed: float) -> dict[str, Any]:
    """The cheapest lengths and threshold with the accuracy `needed`, or the most accurate where none has it."""
    found = [
        (*each.outcome(first, second, threshold / 200), first, second, threshold / 200)
        for first, each in stages.items()
        for second in range(1, FURTHER + 1)
        for threshold in range(201)
    ]
    enough = [each for each in found if each[1] >= needed]
    best = min(enough) if enough else max(found, key=lambda each: each[1])
    return dict(zip(("evaluations", "accuracy", "first", "second", "threshold"), best, strict=True))


def classify_in_stages(
    model: MDEQ, solver: Solver, photos: Subset, classes: list[int], batch: int, chosen: dict[str, Any]
) -> dict[str, Tensor]:
    """Per photo, with a second solve where the first answer is unsure: evaluations made, and whether the answer is right."""
    [attachment] = attachments(model.block)
    first, second = (replace(solver, max_steps=chosen[name], rtol=0.0, atol=0.0) for name in ("first", "second"))
    steps, right = [], []
    for indices, targets, images in batches(model, photos, classes, batch):
        with torch.inference_mode():
            injection = model.inject(images)
            with attachment.using(solver=first):
                state = model.equilibrium(injection)
            assert attachment.solution is not None
            made = attachment.solution.steps.clone()
            answer, margin = read_answer(model.head(state))
            unsure = margin < chosen["threshold"]
            if unsure.any():
                start_again = tuple(leaf[unsure] for leaf in state)
                with attachment.using(solver=second):
                    state = model.block(start_again, *model.block_inputs(injection[unsure]))
                assert attachment.solution is not None
                made[unsure] += attachment.solution.steps
                answer[unsure] = model.head(state).argmax(1)
        steps.append(made)
        right.append(answer == targets)
        print(f"\r{indices[-1] + 1} of {len(photos)} photos classified", end="", flush=True)
    print("\r" + " " * 40, end="\r")
    return {"steps": torch.cat(steps), "right": torch.cat(right)}


def compare(fixed: dict[str, Tensor], early: dict[str, Tensor]) -> dict[str, Any]:
    """Both ways on the same photos, with the standard error of the difference in accuracy."""
    difference = early["right"].double() - fixed["right"].double()
    evaluations = [each["steps"].double().mean().item() for each in (fixed, early)]
    return {
        "fixed": {"evaluations": evaluations[0], "accuracy": fixed["right"].double().mean().item()},
        "exit": {"evaluations": evaluations[1], "accuracy": early["right"].double().mean().item()},
        "ratio": evaluations[1] / evaluations[0],
        "points_lost": -100 * difference.mean().item(),
        "points_lost_standard_error": 100 * difference.std().item() / math.sqrt(len(difference)),
        "answers_changed": int((difference != 0).sum()),
        "exit_steps": torch.bincount(early["steps"]).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="labelled photos of the checkpoint's classes")
    parser.add_argument("--checkpoint", default="embedded")
    parser.add_argument("--choosing", type=int, default=2000, help="validation photos that serve for choosing only")
    parser.add_argument(
        "--measured", type=int, default=None, help="how many of the others are measured; all by default"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=["Anderson"])
    parser.add_argument("--out", type=Path, default=RESULTS / "early_exit.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", NotConvergedWarning)

    model = MDEQ.from_pretrained(options.checkpoint)
    source = open_source(options.data)
    order = torch.randperm(len(source.validation), generator=torch.Generator().manual_seed(options.seed)).tolist()
    choosing = Subset(source.validation, order[: options.choosing])
    rest = order[options.choosing :][: options.measured]
    measured = Subset(source.validation, rest)

    content: dict[str, Any] = {
        "command": "python -m benchmarks.early_exit --data FOLDER",
        "torch": torch.__version__,
        "settings": {
            "checkpoint": options.checkpoint,
            "choosing": len(choosing),
            "measured": len(measured),
            "seed": options.seed,
        },
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "solvers": {},
    }
    if options.out.exists():
        stored = json.loads(options.out.read_text())
        if stored["settings"] == content["settings"]:
            content = stored

    for name in options.solvers:
        row = content["solvers"].setdefault(name, {})
        for part in examine(model, SOLVERS[name], row, (choosing, measured), source.labels, options.batch):
            options.out.write_text(json.dumps(content, indent=1) + "\n")
            print(f"{name}: {part} done", flush=True)
        print_table(name, row)


def examine(
    model: MDEQ,
    solver: Solver,
    row: dict[str, Any],
    photos: tuple[Subset, Subset],
    labels: Sequence[ClassLabel],
    batch: int,
) -> Iterator[str]:
    """Fill in what `row` lacks: `chosen` and `stages` on the first photos, `measured` and `staged` on the others."""
    choosing, measured = photos
    classes = match_classes(model.classes, labels)
    if "chosen" not in row:
        row["chosen"] = choose(follow(model, solver, choosing, classes, batch))
        yield "chosen"
    fixed, early = row["chosen"]["fixed"], row["chosen"]["exit"]
    if "measured" not in row:
        always = replace(solver, max_steps=fixed["steps"], rtol=0.0, atol=0.0)
        stopping = replace(solver, max_steps=early["max_steps"], rtol=early["rtol"], atol=0.0)
        row["measured"] = compare(*(classify(model, each, measured, labels, batch) for each in (always, stopping)))
        yield "measured"
    if "stages" not in row:
        firsts = [fixed["steps"] // 2, fixed["steps"] // 2 + 1]
        needed = fixed["accuracy"] - MAY_LOSE / 2 - 1e-9
        row["stages"] = choose_stages(follow_stages(model, solver, choosing, classes, batch, firsts), needed)
        yield "stages"
    if "staged" not in row:
        records = classify_in_stages(model, solver, measured, classes, batch, row["stages"])
        accuracy = records["right"].double().mean().item()
        evaluations = records["steps"].double().mean().item()
        against = row["measured"]["fixed"]
        row["staged"] = {
            "evaluations": evaluations,
            "accuracy": accuracy,
            "ratio": evaluations / against["evaluations"],
            "points_lost": 100 * (against["accuracy"] - accuracy),
            "looked_at_twice": (records["steps"] > row["stages"]["first"]).double().mean().item(),
        }
        yield "staged"


def print_table(name: str, row: dict[str, Any]) -> None:
    """What was measured with one solver."""
    measured, staged = row["measured"], row["staged"]
    rows = {
        f"always {row['chosen']['fixed']['steps']}": {**measured["fixed"], "ratio": 1.0, "points_lost": 0.0},
        f"rtol={row['chosen']['exit']['rtol']}": {
            **measured["exit"],
            **{k: measured[k] for k in ("ratio", "points_lost")},
        },
        "unsure go on": staged,
    }
    print(f"{name:<18}{'evaluations':>12}{'ratio':>8}{'accuracy':>10}{'points lost':>13}")
    for label, values in rows.items():
        print(
            f"{label:<18}{values['evaluations']:>12.2f}{values['ratio']:>8.3f}{values['accuracy']:>10.2%}"
            f"{values['points_lost']:>13.2f}"
        )


if __name__ == "__main__":
    main()
