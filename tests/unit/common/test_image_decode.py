"""Decoding of untrusted images: every mode becomes RGB, and unreadable bytes fail with a reason."""

import errno
from typing import Any

import numpy as np
import pytest
from fixtures_extractors import encoded, plain, png_header, shape
from PIL import Image

from cm3.common.errors import UserError
from cm3.common.image_decode import UnreadableError, decode
from extractors.caption.base import MAX_ASPECT, limit_size

RED = (220, 20, 20)


def pixel(data: bytes, place: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decode(data)
    assert image.mode == "RGB"
    return tuple(int(value) for value in np.asarray(image)[place[1], place[0]])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (plain("red"), RED),
        (encoded(Image.new("L", (4, 4), 100)), (100, 100, 100)),
        (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (encoded(Image.new("LA", (4, 4), (0, 0))), (255, 255, 255)),
        (encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), (255, 255, 255)),
        (encoded(Image.new("RGBA", (4, 4), (*RED, 255))), RED),
        (encoded(Image.new("RGB", (4, 4), RED).quantize(4)), RED),
        (encoded(Image.new("P", (4, 4), 0), transparency=0), (255, 255, 255)),
        (encoded(Image.fromarray(np.full((4, 4), 51_400, np.uint16))), (200, 200, 200)),
        (encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (encoded(Image.new("RGB", (4, 4), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4))]), RED),
    ],
    ids=[
        "rgb",
        "grey",
        "bilevel",
        "grey-alpha",
        "transparent",
        "opaque",
        "palette",
        "palette-alpha",
        "16-bit",
        "cmyk",
        "animated",
    ],
)
def test_every_mode_becomes_rgb_with_transparency_on_white(data: bytes, expected: tuple[int, ...]) -> None:
    assert pixel(data) == expected


def test_cmyk_jpeg_is_not_inverted() -> None:
    red, green, blue = pixel(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red > 200 and green < 60 and blue < 60


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (20, 10), RED)
    image.paste((0, 0, 255), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = decode(encoded(image, "JPEG", exif=exif, quality=95))
    assert turned.size == (10, 20)
    assert np.asarray(turned)[2, 5, 2] > 200 and np.asarray(turned)[17, 5, 0] > 180


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_thin_and_tiny_images_are_images(size: tuple[int, int]) -> None:
    assert decode(plain("blue", size)).size == size


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"<html>not found</html>", "not an image"),
        (b"P6 1 1 255 abc", "not an image"),
        (shape("square", "red")[:900], "truncated"),
        (plain("red")[:60], "corrupt"),
        (shape("square", "red")[:400] + b"\xff" * 400, "corrupt"),
        (png_header(20_000, 20_000), r"too many pixels \(Image size \(400000000 pixels\)"),
        (png_header(9_000, 9_000), "9000 x 9000 pixels are more than the 64000000 allowed"),
        (png_header(1_000_000, 3), "1000000 x 3 pixels: one side is over 300 times the other"),
        (plain("red", (2, 601)), "2 x 601 pixels: one side is over 300 times the other"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "no defined range"),
    ],
    ids=range(11),
)
def test_unreadable_bytes_fail_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        decode(data)


def test_drafts_are_at_least_as_large_as_asked() -> None:
    large = encoded(Image.new("RGB", (2000, 1000), RED), "JPEG")
    assert decode(large, draft=256).size == (1000, 500)
    assert decode(shape("circle", "red"), draft=256).size == (160, 160)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (4000, 3), (1, 1), (3000, 2000)])
def test_images_for_captioning_are_capped_in_area_and_aspect(size: tuple[int, int]) -> None:
    image = limit_size(Image.new("RGB", size, RED), 250_000)
    width, height = image.size
    assert max(image.size) <= (MAX_ASPECT + 1) * min(image.size)
    assert width * height <= 250_000
    assert any(red > 200 and blue < 200 for _, (red, _, blue) in image.getcolors(2**24))


def test_a_thin_image_is_reduced_before_it_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    image, new, made = Image.new("RGB", (4000, 3), RED), Image.new, []
    monkeypatch.setattr(Image, "new", lambda mode, size, *more: (made.append(size), new(mode, size, *more))[1])
    assert limit_size(image, 250_000).size == (2236, 111)
    assert made == [(2236, 111)]


@pytest.mark.parametrize("fault", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_a_fault_of_the_machine_is_not_one_of_the_image(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(UserError, match="decoding an image failed for a reason of this machine"):
        decode(encoded(Image.new("L", (4, 4))))
