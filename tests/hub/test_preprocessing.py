"""Photos as people have them, and the tensor a model gets from them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from phantomgrad_hub import ConfigError, ImageError, Preprocessing
from phantomgrad_hub.photos import read_photo

PLAIN = Preprocessing(size=32, mean=(0, 0, 0), std=(1, 1, 1))


def picture(width: int = 60, height: int = 40) -> Image.Image:
    """A photo whose every pixel tells where it was."""
    image = Image.linear_gradient("L").resize((width, height))
    sideways = Image.linear_gradient("L").rotate(90).resize((width, height))
    return Image.merge("RGB", (image, sideways, Image.new("L", (width, height), 77)))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("source", ["path", "string", "bytes", "file", "image"])
def test_every_kind_of_source(source: str, tmp_path: Path) -> None:
    data = encoded(picture(), "PNG")
    file = tmp_path / "photo.png"
    file.write_bytes(data)
    sources = {"path": file, "string": str(file), "bytes": data, "file": io.BytesIO(data), "image": picture()}
    pixels = PLAIN(sources[source])
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    torch.testing.assert_close(pixels, PLAIN(picture()))


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (33, 200), (500, 37), (32, 32), (9, 9), (64, 65)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", [None, 37])
def test_agrees_with_torchvision(size: tuple[int, int], interpolation: str, resize: int | None) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    modes = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}
    noise = torch.randn(size[1], size[0], generator=torch.Generator().manual_seed(0)) * 60 + 128
    image = Image.fromarray(noise.clamp(0, 255).byte().numpy()).convert("RGB")
    options = Preprocessing(size=32, resize=resize, interpolation=interpolation)  # pyright: ignore[reportArgumentType]
    reference = v2.Compose(
        [
            v2.Resize(resize or 32, interpolation=modes[interpolation], antialias=True),
            v2.CenterCrop(32),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(options.mean, options.std),
        ]
    )
    # One resampling of the window instead of two steps may round a byte the other way.
    byte = 1.01 / 255 / min(options.std)
    torch.testing.assert_close(options(image)[0], reference(image), rtol=0, atol=byte)


def test_squash_keeps_all_of_the_photo() -> None:
    image = Image.new("RGB", (300, 30), (255, 0, 0))
    image.paste((0, 0, 255), (150, 0, 300, 30))
    pixels = Preprocessing(size=32, fit="squash", mean=(0, 0, 0), std=(1, 1, 1))(image)
    torch.testing.assert_close(pixels[0, :, 16, 2], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(pixels[0, :, 16, -3], torch.tensor([0.0, 0.0, 1.0]))


def test_a_panorama_never_exists_at_full_length() -> None:
    assert PLAIN(Image.new("RGB", (30_000_000, 1))).shape == (1, 3, 32, 32)


def test_normalisation() -> None:
    pixels = Preprocessing(size=8)(Image.new("RGB", (20, 20), (255, 0, 51)))
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(pixels[0, :, 4, 4], torch.tensor(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), "JPEG", quality=95, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert read_photo(data).tobytes() == expected.convert("RGB").tobytes()
    # What was turned once is not turned again.
    assert read_photo(read_photo(data)).tobytes() == expected.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_brings_no_metadata(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    found = read_photo(encoded(picture(), kind, exif=exif))
    assert found.info == {}
    assert dict(found.getexif()) == {}


def test_unreadable_exif_counts_as_none() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00garbage")
    assert read_photo(data).size == (60, 40)


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    assert read_photo(clear).getpixel((4, 4)) == (255, 255, 255)
    half = Image.new("LA", (9, 9), (0, 128))
    assert read_photo(half).getpixel((4, 4)) == pytest.approx((127, 127, 127), abs=1)
    palette = Image.new("P", (9, 9), 3)
    palette.putpalette([9] * 768)
    assert read_photo(encoded(palette, "PNG", transparency=3)).getpixel((4, 4)) == (255, 255, 255)
    keyed = encoded(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert read_photo(keyed).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    image = Image.new("I;16", (9, 9))
    for x in range(9):
        for y in range(9):
            image.putpixel((x, y), min(65535, x * 8192))
    photo = read_photo(encoded(image, kind))
    assert [photo.getpixel((x, 4))[0] for x in range(9)] == [0, 32, 64, 96, 128, 159, 191, 223, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = picture() if mode != "LAB" else Image.new("LAB", (60, 40), (50, 128, 128))
    photo = read_photo(source if mode == "LAB" else source.convert(mode))
    assert photo.mode == "RGB"
    assert photo.size == (60, 40)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, _ = read_photo(data).getpixel((10, 10))
        assert (red > 200, green < 50) == (True, True)


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises `width` x `height` pixels and whose body holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a photo in a known format"),
        (b"this is a text file", "is not a photo in a known format"),
        (b"%PDF-1.4 something", "is not a photo in a known format"),
        (encoded(picture(300, 300), "JPEG")[:1500], "is damaged or truncated: "),
        (encoded(Image.effect_noise((300, 300), 50), "PNG")[:9000], "is damaged or truncated: "),
        (huge_png(7000, 6000), "has 7000 x 6000 pixels, more than the 40 million allowed; make it smaller"),
        (huge_png(11_000, 10_000), "has 11000 x 10000 pixels, more than the 40 million allowed"),
        (huge_png(60_000, 60_000), "has more than the 40 million pixels allowed"),
    ],
    ids=["empty", "text", "pdf", "jpeg-cut", "png-cut", "42M", "110M", "3600M"],
)
def test_an_unreadable_photo_is_one_clear_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        PLAIN(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_photo_a_folder_and_a_number(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"there is no file .*nowhere\.jpg"):
        read_photo(tmp_path / "nowhere.jpg")
    with pytest.raises(ImageError, match="is a folder, not a photo"):
        read_photo(tmp_path)
    with pytest.raises(ImageError, match="not int"):
        read_photo(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ImageError, match="floating-point values"):
        read_photo(Image.new("F", (9, 9)))


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        Preprocessing(size=224, resize=256, interpolation="bicubic"),
        Preprocessing(size=64, fit="squash", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    ],
)
def test_json_round_trip(options: Preprocessing) -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(options.to_dict()))) == options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 4}, "size must be an integer between 8 and 4096, got 4"),
        ({"size": 32.0}, "size must be an integer"),
        ({"resize": 16}, "resize must be at least size, 32, got 16"),
        ({"resize": 40, "fit": "squash"}, "resize must be None where fit is 'squash', got 40"),
        ({"fit": "pad"}, "fit must be 'crop' or 'squash', got 'pad'"),
        ({"interpolation": "nearest"}, "interpolation must be one of box, bilinear"),
        ({"mean": (0, 0)}, "mean must be three numbers between -10.0 and 10"),
        ({"std": (0, 1, 1)}, "std must be three numbers between 0.0001 and 10"),
        ({"std": (float("nan"), 1, 1)}, "std must be three numbers"),
        ({"mean": "abc"}, "mean must be three numbers"),
        ({"format_version": 0}, "format_version of the preprocessing is 0, this release reads 1"),
        ({"crop": 3}, "unknown preprocessing options: crop"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Preprocessing.from_dict({"format_version": 1, "size": 32, **changes})
    assert str(caught.value).startswith(message)


def test_size_must_be_given() -> None:
    with pytest.raises(ConfigError, match="missing preprocessing option: size"):
        Preprocessing.from_dict({"format_version": 1})
