"""Photos as people have them, opened safely: any common format, any mode, any orientation."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from typing import IO, TYPE_CHECKING, TypeAlias

from phantomgrad_hub.errors import ImageError
from phantomgrad_hub.extras import require

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | IO[bytes] | Image.Image"

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
"""Endings, in lower case, of the files that count as photos in a folder."""
MAX_PIXELS = 40_000_000
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_ORIENTATION_TAG = 0x0112
_WHITE = (255, 255, 255, 255)
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)
"""What Pillow raises, depending on the format, for files that are not what they claim."""


def read_photo(source: ImageSource) -> Image.Image:
    """The photo as an upright 8-bit RGB image.

    `source` is a path, the bytes of a file, an open binary file or a PIL image. EXIF orientation is applied,
    transparency is laid on white, 16-bit values are scaled, and of an animation the first frame is taken. The result
    holds pixels alone, no EXIF or other metadata: reading it again gives the same.
    Raises `ImageError`, one line, for anything that cannot be read.
    """
    require("PIL")
    from PIL import Image

    if isinstance(source, Image.Image):
        return _decode(source, "the image")
    if isinstance(source, bytes):
        return _decode(_open(io.BytesIO(source), "the image"), "the image")
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "read"):
            raise ImageError(f"a photo is a path, bytes, a binary file or a PIL image, not {type(source).__name__}")
        return _decode(_open(source, "the image"), "the image")
    name = os.fspath(source)
    try:
        mode = os.stat(name).st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name} is a folder, not a photo")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for someone to write to it
            raise ImageError(f"{name} is not a regular file")
        # Opened here rather than by Pillow, which leaves a damaged file open.
        file = open(name, "rb")  # noqa: SIM115
    except ImageError:
        raise
    except FileNotFoundError as error:
        if "://" in name:
            raise ImageError(f"{name} is a URL; URLs are not fetched: download the photo first") from error
        raise ImageError(f"there is no file {name}") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{name} cannot be read: {_first_line(error)}") from error
    with file:
        return _decode(_open(file, name), name)


def _open(file: IO[bytes], name: str) -> Image.Image:
    """The image in `file`, whose header alone has been read."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    formats = [each for each in _FORMATS if each in Image.OPEN]
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on; the limit here is lower and says so itself.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name} has more than the {MAX_PIXELS // 1_000_000} million pixels allowed; make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a photo in a known format ({', '.join(formats)})") from error
    except _DAMAGE as error:
        raise ImageError(f"{name} cannot be read: {_first_line(error)}") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    """An upright RGB copy of `image`, independent of the file it came from."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS // 1_000_000} million allowed; "
            "make it smaller"
        )
    if width * height == 0:
        raise ImageError(f"{name} has no pixels")
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point values, whose range is unknown; save it with 8 or 16 bits")
    try:
        image.load()
        photo = _to_rgb(_upright(image))
    except _DAMAGE as error:
        raise ImageError(f"{name} is damaged or truncated: {_first_line(error)}") from error
    photo.info.clear()  # an orientation that is still there would be applied again
    return photo


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says it is to be seen; unreadable EXIF data count as none."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except (*_DAMAGE, TypeError, KeyError):
        return image
    methods = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    method = methods.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        # A plain conversion clips at 255 or not, depending on the release of Pillow; 257 maps 65535 to 255 exactly.
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, _WHITE)
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
