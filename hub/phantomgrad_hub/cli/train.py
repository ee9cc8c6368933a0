"""`phantomgrad train`: train a recipe, or resume the run in its folder."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from .common import DATA_HELP, UsageError, add_command, device, print_json


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "train",
        summary="Train a model; the same command resumes the run in its folder.",
        notes="exit status: 0 finished, 130 stopped by Ctrl-C, 143 by SIGTERM (both save: the same command goes on),\n"
        "1 failed, 2 bad usage",
        example="phantomgrad train tiny_imagenet --data tiny-imagenet --out run --set epochs=20",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="finetune, tiny_imagenet, cifar10_tiny, cifar10_large or imagenet_small"
    )
    parser.add_argument("--data", required=True, help=DATA_HELP)
    parser.add_argument("--out", required=True, help="the run's folder: last, best, metrics.jsonl, config.json, state")
    parser.add_argument(
        "--init", metavar="CHECKPOINT", help="fine-tune this checkpoint with a new head for the data's classes"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of the recipe, such as optimizer.lr=0.01",
    )
    parser.add_argument(
        "--device", type=device, default=None, help="cpu to leave a GPU alone; by default Accelerate chooses"
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, print what came out, and return the exit status."""
    from phantomgrad_hub.data import open_source
    from phantomgrad_hub.extras import require
    from phantomgrad_hub.train import RECIPES, SettingError, apply_settings, train
    from phantomgrad_hub.train.start import edit_for_checkpoint

    if options.recipe not in RECIPES:
        raise UsageError(f"no recipe {options.recipe!r}; recipes are {', '.join(RECIPES)}")
    if options.recipe == "finetune" and options.init is None:
        raise UsageError(
            "finetune needs --init CHECKPOINT, such as --init embedded; to train from scratch take tiny_imagenet"
        )
    if options.device is not None and options.device.type != "cpu":
        raise UsageError("--device takes only cpu here; choose GPUs with CUDA_VISIBLE_DEVICES or accelerate launch")
    require("accelerate", "train")  # said before anything about the data
    recipe = RECIPES[options.recipe]()
    try:
        if options.init is None:
            config = apply_settings(recipe, options.set)
        else:
            config = edit_for_checkpoint(recipe, options.set, options.init)
    except SettingError as error:
        raise UsageError(str(error)) from error
    source = open_source(options.data, seed=config.seed)
    if not options.json and os.environ.get("RANK", "0") == "0":  # of torchrun and accelerate launch
        print(source.description, flush=True)
    result = train(
        config,
        source,
        options.out,
        recipe=options.recipe,
        init=options.init,
        cpu=options.device is not None,
        progress=not options.no_progress,
    )
    if require("accelerate", "train").PartialState().is_main_process:
        _report(options, result)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def _report(options: argparse.Namespace, result: Any) -> None:
    out, evaluation = Path(options.out), result.evaluation
    if options.json:
        stopped = None if result.stopped_by is None else signal.Signals(result.stopped_by).name
        found = None if evaluation is None else evaluation.to_dict()
        print_json({"run": str(out), "step": result.step, "stopped_by": stopped, "best": found})
    elif evaluation is None:
        print(f"Stopped and saved at step {result.step}; the same command resumes.")
    else:
        print(
            f"{out / 'best'}: top-1 {evaluation.top1:.2%}, top-5 {evaluation.top5:.2%} on {evaluation.count} images, "
            f"median residual {evaluation.residual_median:.1e} after {evaluation.steps_mean:.1f} steps"
        )
