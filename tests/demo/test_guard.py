"""Whatever a visitor sends becomes an upright RGB photo or one sentence that names no path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="needs the extra `demo`")

from gradio.data_classes import ImageData  # noqa: E402
from odd_photos import ANSWERED, RED, REFUSED, WHITE, animated, encoded, turned  # noqa: E402

from phantomgrad_demo.guard import GuardedImage, GuardedSlider, Refused, refusal  # noqa: E402
from phantomgrad_demo.panels import hint  # noqa: E402


@pytest.fixture(autouse=True)
def _uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the test's folder count as uploaded."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))


def sent(content: bytes, tmp_path: Path, name: str = "photo.png") -> Image.Image:
    """What the event gets where `content` was uploaded."""
    path = tmp_path / name
    path.write_bytes(content)
    photo = GuardedImage(type="pil").preprocess(ImageData(path=str(path), orig_name=name))
    assert isinstance(photo, Image.Image)
    assert photo.mode == "RGB"
    return photo


def refused(payload: ImageData) -> str:
    """The reason that the event gets."""
    found = GuardedImage(type="pil").preprocess(payload)
    assert isinstance(found, Refused)
    return found.reason


def colour(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    pixel = image.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return pixel


def test_nothing_sent_is_none() -> None:
    assert GuardedImage(type="pil").preprocess(None) is None


def test_exif_turns_the_photo_upright(tmp_path: Path) -> None:
    assert sent(turned(), tmp_path).size == (4, 8)


def test_cmyk(tmp_path: Path) -> None:
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = colour(sent(content, tmp_path), 4, 4)
    assert red > 200
    assert max(green, blue) < 60


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    photo = sent(encoded(Image.new("I;16", (4, 4), 32896)), tmp_path)
    assert photo.getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grayscale(mode: str, tmp_path: Path) -> None:
    assert sent(encoded(Image.new(mode, (4, 4), 255)), tmp_path).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str, tmp_path: Path) -> None:
    assert sent(encoded(Image.new(mode, (4, 4))), tmp_path).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind: str, tmp_path: Path) -> None:
    red, green, _ = colour(sent(animated(kind), tmp_path))
    assert red > 240
    assert green < 15


def test_one_pixel(tmp_path: Path) -> None:
    assert sent(encoded(Image.new("RGB", (1, 1), RED)), tmp_path).size == (1, 1)


@pytest.mark.parametrize(("name", "content"), ANSWERED.values(), ids=ANSWERED)
def test_every_odd_photo_is_read(name: str, content: Callable[[], bytes], tmp_path: Path) -> None:
    assert sent(content(), tmp_path, name).width >= 1


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_everything_else_is_refused_in_words(
    name: str, content: Callable[[], bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content())
    reason = refused(ImageData(path=str(tmp_path / name), orig_name=name))
    assert message in reason
    assert reason.startswith("The image")
    assert str(tmp_path) not in reason
    assert name not in reason
    assert "\n" not in reason


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    assert "send it again" in refused(ImageData(path=str(tmp_path / "gone.png")))


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.png", "https://example.org/x.png", "file:///etc/passwd"])
def test_addresses_are_never_fetched(address: str) -> None:
    image = GuardedImage(type="pil")
    with pytest.raises(gr.Error, match="not an address"):
        asyncio.run(image.async_move_resource_to_block_cache(address))


def test_a_data_address_is_not_read() -> None:
    assert "must be an uploaded file" in refused(ImageData(url="data:image/png;base64,iVBORw0KGgo="))


def test_a_file_of_the_server_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "private.png")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    for path in (str(tmp_path / "private.png"), str(tmp_path / "uploads" / ".." / "private.png")):
        assert refused(ImageData(path=path)) == "The image must be an uploaded file."


def test_messages_cannot_bring_markup() -> None:
    refused = refusal("broken chunk <img src=x>.")
    assert refused.message == "Broken chunk &lt;img src=x&gt;."
    assert refused.print_exception is False
    assert "<img" not in hint("Broken chunk <img src=x>.").takeaway


@pytest.mark.parametrize(
    ("payload", "number"),
    [(3, 3), (99, 99), (-5, -5), (2.5, 2.5), (None, None), ("", None), ("7", None), (True, None), (float("nan"), None)],
)
def test_the_slider_gives_the_number_in_its_field(payload: Any, number: float | None) -> None:
    assert GuardedSlider(1, 24, step=1).preprocess(payload) == number


def test_defining_the_component_left_no_stub_beside_its_module() -> None:
    import phantomgrad_demo.guard

    assert not Path(phantomgrad_demo.guard.__file__).with_suffix(".pyi").exists()
    assert GuardedImage(type="pil").get_block_name() == "image"
