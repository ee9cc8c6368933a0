"""The page, and the server that shows it."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from phantomgrad_hub import MDEQ
from phantomgrad_hub.checkpoint import FILES
from phantomgrad_hub.download import locate

from . import markup, photos
from .card import CARD_FILE, model_line, read_facts
from .guard import GuardedImage, GuardedSlider, refusal
from .handlers import Handlers
from .ports import claim_port

TITLE = "phantomgrad: watch a network find its equilibrium"
LAUNCH_OPTIONS: dict[str, Any] = {
    "allowed_paths": [],
    "app_kwargs": {"docs_url": None, "redoc_url": None, "openapi_url": None},
    "css_paths": [Path(__file__).with_name("page.css")],
    "enable_monitoring": False,
    "footer_links": ["api"],
    "max_file_size": "20mb",
    "run_history": False,
    "share": False,
    "show_error": False,
    "ssr_mode": False,
}
_QUEUE_SIZE = 16
_CACHE_SECONDS = (600, 3600)
"""How often uploaded files are looked through, and how old they get."""


class Page(gr.Blocks):
    """Blocks whose launch is closed by default, wherever it is launched from."""

    def launch(self, *args: Any, **options: Any) -> Any:
        """`gr.Blocks.launch`, with `LAUNCH_OPTIONS` where nothing else is asked for."""
        return super().launch(*args, **{**LAUNCH_OPTIONS, "theme": _theme(), **options})

    async def preprocess_data(self, *args: Any, **options: Any) -> Any:
        """Gradio's own, with a sentence for the sender of a malformed request in the place of a traceback here."""
        try:
            return await super().preprocess_data(*args, **options)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:
            raise refusal("the request does not have the form that the API's page describes") from error


def build_app(checkpoint: str | os.PathLike[str]) -> gr.Blocks:
    """The page of the model in `checkpoint`: `embedded`, a folder or a repository of the Hugging Face Hub.

    It opens on an example photo that is solved here. Raises `CheckpointError` where there is no such model.
    """
    folder = locate(checkpoint, None, (*FILES, CARD_FILE))
    model = MDEQ.from_pretrained(folder).eval()
    handlers = Handlers(model=model, examples=photos.available())
    first = handlers.open_example(0) if handlers.examples else None
    first_answer, first_figures = handlers.show(first, handlers.most_steps)
    first_credit = markup.credit(handlers.examples[0]) if handlers.examples else ""
    buttons = markup.example_buttons(handlers.examples)

    with Page(title=TITLE, analytics_enabled=False, delete_cache=_CACHE_SECONDS) as page:
        _html(markup.HEADER)
        with gr.Row(elem_id="pg-top"):
            with gr.Column(scale=2, min_width=280):
                photo = GuardedImage(
                    first,
                    type="pil",
                    format="png",
                    sources=["upload", "clipboard"],
                    label="Photo",
                    height=280,
                    buttons=[],
                    elem_id="pg-photo",
                    alt_text="The photo being classified",
                    placeholder="Drop, paste or choose a photo",
                )
                picker = _html(buttons, js_on_load=markup.PICK_EXAMPLE, elem_id="pg-examples")
                credit = _html(first_credit, elem_id="pg-credit")
            with gr.Column(scale=3, min_width=320):
                answer = _html(first_answer, html_template=markup.LIVE_REGION, elem_id="pg-answer")
                steps = GuardedSlider(
                    1,
                    handlers.most_steps,
                    value=handlers.most_steps,
                    step=1,
                    label="Most solver steps",
                    info="How much the network may think: stop it earlier and see what it would have said.",
                    elem_id="pg-steps",
                )
        figures = _html(first_figures, elem_id="pg-figures")
        _html(markup.model_note(model_line(model, read_facts(folder))))
        _html(markup.class_list(model.labels), js_on_load=markup.SEARCH_CLASSES, elem_id="pg-classes")

        shared: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        # By default Gradio drops an event while the previous one runs; here the last one counts.
        private: dict[str, Any] = {**shared, "api_visibility": "private", "trigger_mode": "always_last"}
        shown = [answer, figures]
        uploaded = photo.input(handlers.show_upload, [photo, steps], [photo, *shown, credit, steps], **private)
        uploaded.failure(handlers.show_nothing, None, [*shown, credit], **private)
        photo.clear(handlers.show_nothing, None, [*shown, credit], **private)
        steps.change(handlers.show_steps, [photo, steps], [*shown, steps], **private)
        picker.click(handlers.show_example, [steps], [photo, *shown, credit, steps], **private)
        # No trigger: the endpoint is for programs, which see its parameter's name and its result.
        gr.on(
            [],
            handlers.name_classes,
            [photo],
            [gr.JSON(visible=False, label="probabilities")],
            api_name="classify",
            api_description="The probability of every class the model knows, best first.",
            **shared,
        )
    page.queue(max_size=_QUEUE_SIZE, default_concurrency_limit=1)
    return page


def launch(checkpoint: str | os.PathLike[str], host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serve the page of `checkpoint` until Ctrl-C or SIGTERM, and print its address.

    `port` None takes 7860 or the next free one; 0 takes any. Raises `OSError`, one line, where the port is in use.
    """
    claimed = claim_port(host, port)
    if threading.current_thread() is threading.main_thread():
        # Service managers stop programs with SIGTERM; it ends as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A folder of its own: what visitors send goes when the server does.
    with tempfile.TemporaryDirectory(prefix="phantomgrad-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_app(checkpoint)
        page.launch(server_name=host, server_port=claimed, prevent_thread_lock=True, quiet=True)
        print(f"The demo is at {page.local_url} (Ctrl-C stops it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def _html(value: str, **options: Any) -> gr.HTML:
    """The page's own HTML, styled by `page.css` alone."""
    return gr.HTML(value, apply_default_css=False, **options)


def _theme() -> themes.Base:
    """Gradio's default look in fonts that every system has."""
    return themes.Default(
        primary_hue="blue",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
