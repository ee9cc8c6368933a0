"""The model card: rendered from a template, recognised again as long as nobody has edited it.

A rendered card carries the digest of its own text. As long as that is right nobody has touched it, and it may be rendered
anew; an edited card belongs to whoever edited it.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from phantomgrad_hub.checkpoint import Description
from phantomgrad_hub.extras import require
from phantomgrad_hub.facts import REPOSITORY, Facts, Source
from phantomgrad_hub.labels import default_labels

from .explain import page

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_PLACE = "\x00marker\x00"
"""Stands in the template where no text of a card can stand."""
_MARKER = re.compile(r"<!-- rendered by phantomgrad, ([0-9a-f]{16}): yours once you edit it -->\n")
_SOURCE = re.compile(rb"\n\n<!-- phantomgrad: source -->\n[^\n]*\n\Z")
_FRONT_MATTER = re.compile(r"\A---\n.*?^---(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def render_card(description: Description, repository: str, parameters: int) -> str:
    """The text of `README.md` for the checkpoint of `description`, which has that many `parameters`, as `repository`."""
    hub = require("huggingface_hub")
    config, facts = description.config, description.facts
    named = description.labels != default_labels(len(description.labels))
    card = hub.ModelCard.from_template(
        _metadata(facts, repository),
        template_path=str(_TEMPLATE),
        marker=_PLACE,
        title=_title(facts, repository),
        repository=repository,
        channels=config.channels,
        size=description.preprocessing.size,
        classes=config.num_classes,
        examples=", ".join(label.name for label in description.labels[:3]) if named else "",
        parameters=_spelled(parameters),
        evaluation=facts.evaluation,
        solver=_options(config.eval_solver or config.solver),
        training_solver=_options(config.solver),
        gradient=_options(config.gradient),
        base_link=_base_link(facts.base),
        duration=None if facts.hours is None else _duration(facts.hours),
        percent=lambda share: "not known" if math.isnan(share) else f"{100 * share:.2f} %",
        **{
            name: getattr(facts, name)
            for name in ("data", "split", "terms", "command", "machine", "hours", "details", "limits", "base")
        },
    )
    text = f"{str(card).strip()}\n"
    return text.replace(_PLACE, _marker(text.replace(f"{_PLACE}\n", "", 1)).rstrip("\n"), 1)


def is_free(content: bytes) -> bool:
    """Whether nobody has written this card: it is rendered and not edited, or has no text below its metadata."""
    text = without_source(content).decode(errors="replace").replace("\r\n", "\n")
    return is_rendered(text) or not _FRONT_MATTER.sub("", text, count=1).strip()


def is_rendered(text: str) -> bool:
    """Whether `text` is a card that `render_card` wrote and nobody has edited."""
    found = _MARKER.search(text)
    return found is not None and _marker(text.replace(found[0], "", 1)) == found[0]


def with_source(content: bytes, source: Source) -> bytes:
    """The card of a fetched copy: the same, byte by byte, and where it was fetched from at its end."""
    link = f"{page(source.repository)}/tree/{source.commit}"
    line = f"Fetched from [{source.repository}]({link}) at commit `{source.commit}`."
    return without_source(content) + f"\n\n<!-- phantomgrad: source -->\n{line}\n".encode()


def without_source(content: bytes) -> bytes:
    """The card without the lines that `with_source` adds."""
    return _SOURCE.sub(b"", content)


def _marker(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"<!-- rendered by phantomgrad, {digest}: yours once you edit it -->\n"


def _metadata(facts: Facts, repository: str) -> Any:
    hub = require("huggingface_hub")
    options: dict[str, Any] = {
        "library_name": "phantomgrad",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "deep-equilibrium-model", "mdeq", "phantom-gradients"],
    }
    if facts.license is not None:
        options["license"] = facts.license
        if facts.license == "other":
            options["license_name"] = facts.license_name or "terms-of-the-data"
        if facts.license_link is not None:
            options["license_link"] = facts.license_link
    if facts.data_id is not None:
        options["datasets"] = [facts.data_id]
    if facts.base is not None and REPOSITORY.fullmatch(facts.base.partition("@")[0]):
        options["base_model"] = facts.base.partition("@")[0]
    if (found := facts.evaluation) is not None:
        about = {
            "task_type": "image-classification",
            "dataset_type": facts.data_id or re.sub(r"[^a-z0-9]+", "-", (facts.data or "unnamed").lower()).strip("-"),
            "dataset_name": facts.data or "unnamed data",
            "dataset_split": facts.split,
        }
        figures = (("accuracy", "top-1 accuracy", found.top1), ("top-5-accuracy", "top-5 accuracy", found.top5))
        options["model_name"] = repository.rpartition("/")[2]
        options["eval_results"] = [
            hub.EvalResult(**about, metric_type=kind, metric_name=name, metric_value=round(value, 6))
            for kind, name, value in figures
            if not math.isnan(value)
        ]
    return hub.ModelCardData(**options)


def _title(facts: Facts, repository: str) -> str:
    return facts.title or repository.rpartition("/")[2]


def _spelled(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} million" if parameters >= 1e6 else f"{parameters:,}"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _options(value: Any) -> str:
    """A gradient or solver with the options that are not its defaults."""
    changed = [
        f"{option.name}={getattr(value, option.name)!r}"
        for option in fields(value)
        if option.name in ("steps", "max_steps", "damping") or getattr(value, option.name) != option.default
    ]
    return f"`{type(value).__name__}({', '.join(changed)})`"


def _base_link(base: str | None) -> str | None:
    if base is None or not REPOSITORY.fullmatch(base.partition("@")[0]):
        return None
    repository, _, commit = base.partition("@")
    return f"{page(repository)}/tree/{commit}" if commit else page(repository)
