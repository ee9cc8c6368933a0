"""`phantomgrad predict`: what is on these photos?"""

from __future__ import annotations

import argparse
from typing import Any

from .common import (
    PROGRAM,
    UsageError,
    add_command,
    add_device,
    default_device,
    fail,
    positive_integer,
    print_json,
    table,
)


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "predict",
        summary="Classify photos, and say how far the network settled on each.",
        example="phantomgrad predict holiday.jpg photos/ --top 3",
    )
    parser.add_argument("photos", nargs="+", metavar="PHOTO|FOLDER", help="files; folders are searched, subfolders too")
    parser.add_argument(
        "--checkpoint",
        default="embedded",
        help="embedded (the default), a folder, or a repository of the Hugging Face Hub",
    )
    parser.add_argument("--top", type=positive_integer, default=5, help="classes to print for each photo (5)")
    parser.add_argument("--batch-size", type=positive_integer, default=32, help="photos at a time (32)")
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Predict and print; exit status 1 where a photo could not be read."""
    from phantomgrad_hub.models.mdeq import MDEQ
    from phantomgrad_hub.predict import find_photos, predict

    if not all(options.photos):
        raise UsageError("a PHOTO is an empty text; give a file or a folder")
    photos = find_photos(options.photos)
    model = MDEQ.from_pretrained(options.checkpoint).eval().to(default_device(options.device))
    records: list[dict[str, Any]] = []
    failed = 0
    for prediction in predict(model, photos, top=options.top, batch_size=options.batch_size):
        records.append(prediction.to_dict())
        if prediction.error is not None:
            failed += 1
            fail(f"{PROGRAM} predict: {prediction.error}")
        elif not options.json:
            settled = "converged" if prediction.converged else "not converged"
            print(
                f"{prediction.photo}  ({prediction.steps} solver steps, residual {prediction.residual:.1e}, {settled})"
            )
            print(table([(f"  {name}", f"{probability:.1%}") for name, probability in prediction.classes]), flush=True)
    if options.json:
        print_json(records)
    if failed and len(photos) > 1:
        fail(f"{PROGRAM} predict: {failed} of {len(photos)} photos could not be read")
    return 1 if failed else 0
