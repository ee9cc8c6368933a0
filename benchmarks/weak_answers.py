"""How often the page says "Probably none of the classes I know": `python -m benchmarks.weak_answers --known ... --unknown ...`.

A best class below a threshold is called none. Both kinds of mistakes are counted: photos of classes that the model knows,
which it nevertheless calls none, by whether its best class was right; and photos of classes that it does not know, which it
takes for one of its own. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.early_exit import batches
from phantomgrad_demo.wording import WEAK
from phantomgrad_hub import MDEQ
from phantomgrad_hub.data import Subset, open_source
from phantomgrad_hub.evaluate import match_classes

RESULT = Path(__file__).parent / "results" / "weak_answers.json"
THRESHOLDS = (0.1, WEAK, 0.2, 0.25, 0.3, 0.4)
UNKNOWN = ("airplane", "deer", "horse")
"""Classes of CIFAR-10 that Tiny ImageNet has nothing of."""


def answers(model: MDEQ, photos: Subset, batch: int = 64) -> tuple[Tensor, Tensor]:
    """The best class of every photo and its probability, both (photos,)."""
    classes, probabilities = [], []
    for _, _, images in batches(model, photos, list(range(len(model.labels))), batch):
        with torch.inference_mode():
            best = model(images).softmax(1).max(1)
        classes.append(best.indices)
        probabilities.append(best.values)
        print(f"\r{batch * len(classes)} of {len(photos)} photos", end="", flush=True)
    print()
    return torch.cat(classes), torch.cat(probabilities)


def share_below(probabilities: Tensor, threshold: float) -> float:
    """The share of photos whose best class is below the threshold."""
    return round((probabilities < threshold).double().mean().item(), 4)


def measure(model: MDEQ, known: str, unknown: str, most: int) -> dict[str, Any]:
    """Shares of photos called none at every threshold."""
    source = open_source(known)
    own = Subset(source.validation, range(0, len(source.validation), max(1, len(source.validation) // most)))
    classes, sure = answers(model, own)
    places = match_classes(model.classes, source.labels)
    right = classes == torch.tensor([places[target] for target in own.targets])
    other = open_source(unknown)
    wanted = [index for index, label in enumerate(other.labels) if label.name in UNKNOWN]
    found = [index for index, target in enumerate(other.validation.targets) if target in wanted]
    strangers = Subset(other.validation, found[:most])
    _, taken = answers(model, strangers)
    return {
        "photos_of_known_classes": len(own),
        "of_them_answered_rightly": round(right.double().mean().item(), 4),
        "photos_of_unknown_classes": len(strangers),
        "unknown_classes": [other.labels[index].name for index in wanted],
        "rows": [
            {
                "threshold": threshold,
                "right_answers_called_none": share_below(sure[right], threshold),
                "wrong_answers_called_none": share_below(sure[~right], threshold),
                "unknown_called_none": share_below(taken, threshold),
            }
            for threshold in THRESHOLDS
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", required=True, help="the checkpoint's own data")
    parser.add_argument("--unknown", required=True, help="CIFAR-10")
    parser.add_argument("--most", type=int, default=3000, help="photos of each kind")
    options = parser.parse_args(arguments)
    result = {
        "command": "python -m benchmarks.weak_answers --known TINY-IMAGENET --unknown CIFAR-10",
        "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, {platform.system()} {platform.machine()}",
        **measure(MDEQ.from_pretrained("embedded"), options.known, options.unknown, options.most),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
