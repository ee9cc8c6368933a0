"""What visitors send instead of a plain photo, good and bad."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a file's bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def turned() -> bytes:
    """8 x 4 pixels that EXIF says to turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (8, 4), RED), "JPEG", exif=exif)


def animated(kind: str) -> bytes:
    """A red frame, then a white one."""
    frames = [Image.new("RGB", (4, 4), shade) for shade in (RED, WHITE)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


def _noise(kind: str = "PNG") -> bytes:
    return encoded(Image.effect_noise((64, 64), 50), kind)


ANSWERED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "EXIF says to turn it": ("turned.jpg", turned),
    "CMYK": ("cmyk.jpg", lambda: encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")),
    "16 bits a channel": ("sixteen.png", lambda: encoded(Image.new("I;16", (4, 4), 32896))),
    "grayscale": ("gray.png", lambda: encoded(Image.new("L", (4, 4), 255))),
    "black and white": ("bits.png", lambda: encoded(Image.new("1", (4, 4), 255))),
    "transparent": ("clear.png", lambda: encoded(Image.new("RGBA", (4, 4)))),
    "animated GIF": ("moves.gif", lambda: animated("GIF")),
    "one pixel": ("pixel.png", lambda: encoded(Image.new("RGB", (1, 1), RED))),
    "12 megapixels": ("large.jpg", lambda: encoded(Image.new("RGB", (4000, 3000), (10, 120, 200)), "JPEG")),
}
"""Name and content of files that are photos after all."""

REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "text named .jpg": ("holiday.jpg", lambda: b"just some text\n", "not a photo in a known format"),
    "an empty file": ("empty.png", lambda: b"", "not a photo in a known format"),
    "SVG": ("drawing.svg", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a photo in a known format"),
    "PDF named .png": ("paper.png", lambda: b"%PDF-1.7\n", "not a photo in a known format"),
    "half a PNG": ("cut.png", lambda: _noise()[:1500], "damaged or truncated"),
    "half a JPEG": ("cut.jpg", lambda: _noise("JPEG")[:700], "damaged or truncated"),
    "169 megapixels": (
        "large.png",
        lambda: png_header(13_000, 13_000),
        "13000 x 13000 pixels, more than the 40 million",
    ),
    "900 megapixels": ("huge.png", lambda: png_header(30_000, 30_000), "more than the 40 million pixels"),
    "10,000 megapixels": ("bomb.png", lambda: png_header(100_000, 100_000), "more than the 40 million pixels"),
}
"""Name and content of files that are none, and what the sentence about them contains."""
