"""The lines of Python that do what the page does."""

from __future__ import annotations

from .settings import SOLVERS, Settings


def python_code(settings: Settings, checkpoint: str) -> str:
    """A program that classifies a photo with the same settings and prints how the solve went."""
    kind = SOLVERS[settings.solver].__name__
    options = f"max_steps={settings.max_steps}, rtol={settings.tolerance:g}"
    if settings.solver == "fixed point":
        options += f", damping={settings.damping:g}"
    return f"""from phantomgrad import {kind}, attachments
from phantomgrad_hub import MDEQ

model = MDEQ.from_pretrained({checkpoint!r})
[attachment] = attachments(model.block)
with attachment.using(solver={kind}({options})):
    print(model.classify("photo.jpg"))
print(attachment.solution)
"""
