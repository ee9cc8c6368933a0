"""What the tabs show of their results, as HTML; each begins with its take-away."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from phantomgrad_hub import MDEQ

from .figures import accuracy_curve, residuals_together
from .nearby import Nearby
from .saliency import EXACT, Saliencies, Saliency
from .settings import Settings
from .trajectory import Trajectory
from .wording import best, chosen, end_sentence, milliseconds, percent, scientific, step_count

COMPARE_HINT = (
    "How many steps are enough? The same photo with two settings, side by side; the tolerance of both, and A's damping, "
    "are those of the first tab."
)
GRADIENT_HINT = (
    "A phantom gradient shows almost the same map as the exact gradient, for a few products with the block's Jacobian "
    "instead of a second solve."
)
NEARBY_HINT = "A good start saves steps: where a photo changed a little, its old equilibrium is nearly the new one."
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Those of the feature maps in `settle.js`."""


class Panel(NamedTuple):
    """A tab's take-away, which stands above its settings, and its result, both HTML."""

    takeaway: str
    result: str = ""


def hint(text: str) -> Panel:
    """What a tab says before it has a result, and in its place."""
    return Panel(takeaway=f'<p class="pg-takeaway" role="status">{escape(text)}</p>')


def belonging(panel: Panel, source: str, otherwise: str) -> Panel:
    """A panel that the page shows while the photo is from `source`; beside another photo it is a hint, `otherwise`."""
    own = f'<div data-source="{escape(source)}">'
    instead = f'<div class="pg-otherwise">{hint(otherwise).takeaway}</div>'
    return Panel(takeaway=f"{own}{panel.takeaway}</div>{instead}", result=f"{own}{panel.result}</div>")


WORKING = hint("Computing ...")


def compared(
    first: Trajectory, second: Trajectory, labels: Sequence[str], accuracy: Mapping[int, float], own: Settings
) -> Panel:
    """Two solves of one photo: answers, times, residuals, and where they stand on the checkpoint's accuracy curve.

    The curve is that of the checkpoint's `own` solver; a solve by another one has no place on it.
    """
    names = {"A": first, "B": second}
    cards = "".join(
        f'<section class="pg-card" aria-label="Setting {name}"><h3>{name}: {escape(described(each.settings))}</h3>'
        f"<p>{escape(end_sentence(each, labels))}</p>{_bars(each, labels)}"
        f'<p class="pg-credit">{milliseconds(each.seconds)} for {step_count(len(each.steps))}.</p></section>'
        for name, each in names.items()
    )
    figures = residuals_together("compared", "Residual of both settings", names)
    if accuracy:
        marks = [(len(each.steps), name) for name, each in names.items() if _same_solver(each.settings, own)]
        figures += accuracy_curve(accuracy, marks)
    return hint(_compared_takeaway(first, second, labels))._replace(
        result=f'<div class="pg-figures">{cards}</div><div class="pg-figures">{figures}</div>'
    )


def _same_solver(settings: Settings, own: Settings) -> bool:
    damped = settings.solver == "fixed point"
    return settings.solver == own.solver and (not damped or settings.damping == own.damping)


def described(settings: Settings) -> str:
    """`Anderson, at most 12 steps, tolerance 1e-3`."""
    name: str = settings.solver
    if settings.solver == "fixed point" and settings.damping != 1.0:
        name = f"fixed point, damping {settings.damping:g}"
    return f"{name}, at most {step_count(settings.max_steps)}, tolerance {chosen(settings.tolerance)}"


def saliency_maps(found: Saliencies, seen: Image.Image) -> Panel:
    """The gradients of the answer's score side by side: maps, cosines, products and times."""
    top = max(float(each.map.quantile(0.995)) for each in found.found.values())
    cells = [_cell(png(seen), "What the model sees", f"Its answer: {escape(found.label)}", "the photo")]
    for name, each in found.found.items():
        about = (
            f"{_products(each)}, {milliseconds(each.seconds)}"
            + ("" if name == EXACT else f"<br>cosine {each.cosine:.3f}")
            + ("" if each.settled else "<br>its own solve did not settle")
        )
        alt = f"Saliency by the {name} gradient, cosine with the exact one {each.cosine:.3f}"
        cells.append(_cell(png(coloured(each.map, top)), _capitalised(name), about, alt))
    return hint(_gradient_takeaway(found))._replace(
        result=f'<div class="pg-saliencies">{"".join(cells)}</div>'
        '<p class="pg-credit">Yellow pixels move the score of the answer most; the colours mean the same in all maps. '
        "Each time is from the equilibrium to the gradient, and a product is one vector-Jacobian product of the block.</p>"
    )


def nearby_curves(found: Nearby, seen: Sequence[Image.Image], labels: Sequence[str]) -> Panel:
    """Warm and cold solves of a changed photo: how many steps each took."""
    shown = zip(seen, ("Before", "Changed"), (found.before, found.warm), strict=True)
    cells = "".join(_cell(png(image), text, escape(_answer(solve, labels)), text) for image, text, solve in shown)
    curves = {"from zero": found.cold, "from the old equilibrium": found.warm}
    figure = residuals_together("nearby", "Residual after each step for the changed photo", curves)
    return hint(_nearby_takeaway(found))._replace(
        result=f'<div class="pg-figures"><div class="pg-saliencies">{cells}</div>{figure}</div>'
    )


def seen_by(model: MDEQ, photo: Image.Image) -> Image.Image:
    """The part of an RGB photo that the model sees, at its size."""
    return model.preprocessing.window(photo)


def coloured(shown: Tensor, top: float) -> Image.Image:
    """A map (H, W) from 0, dark, to `top`, yellow."""
    place = (shown / max(top, 1e-30)).clamp(0, 1) * (len(_COLOURS) - 1)
    low = place.floor().clamp(max=len(_COLOURS) - 2).long()
    table = torch.tensor(_COLOURS, dtype=torch.float32)
    mixed = torch.lerp(table[low], table[low + 1], (place - low).unsqueeze(-1))
    return Image.fromarray(mixed.round().to(torch.uint8).numpy())


def png(image: Image.Image) -> str:
    """The image as a `data:` address."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _cell(address: str, title: str, about: str, alt: str) -> str:
    """A captioned image; `about` is HTML."""
    return (
        f'<figure class="pg-cell"><img src="{address}" alt="{escape(alt)}"><figcaption>{escape(title)}'
        f"<small>{about}</small></figcaption></figure>"
    )


def _bars(trajectory: Trajectory, labels: Sequence[str], top: int = 3) -> str:
    values, indices = trajectory.probabilities.topk(min(top, len(labels)))
    rows = "".join(
        f'<li><span class="pg-label">{escape(labels[int(index)])}</span><span class="pg-percent">{percent(value)}</span>'
        f'<span class="pg-track" aria-hidden="true"><span style="width:{100 * value:.1f}%"></span></span></li>'
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    )
    return f'<ol class="pg-bars" aria-label="Most likely classes">{rows}</ol>'


def _answer(trajectory: Trajectory, labels: Sequence[str]) -> str:
    label, probability = best(trajectory.steps[-1], labels)
    return f"{label} {percent(probability)}"


def _compared_takeaway(first: Trajectory, second: Trajectory, labels: Sequence[str]) -> str:
    same = best(first.steps[-1], labels)[0] == best(second.steps[-1], labels)[0]
    answers = "The same answer" if same else "Different answers"
    ends = [
        f"{name} {'settled' if each.reason == 'settled' else 'did not settle'} in {step_count(len(each.steps))}"
        for name, each in (("A", first), ("B", second))
    ]
    return f"{answers}: {ends[0]}, {ends[1]}."


def _gradient_takeaway(found: Saliencies) -> str:
    exact, phantom = found.found[EXACT], found.found["Neumann phantom"]
    likeness = next(
        words
        for least, words in ((0.97, "Almost the same map"), (0.85, "A similar map"), (-1.0, "Another map"))
        if phantom.cosine >= least
    )
    return (
        f"{likeness}, {_products(phantom)} instead of {exact.products}: the Neumann phantom gradient's cosine with the "
        f"exact one is {phantom.cosine:.3f}, in {milliseconds(phantom.seconds)} instead of {milliseconds(exact.seconds)}."
    )


def _nearby_takeaway(found: Nearby) -> str:
    warm, cold = len(found.warm.steps), len(found.cold.steps)
    settled = found.warm.reason == found.cold.reason == "settled"
    if not settled:
        return (
            f"Not both solves settled: from the old equilibrium the residual is {scientific(found.warm.residual)} after "
            f"{step_count(warm)}, from zero {scientific(found.cold.residual)} after {step_count(cold)}."
        )
    if warm >= cold:
        return f"This start saves nothing: {step_count(warm)} from the old equilibrium, {step_count(cold)} from zero."
    return f"The old equilibrium is a good start: {step_count(warm)} from there, {step_count(cold)} from zero."


def _products(each: Saliency) -> str:
    return "1 product" if each.products == 1 else f"{each.products} products"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
