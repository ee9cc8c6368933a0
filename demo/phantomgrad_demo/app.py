"""The page, and the server that shows it."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio import themes

from phantomgrad_hub.checkpoint import load_checkpoint
from phantomgrad_hub.download import locate

from . import markup, photos
from .api import Api, add_endpoints
from .card import model_line, read_facts
from .guard import GuardedImage, refusal
from .handlers import Handlers
from .ports import claim_port
from .tab_handlers import TabHandlers
from .tabs import Controls, compare_tab, gradient_tab, html_block, nearby_tab, watch_tab

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
_AT_ONCE = 2
"""How many solves run at a time; they share the processor's cores."""
_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": _AT_ONCE, "show_progress": "hidden"}
# By default Gradio drops an event while the previous one runs; here the last one counts.
_PRIVATE: dict[str, Any] = {**_MODEL, "api_visibility": "private", "trigger_mode": "always_last"}
_UNQUEUED: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that take no time, whoever else is waiting."""
_CACHE_SECONDS = (600, 3600)
"""How often uploaded files are looked through, and how old they get."""


class Page(gr.Blocks):
    """Blocks whose launch is closed by default, wherever it is launched from."""

    def launch(self, *args: Any, **options: Any) -> Any:
        """`gr.Blocks.launch`, with `LAUNCH_OPTIONS` where nothing else is asked for."""
        # Solves that each take all cores would wait for one another at every step.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // _AT_ONCE))
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
    found = locate(checkpoint)
    model = load_checkpoint(found.folder, source=found.source)
    facts = read_facts(found.folder)
    handlers = Handlers(model=model, examples=photos.available(), checkpoint=_public_name(checkpoint))
    tabs = TabHandlers(page=handlers, accuracy=facts.accuracy_by_steps)
    first = handlers.examples[0].key if handlers.examples else ""
    first_photo = handlers.open_example(first) if first else None
    *_, first_view = handlers.solve(first_photo, first, handlers.settings)

    with Page(title=TITLE, analytics_enabled=False, delete_cache=_CACHE_SECONDS) as page:
        html_block(markup.HEADER, js_on_load=_script("page.js"))
        # Before the page's own events, which would take the same names.
        add_endpoints(Api(page=handlers, facts=facts), _MODEL)
        with gr.Row(elem_id="pg-top"):
            with gr.Column(scale=2, min_width=280):
                photo = GuardedImage(
                    first_photo,
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
                # Its value says where the photo is from; events read it as it is then, unlike the data of a click.
                source = html_block(
                    f"{first or 'none'}#0",
                    html_template=markup.photo_buttons(handlers.examples),
                    js_on_load=markup.PICK_PHOTO,
                    elem_id="pg-examples",
                )
                credit = html_block(handlers.credit(first) if first else "", elem_id="pg-credit")
            with gr.Column(scale=3, min_width=320):
                answer = gr.HTML(
                    first_view,
                    html_template=markup.ANSWER,
                    js_on_load=_script("settle.js"),
                    apply_default_css=False,
                    elem_id="pg-answer",
                )
                html_block(markup.SHARE)
        with gr.Tabs(elem_id="pg-tabs"):
            with gr.Tab("Watch", render_children=True):
                controls = watch_tab(handlers)
            with gr.Tab("Compare") as compare:
                compare_tab(compare, tabs, (photo, source), controls, _PRIVATE)
            with gr.Tab("Gradient") as gradient:
                gradient_tab(gradient, tabs, (photo, source), _PRIVATE)
            with gr.Tab("Nearby") as nearby:
                nearby_tab(nearby, tabs, (photo, source), controls, _PRIVATE)
            with gr.Tab("Python", render_children=True):
                html_block(markup.PYTHON, js_on_load=markup.TAB_READY)
        html_block(markup.model_note(model_line(model, facts)))
        html_block(markup.class_list(model.labels), elem_id="pg-classes")
        _connect(handlers, photo, source, credit, answer, controls)
    page.queue(max_size=_QUEUE_SIZE, default_concurrency_limit=1)
    return page


def _connect(
    handlers: Handlers, photo: GuardedImage, source: gr.HTML, credit: gr.HTML, answer: gr.HTML, controls: Controls
) -> None:
    """What happens when a visitor sends, picks or sets something."""
    solver, steps, tolerance, damping = controls
    shown = gr.on(
        [source.change, solver.input, steps.input, tolerance.input, damping.input],
        handlers.show,
        [photo, source, *controls],
        [photo, answer, credit, source, steps, damping],
        **_PRIVATE,
    )
    # In the browser alone: the server may be what failed.
    shown.failure(None, None, answer, js=markup.NO_ANSWER, api_visibility="private")
    photo.upload(None, None, source, js=markup.OWN_PHOTO, api_visibility="private")
    photo.change(None, [photo, source], source, js=markup.PHOTO_GONE, api_visibility="private")
    answer.submit(handlers.restore, None, [source, *controls], show_progress="hidden", api_visibility="private")
    answer.stop(handlers.stop, None, None, **_UNQUEUED)
    answer.retry(handlers.drop, None, None, **_UNQUEUED)


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
        # Where matplotlib is installed, Gradio asks it for its backend in the first event; to find one takes .4 s.
        os.environ.setdefault("MPLBACKEND", "agg")
        page = build_app(checkpoint)
        page.launch(server_name=host, server_port=claimed, prevent_thread_lock=True, quiet=True)
        print(f"The demo is at {page.local_url} (Ctrl-C stops it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def _public_name(checkpoint: str | os.PathLike[str]) -> str:
    """The checkpoint as others can name it: a folder of this machine is nobody else's business."""
    name = os.fspath(checkpoint)
    return "path/to/checkpoint" if Path(name).exists() else name


def _script(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _theme() -> themes.Base:
    """Gradio's default look in fonts that every system has."""
    return themes.Default(
        primary_hue="blue",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    ).set(
        # White on the theme's own blue has a contrast of 3.7.
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )
