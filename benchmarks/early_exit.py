"""What per-photo convergence saves at test time: `python -m benchmarks.early_exit --data FOLDER`.

A fixed number of solver steps must do for the hardest photo; with a tolerance each photo stops where it has settled. Some
validation photos, drawn by a seed, serve for choosing only. One solve of them is followed step by step: the accuracy after
every number of steps, and under every tolerance. From these come the smallest fixed number within 0.1 point of the best, and
the cheapest pair of tolerance and limit that costs at most what may be lost. The other photos are then classified by the
solver as it is, once with that fixed number and once with that tolerance.

A second rule looks at the answer instead (`phantomgrad_hub.classify_early`): a photo stops where its likeliest class leads the
next by more than a share of the last change of all probabilities. The share is chosen on the same photos without their labels:
the smallest at which the fixed number's own probabilities of its answers exceed those of the early answers by no more than may
be lost, in the mean. The other photos are classified both ways, batch by batch in turn. What the draw of the first photos does to
all this is counted over many draws.

Prints tables and writes them as JSON. What the file already has for the same settings is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phantomgrad import Anderson, FixedPointIteration, NotConvergedWarning, Solver, attachments
from phantomgrad_hub import MDEQ, EarlyAnswer, classify_early
from phantomgrad_hub.data import Subset, open_source
from phantomgrad_hub.early_exit import lead_of
from phantomgrad_hub.evaluate import best_states, evaluate_images, match_classes
from phantomgrad_hub.labels import ClassLabel

RESULTS = Path(__file__).parent / "results"
MOST_STEPS = 32
FINEST = 1e-3
"""The checkpoint's own tolerance, at which the solves that serve for choosing stop."""
TOLERANCES = [round(10 ** (-exponent / 16), 4) for exponent in range(4, 49)]
NEAR_BEST, MAY_LOSE = 0.001, 0.002
"""Accuracies, as fractions: what counts as the best, and what an exit may cost."""
LEADS = [round(0.02 * step, 2) for step in range(1, 101)]
"""Of the likeliest class, as shares of the last change of all probabilities."""
FIRST, FOLLOWED, DRAWS = 3, 8, 40
"""The first step at which an answer may do, the steps that are followed for it, and the draws of photos."""
ALONE = 300
"""The photos that are classified one at a time."""
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
class Answers:
    """What the photos of a set are taken for, step by step."""

    probabilities: Tensor
    """Of every class, shape (photos, steps, classes)."""
    targets: Tensor
    """The true classes, shape (photos,)."""

    def subset(self, rows: Tensor) -> Answers:
        return Answers(self.probabilities[rows], self.targets[rows])

    def steps(self, lead: float, fixed: int) -> Tensor:
        """How many steps each photo takes where it stops once its lead is `lead` times the last change, or after `fixed`."""
        change = self.probabilities[:, :fixed].diff(dim=1).abs().sum(2)
        stop = lead_of(self.probabilities[:, 1:fixed]) >= lead * change
        stop[:, : FIRST - 2], stop[:, -1] = False, True
        return stop.int().argmax(1) + 2

    def right_after(self, steps: Tensor | int) -> Tensor:
        """Whether the answer after so many steps is right, shape (photos,)."""
        return self._classes(steps) == self.targets

    def expected_loss(self, steps: Tensor, fixed: int) -> float:
        """The accuracy that answering after `steps` loses if the probabilities after `fixed` steps are true."""
        last = self.probabilities[:, fixed - 1]
        return (last.amax(1) - last.gather(1, self._classes(steps)[:, None])[:, 0]).double().mean().item()

    def _classes(self, steps: Tensor | int) -> Tensor:
        rows = torch.arange(len(self.targets))
        return self.probabilities[rows, steps - 1].argmax(1)


