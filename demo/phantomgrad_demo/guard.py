"""What a visitor may send: an uploaded photo, read safely or refused in words, numbers and choices."""

from __future__ import annotations

import html
import math
from abc import ABCMeta
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image

from phantomgrad_hub.errors import ImageError
from phantomgrad_hub.photos import read_photo

UNSEEN = "unseen"
"""In a photo's `info`: whether browsers cannot show the file that it came from."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What stands for an upload that is no photo: a sentence that says why, which names no path of the server."""

    reason: str


class _WithoutStub(type(gr.Image)):
    """A component class whose definition writes no `.pyi` file beside its module, as Gradio's own metaclass does.

    Its name is that of Gradio's component, because the API's page shows it.
    """

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
        return ABCMeta.__new__(cls, name.removeprefix("Guarded"), bases, attributes)


class GuardedImage(gr.Image, metaclass=_WithoutStub):
    """An image input that gives its event an upright 8-bit RGB image, None where there is none, or a `Refused`.

    See `read_photo` for what is accepted. Only uploaded files are read; addresses are refused, because fetching them
    would be a request to another machine.
    """

    def get_block_name(self) -> str:
        """The front end's component."""
        return "image"

    # The event, not Gradio, says what becomes of an upload that is no photo.
    def preprocess(self, payload: ImageData | None) -> Image.Image | Refused | None:  # type: ignore[override]
        """The uploaded photo, or why it is none."""
        if payload is None:
            return None
        # Gradio itself looks only at paths that come with its mark, and does not insist on the mark.
        if not payload.path or not Path(payload.path).resolve().is_relative_to(Path(self.GRADIO_CACHE).resolve()):
            return Refused(reason=_sentence("the image must be an uploaded file"))
        try:
            with Path(payload.path).open("rb") as file:
                photo = read_photo(file)
        except ImageError as error:
            return Refused(reason=_sentence(str(error)))
        except OSError:
            return Refused(reason=_sentence("the uploaded image is gone; send it again"))
        photo.info[UNSEEN] = Path(payload.path).suffix.lower() in (".ppm", ".pgm", ".tif", ".tiff")
        return photo

    def example_payload(self) -> dict[str, Any]:
        """What the API's page gives as an example: not the address of a photo elsewhere, as Gradio's own does."""
        return {"path": "photo.jpg", "meta": {"_type": "gradio.FileData"}}

    def example_value(self) -> str:
        """The same as a program gets it."""
        return "photo.jpg"

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        """Gradio's copying of a file to its cache, without its download of addresses."""
        if isinstance(url_or_file_path, str) and "://" in url_or_file_path:
            raise refusal("the image must be an uploaded file, not an address")
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class GuardedSlider(gr.Slider, metaclass=_WithoutStub):
    """A slider that gives its event whatever number its field holds, or None where it holds none.

    Gradio's own raises where a visitor has typed a number beyond its ends, or is about to type one.
    """

    def get_block_name(self) -> str:
        """The front end's component."""
        return "slider"

    def preprocess(self, payload: Any) -> float | None:  # type: ignore[override]
        """The number in the field."""
        if isinstance(payload, bool) or not isinstance(payload, int | float) or not math.isfinite(payload):
            return None
        return payload


class GuardedRadio(gr.Radio, metaclass=_WithoutStub):
    """A choice that gives its event whatever text was sent: whoever reads it refuses in its own words."""

    def get_block_name(self) -> str:
        """The front end's component."""
        return "radio"

    def preprocess(self, payload: Any) -> Any:
        """What was sent."""
        return payload


def refusal(reason: str) -> gr.Error:
    """The message on the page that says why something was not done; the server's log stays clean."""
    # Gradio shows it as HTML, and some of Pillow's messages quote the file's bytes. Programs get it too.
    return gr.Error(html.escape(_sentence(reason), quote=False), print_exception=False)


def _sentence(reason: str) -> str:
    return reason[:1].upper() + reason[1:].rstrip(".") + "."
