"""`phantomgrad evaluate`: accuracy of a checkpoint, by solver steps, and how far its block settles."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    DATA_HELP,
    UsageError,
    add_command,
    add_device,
    default_device,
    positive_integer,
    print_json,
    seed,
    step_counts,
    table,
)

if TYPE_CHECKING:
    from phantomgrad_hub.facts import Facts


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "evaluate",
        summary="Measure a checkpoint on labelled photos; classes are matched by name or WordNet id.",
        example="phantomgrad evaluate embedded --data tiny-imagenet",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="embedded, a folder, or a repository of the Hugging Face Hub"
    )
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument(
        "--split",
        choices=("validation", "train", "all"),
        default="validation",
        help="which photos; validation by default, a held-out tenth where there is no such split",
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=None,
        help="what chooses a held-out tenth; by default the seed of the checkpoint's training, 0 where it is not known",
    )
    parser.add_argument(
        "--steps",
        type=step_counts,
        metavar="N,N,...",
        help="solver steps whose accuracy is reported; by default a range",
    )
    parser.add_argument("--batch-size", type=positive_integer, default=None, help="photos at a time")
    parser.add_argument(
        "--card",
        action="store_true",
        help="write the figures to card.json of the checkpoint's folder, for its model card",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate and print the figures."""
    from phantomgrad_hub.data import DataError, Joined, open_source
    from phantomgrad_hub.evaluate import BATCH_SIZE, default_steps, evaluate
    from phantomgrad_hub.extras import require
    from phantomgrad_hub.facts import HELD_OUT
    from phantomgrad_hub.files import EMBEDDED, write_facts
    from phantomgrad_hub.models.mdeq import MDEQ

    if options.card and (options.checkpoint == EMBEDDED or not Path(options.checkpoint).is_dir()):
        raise UsageError(
            f"--card writes to the checkpoint's folder, and {options.checkpoint} is none of yours; `pull` makes one"
        )
    model = MDEQ.from_pretrained(options.checkpoint).to(default_device(options.device))
    trained = _training_seed(model.facts, options.checkpoint)
    seed = next((known for known in (options.seed, trained) if known is not None), 0)
    source = open_source(options.data, seed=seed)
    tenth = source.held_out and options.split != "all"
    if options.split == "all":
        images = Joined(source.train, source.validation)
    else:
        images = source.validation if options.split == "validation" else source.train
    if not len(images):
        raise DataError(f"{source.description}: no class has an image to hold out; --split all measures all of them")
    # None shows the bar on a terminal only.
    hidden = True if options.no_progress else None
    with require("tqdm", "train").tqdm(total=len(images), unit="photo", disable=hidden, leave=False) as bar:
        found = evaluate(
            model,
            images,
            source.labels,
            steps=options.steps or default_steps(model),
            batch_size=options.batch_size or BATCH_SIZE,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    if options.card:
        split = HELD_OUT if tenth and options.split == "validation" else options.split
        facts = replace(model.facts, data=model.facts.data or source.name or None, split=split, evaluation=found)
        write_facts(Path(options.checkpoint), facts)
    if options.json:
        place = {"split": options.split, "seed": seed if tenth else None}
        print_json({"checkpoint": options.checkpoint, "data": source.description, **place, **found.to_dict()})
        return 0
    measured = options.split
    if tenth:
        of_training = "" if trained is None else f"; that of the training is of seed {trained}"
        measured = f"the held-out tenth of seed {seed}{', that of the training' if seed == trained else of_training}"
        measured = measured if options.split == "validation" else f"all but {measured}"
    print(f"{source.description}; measured on {measured}")
    rows = [
        ("photos", str(found.count)),
        ("top-1", f"{found.top1:.2%}"),
        ("top-5", f"{found.top5:.2%}"),
        ("solver steps, mean", f"{found.steps_mean:.1f}"),
        ("relative residual, median", f"{found.residual_median:.1e}"),
        ("relative residual, 90th percentile", f"{found.residual_p90:.1e}"),
        ("photos above the solver's tolerance", str(found.unconverged)),
    ]
    if found.unreadable:
        rows.append(("photos that cannot be read, left out", str(found.unreadable)))
    print(table(rows))
    print(
        table(
            [
                ("solver steps", "top-1"),
                *((str(count), f"{top1:.2%}") for count, top1 in found.accuracy_by_steps.items()),
            ]
        )
    )
    return 0


def _training_seed(facts: Facts, checkpoint: str) -> int | None:
    """The seed that chose what the training held out, from the card or, before the run ends, from the run's folder."""
    if facts.held_out_seed is not None or not Path(checkpoint).is_dir():
        return facts.held_out_seed
    try:
        stored = json.loads((Path(checkpoint).resolve().parent / "config.json").read_text(encoding="utf-8"))
        seed = stored["config"]["seed"]
    except (OSError, ValueError, KeyError, TypeError):  # it lies in no run
        return None
    return seed if type(seed) is int and seed >= 0 else None
