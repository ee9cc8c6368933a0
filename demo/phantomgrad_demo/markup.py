"""The page's own HTML, and the few lines of script that its buttons and its search need."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from phantomgrad_hub.photos import read_photo

from .photos import ExamplePhoto
from .plot import save_button

HEADER = """<header class="pg-header"><h1>Watch a network find its equilibrium</h1>
<p>This classifier applies one block to its own output, step after step, until the output no longer changes: that
equilibrium is its answer. Play the steps, and choose how many it may take.</p></header>"""

NO_PHOTO = "Choose, drop or paste a photo to see what it is."

ANSWER = """<p class="pg-sentence" role="status" aria-live="polite"></p>
<p class="pg-weak" hidden></p>
<ol class="pg-bars" aria-label="Most likely classes"></ol>
<div class="pg-player" role="group" aria-label="Steps of the solver">
<button type="button" class="pg-button pg-play">Play</button>
<input type="range" min="1" max="1" value="1" step="1" aria-label="Solver step">
<output></output>
<button type="button" class="pg-button pg-stop" hidden>Stop</button>
</div>"""
"""What `settle.js` fills."""

TAKEAWAY = '<p class="pg-takeaway" data-text="takeaway" data-needs-answer></p>'

CURVES = """<div class="pg-figures" data-needs-answer>
<div data-figure="residual"></div><div data-figure="probability"></div></div>"""

TAB_READY = "document.dispatchEvent(new CustomEvent('pg-tab-ready'));"

SHARE = """<p class="pg-share" data-needs-answer>
<button type="button" class="pg-button" data-copy="link">Copy a link to this</button>
<button type="button" class="pg-button" data-copy="python">Copy the Python</button></p>"""

PYTHON = """<p class="pg-takeaway">The same in Python: a checkpoint, another solver for one call, and how its solve went.</p>
<pre class="pg-code" data-needs-answer tabindex="0" role="region" aria-label="Python code"><code data-text="python"></code></pre>
<p data-needs-answer><button type="button" class="pg-button" data-copy="python">Copy the Python</button></p>"""

PICK_PHOTO = """
const tell = () => {
  document.documentElement.dataset.source = props.value;
  document.dispatchEvent(new CustomEvent('pg-source'));
};
watch('value', tell);
tell();
element.addEventListener('click', (event) => {
  const example = event.target.closest('button[data-example]');
  if (example) {
    document.dispatchEvent(new CustomEvent('pg-turn'));
    props.value = `${example.dataset.example}#${performance.now()}`;
    tell();
  }
  if (event.target.closest('button[data-own]')) document.querySelector('#pg-photo input[type=file]').click();
});
"""
OWN_PHOTO = "() => { document.dispatchEvent(new CustomEvent('pg-turn')); return `own#${performance.now()}`; }"
PHOTO_GONE = """(photo, source) => {
  if (photo || /^(none|refused)#/.test(source)) return; // and leave the source as it is
  document.dispatchEvent(new CustomEvent('pg-turn'));
  return `none#${performance.now()}`;
}"""
NO_ANSWER = """() => ({
  running: false,
  rows: [],
  message: 'There is no answer: the server is busy or cannot be reached. Choose the photo again, or change a setting.',
})"""

_THUMBNAIL = 96


def photo_buttons(examples: Sequence[ExamplePhoto]) -> str:
    """A row of buttons, one for each example photo and one for the visitor's own."""
    buttons = "".join(
        f'<button type="button" data-example="{escape(example.key)}" title="{escape(example.title)}">'
        f'<img src="{_thumbnail(example)}" alt="Example: {escape(example.title)}" width="64" height="64"></button>'
        for example in examples
    )
    own = '<button type="button" class="pg-own" data-own="">Your photo</button>'
    return f'<div class="pg-examples" role="group" aria-label="Example photos, and your own">{buttons}{own}</div>'


def maps(branches: int) -> str:
    """The place of the feature maps: two rows, of as many resolutions as the state has."""
    rows = "".join(
        f'<div class="pg-row"><p>{text}</p><div class="pg-line-of-maps" data-maps="{name}" style="--columns:{branches}">'
        "</div></div>"
        for name, text in (
            ("maps", "How large the state is at each position"),
            ("changes", "How much this step changed it (logarithmic)"),
        )
    )
    title = "The state at each resolution"
    return (
        f'<figure class="pg-figure pg-state" id="pg-maps" data-needs-answer>'
        f"<figcaption>{title}{save_button(title)}</figcaption>"
        f'<div class="pg-rows">{rows}</div><p class="pg-credit">Dark is low, yellow is high; the colours mean the same at '
        "every step, so that what stands still has settled.</p></figure>"
    )


def credit(example: ExamplePhoto, labels: Sequence[str]) -> str:
    """Title of an example photo, which of the model's classes are right for it, author, licence and source."""
    right = [label for label in labels if label.casefold() in example.fits]
    fits = f"{' or '.join(right) if right else f'none of the {len(labels)} classes'} would be right"
    licence = escape(example.licence)
    if example.licence_url is not None:
        licence = f'<a href="{escape(example.licence_url)}" target="_blank" rel="noopener noreferrer">{licence}</a>'
    return (
        f'<p class="pg-credit">{escape(example.title)}: {escape(fits)}. Photo: {escape(example.author)}, {licence}, '
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
