"""What a visitor may send: an uploaded photo in a known format and of bounded size, read safely or refused in words."""

from __future__ import annotations

import html
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image

from phantomgrad_hub.errors import ImageError
from phantomgrad_hub.photos import read_photo


class _WithoutStub(type(gr.Image)):
    """A component class whose definition writes no `.pyi` file beside its module, as Gradio's own metaclass does."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
        return ABCMeta.__new__(cls, name, bases, attributes)


class GuardedImage(gr.Image, metaclass=_WithoutStub):
    """An image input that gives its event an upright 8-bit RGB image, or None where there is none.

    Everything else ends in a message on the page that names no path of the server: see `read_photo` for what is
    accepted. Only uploaded files are read; addresses are refused, because fetching them would be a request to
    another machine.
    """

    def get_block_name(self) -> str:
        """The front end's component."""
        return "image"

    def preprocess(self, payload: ImageData | None) -> Image.Image | None:
        """The uploaded photo; raises `gr.Error` with a sentence for the visitor."""
        if payload is None:
            return None
        if not payload.path:
            raise refusal("the image must be an uploaded file")
        try:
            with Path(payload.path).open("rb") as file:
                return read_photo(file)
        except ImageError as error:
            raise refusal(str(error)) from error
        except OSError as error:
            raise refusal("the uploaded image is gone; send it again") from error

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Gradio's copying of a file to its cache, without its download of addresses."""
        if isinstance(url_or_file_path, str) and "://" in url_or_file_path:
            raise refusal("the image must be an uploaded file, not an address")
        return await super().async_move_resource_to_block_cache(url_or_file_path)


def refusal(sentence: str) -> gr.Error:
    """The message on the page that says why something was not done; the server's log stays clean."""
    # Gradio shows it as HTML, and some of Pillow's messages quote the file's bytes.
    text = html.escape(sentence[:1].upper() + sentence[1:].rstrip(".") + ".")
    return gr.Error(text, print_exception=False)
