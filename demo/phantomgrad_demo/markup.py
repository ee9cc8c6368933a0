"""The page's own HTML, and the few lines of script that its buttons and its search need."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from phantomgrad_hub.photos import read_photo

from .photos import ExamplePhoto

HEADER = """<header class="pg-header"><h1>Watch a network find its equilibrium</h1>
<p>This classifier applies one block to its own output, step after step, until the output no longer changes: that
equilibrium is its answer. The residual says how far it still is, and the slider how long it may go on.</p></header>"""

NO_PHOTO = '<p class="pg-sentence">Choose, drop or paste a photo to see what it is.</p>'

LIVE_REGION = '<div role="status" aria-live="polite">${value}</div>'

PICK_EXAMPLE = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('click', { index: Number(button.dataset.index) });
});
"""

SEARCH_CLASSES = """
element.addEventListener('input', (event) => {
  const wanted = event.target.value.trim().toLowerCase();
  let shown = 0;
  for (const item of element.querySelectorAll('li')) {
    item.hidden = !item.textContent.toLowerCase().includes(wanted);
    shown += item.hidden ? 0 : 1;
  }
  element.querySelector('output').textContent = shown + ' shown';
});
"""

_THUMBNAIL = 96


def example_buttons(examples: Sequence[ExamplePhoto]) -> str:
    """A row of buttons, one for each example photo."""
    buttons = "".join(
        f'<button type="button" data-index="{index}" title="{escape(example.title)}">'
        f'<img src="{_thumbnail(example)}" alt="Example: {escape(example.title)}" width="64" height="64"></button>'
        for index, example in enumerate(examples)
    )
    return f'<div class="pg-examples" role="group" aria-label="Example photos">{buttons}</div>' if examples else ""


def not_a_photo(reason: str) -> str:
    """Why what was sent could not be used, in the place of an answer."""
    return f'<p class="pg-sentence">{escape(reason)} Choose another photo.</p>'


def credit(example: ExamplePhoto) -> str:
    """Title, author, licence and source of an example photo."""
    licence = escape(example.licence)
    if example.licence_url is not None:
        licence = f'<a href="{escape(example.licence_url)}" target="_blank" rel="noopener noreferrer">{licence}</a>'
    return (
        f'<p class="pg-credit">{escape(example.title)}. Photo: {escape(example.author)}, {licence}, '
        f"from {escape(example.distribution)}.</p>"
    )


def model_note(line: str) -> str:
    """The line on the model."""
    return f'<p class="pg-model">{escape(line)}</p>'


def class_list(labels: Sequence[str]) -> str:
    """Every class the model knows, in a fold with a search field."""
    items = "".join(f"<li>{escape(label)}</li>" for label in sorted(labels, key=str.casefold))
    count = len(labels)
    return (
        f'<details class="pg-classes"><summary>The {count} classes this model knows</summary>'
        '<p><label>Search <input type="search" placeholder="cat, boat, lemon ..."></label> '
        f"<output>{count} shown</output></p><ul>{items}</ul></details>"
    )


def _thumbnail(example: ExamplePhoto) -> str:
    """The middle of the photo as a `data:` address."""
    path = example.find()
    assert path is not None
    image = read_photo(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    small = image.resize((_THUMBNAIL, _THUMBNAIL), box=(left, top, left + side, top + side), reducing_gap=2.0)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