def follow_answers(model: MDEQ, solver: Solver, photos: Subset, classes: list[int], batch: int) -> Answers:
    """The answer of every photo after every step of `solver`."""
    found: list[Answers] = []
    [attachment] = attachments(model.block)
    for indices, targets, images in batches(model, photos, classes, batch):
        seen: list[Tensor] = []

        def look(step: int, state: tuple[Tensor, ...], residual: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(model.head(state).softmax(1))

        with torch.inference_mode(), attachment.using(solver=solver, on_step=look):
            model.equilibrium(model.inject(images))
        found.append(Answers(torch.stack(seen, 1), targets))
        print(f"\r{indices[-1] + 1} of {len(photos)} photos followed", end="", flush=True)
    print("\r" + " " * 40, end="\r")
    return Answers(*(torch.cat([getattr(part, name) for part in found]) for name in ("probabilities", "targets")))


def choose_lead(answers: Answers, fixed: int) -> dict[str, Any]:
    """The smallest lead that is expected to lose no more than may be lost, and what every lead gives."""
    rows: list[dict[str, float]] = []
    for lead in LEADS:
        steps = answers.steps(lead, fixed)
        rows.append(
            {
                "lead": lead,
                "evaluations": steps.double().mean().item(),
                "accuracy": answers.right_after(steps).double().mean().item(),
                "expected_loss": answers.expected_loss(steps, fixed),
            }
        )
    chosen = next((row for row in rows if row["expected_loss"] <= MAY_LOSE), rows[-1])
    return {**chosen, "first": FIRST, "by_lead": rows}


def over_draws(answers: Answers, choosing: int) -> dict[str, Any]:
    """Fixed number and lead chosen on `choosing` photos and measured on the others, for many draws of them."""
    rows: list[dict[str, float]] = []
    for seed in range(DRAWS):
        order = torch.randperm(len(answers.targets), generator=torch.Generator().manual_seed(seed))
        chosen_on, others = answers.subset(order[:choosing]), answers.subset(order[choosing:])
        accuracies = [chosen_on.right_after(step).double().mean().item() for step in range(1, FOLLOWED + 1)]
        fixed = next(
            step for step in range(FIRST, FOLLOWED + 1) if accuracies[step - 1] >= max(accuracies) - NEAR_BEST - 1e-9
        )
        lead = choose_lead(chosen_on, fixed)["lead"]
        steps = others.steps(lead, fixed)
        lost = others.right_after(fixed).double().mean() - others.right_after(steps).double().mean()
        ratio = steps.double().mean().item() / fixed
        rows.append({"fixed": fixed, "lead": lead, "ratio": ratio, "points_lost": 100 * lost.item()})
    return {
        **{name: statistics.mean(row[name] for row in rows) for name in ("ratio", "points_lost")},
        **{f"{name}_spread": statistics.stdev(row[name] for row in rows) for name in ("ratio", "points_lost")},
        "draws": rows,
    }


def classify_both(
    model: MDEQ, always: Solver, photos: Subset, classes: list[int], batch: int, chosen: dict[str, Any]
) -> dict[str, Any]:
    """Photos classified by `always` and by `classify_early`, batch by batch in turn."""
    [attachment] = attachments(model.block)
    found_by: list[dict[str, list[Tensor]]] = [{"steps": [], "right": []} for _ in range(2)]
    seconds = [0.0, 0.0]
    for indices, targets, images in batches(model, photos, classes, batch):
        turns = (0, 1) if indices[0] // batch % 2 else (1, 0)
        for early in turns:
            with torch.inference_mode(), attachment.using(solver=always):
                began = time.perf_counter()
                if early:
                    answer = classify_early(model, images, lead=chosen["lead"], first=chosen["first"])
                else:
                    answer = EarlyAnswer(model(images), torch.full_like(targets, always.max_steps))
                seconds[early] += time.perf_counter() - began
            found_by[early]["steps"].append(answer.steps)
            found_by[early]["right"].append(answer.logits.argmax(1) == targets)
        print(f"\r{indices[-1] + 1} of {len(photos)} photos classified", end="", flush=True)
    print("\r" + " " * 40, end="\r")
    found = compare(*({name: torch.cat(parts) for name, parts in each.items()} for each in found_by))
    for name, spent in zip(("fixed", "exit"), seconds, strict=True):
        found[name]["photos_per_s"] = len(photos) / spent
    return found


def batches(model: MDEQ, photos: Subset, classes: list[int], size: int) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Positions, true classes and preprocessed images `(B, 3, H, W)` of `size` photos at a time."""
    for start in range(0, len(photos), size):
        indices = range(start, min(start + size, len(photos)))
        targets = torch.tensor([classes[photos.targets[index]] for index in indices])
        yield indices, targets, torch.cat([model.preprocess(photos.image(index)) for index in indices])


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
    """Fill in what `row` lacks: `chosen` and `answers` on the first photos, `measured`, `answered` and `alone` on the others."""
    choosing, measured = photos
    classes = match_classes(model.classes, labels)
    if "chosen" not in row:
        row["chosen"] = choose(follow(model, solver, choosing, classes, batch))
        yield "chosen"
    fixed, early = row["chosen"]["fixed"], row["chosen"]["exit"]
    always = replace(solver, max_steps=fixed["steps"], rtol=0.0, atol=0.0)
    if "measured" not in row:
        stopping = replace(solver, max_steps=early["max_steps"], rtol=early["rtol"], atol=0.0)
        row["measured"] = compare(*(classify(model, each, measured, labels, batch) for each in (always, stopping)))
        yield "measured"
    if "answers" not in row:
        row["answers"] = choose_lead(follow_answers(model, always, choosing, classes, batch), fixed["steps"])
        yield "answers"
    if "answered" not in row:
        row["answered"] = classify_both(model, always, measured, classes, batch, row["answers"])
        yield "answered"
    if "alone" not in row:
        few = Subset(measured, list(range(min(ALONE, len(measured)))))
        row["alone"] = classify_both(model, always, few, classes, 1, row["answers"])
        yield "alone"
    if "over_draws" not in row:
        followed = replace(always, max_steps=FOLLOWED)
        answers = [follow_answers(model, followed, each, classes, batch) for each in photos]
        everything = Answers(
            *(torch.cat([getattr(part, name) for part in answers]) for name in ("probabilities", "targets"))
        )
        row["over_draws"] = over_draws(everything, len(choosing))
        yield "over_draws"


def print_table(name: str, row: dict[str, Any]) -> None:
    """What was measured with one solver."""
    measured, answered = row["measured"], row["answered"]
    losses = ("ratio", "points_lost")
    rows = {
        f"always {row['chosen']['fixed']['steps']}": {**measured["fixed"], "ratio": 1.0, "points_lost": 0.0},
        f"rtol={row['chosen']['exit']['rtol']}": {**measured["exit"], **{key: measured[key] for key in losses}},
        f"lead={row['answers']['lead']}": {**answered["exit"], **{key: answered[key] for key in losses}},
    }
    print(f"{name:<18}{'evaluations':>12}{'ratio':>8}{'accuracy':>10}{'points lost':>13}")
    for label, values in rows.items():
        print(
            f"{label:<18}{values['evaluations']:>12.2f}{values['ratio']:>8.3f}{values['accuracy']:>10.2%}"
            f"{values['points_lost']:>13.2f}"
        )


if __name__ == "__main__":
    main()
