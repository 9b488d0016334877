"""Whole pixels beside odd metadata are an image; valid images have the pixels that Pillow alone gives them."""

import io
import random
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_extractors import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from cm3.common.image_decode import UnreadableError, decode
from cm3.common.image_metadata import without_metadata
from cm3.datasets.images.validate import examine

ROOT = Path(__file__).resolve().parents[3]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
GRADIENT = Image.fromarray(
    (np.add.outer(np.arange(60), np.arange(80))[..., None] * np.array([1, 2, 3]) % 256).astype(np.uint8)
)


def oracle(data: bytes) -> np.ndarray:
    """The pixels of a file with nothing odd in it, by Pillow's own means."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return np.asarray(image.convert("RGB"))


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x010F] = "maker"
    found[0x0112] = orientation
    found[0x011A] = (72, 1)
    return found


def texts(**options: Any) -> PngImagePlugin.PngInfo:
    found = PngImagePlugin.PngInfo()
    found.add_text("note", "words", zip=options.get("zip", False))
    if xmp := options.get("xmp"):
        found.add_itxt("XML:com.adobe.xmp", xmp, zip=options.get("zip", False))
    if profile := options.get("profile"):
        found.add_text(
            "Raw profile type exif", f"\nexif\n{len(profile):8}\n{profile.hex()}\n", zip=options.get("zip", False)
        )
    return found


XMP = '<x tiff:Orientation="6"/>'
FRAMES = [GRADIENT.rotate(10 * n) for n in range(1, 4)]


def valid_images() -> dict[str, bytes]:
    found = {f"{kind} turned {n}": encoded(GRADIENT, kind, exif=exif(n)) for kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF") for n in range(10)}  # fmt: skip
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
        for kind in FORMATS:
            try:
                found[f"{kind} {mode}"] = encoded(GRADIENT.convert(mode), kind)
            except (OSError, ValueError):
                continue  # the format has no such mode
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        found[f"{kind} frames"] = encoded(GRADIENT, kind, save_all=True, append_images=FRAMES)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        found[f"TIFF {compression}"] = encoded(GRADIENT, "TIFF", compression=compression, exif=exif(6))
    for zipped in (False, True):
        found[f"PNG XMP {zipped}"] = encoded(
            GRADIENT, "PNG", pnginfo=texts(xmp=XMP, zip=zipped), icc_profile=b"x" * 300
        )
        found[f"PNG profile {zipped}"] = encoded(GRADIENT, "PNG", pnginfo=texts(profile=exif(8).tobytes(), zip=zipped))
    return found | {
        "JPEG XMP": encoded(GRADIENT, "JPEG", xmp=XMP.encode(), icc_profile=b"y" * 300_000, comment="words"),
        "WEBP XMP": encoded(GRADIENT, "WEBP", xmp=XMP.encode(), icc_profile=b"y" * 300),
        "AVIF XMP": encoded(GRADIENT, "AVIF", xmp=XMP.encode()),
        "JPEG progressive": encoded(GRADIENT, "JPEG", progressive=True),
        "JPEG ordered": encoded(GRADIENT, "JPEG", exif=exif(6), xmp=b'<x tiff:Orientation="3"/>'),
        "PNG index": encoded(GRADIENT.convert("P"), "PNG", transparency=3),
        "PNG alphas": encoded(GRADIENT.convert("P"), "PNG", transparency=bytes(range(256))),
        "PNG colour": encoded(GRADIENT, "PNG", transparency=(0, 0, 0)),
        "PNG default": encoded(GRADIENT, "PNG", save_all=True, default_image=True, append_images=FRAMES),
    }


VALID = valid_images()


@pytest.mark.parametrize("name", VALID)
def test_valid_images_have_the_same_pixels_to_the_last_bit(name: str) -> None:
    assert np.array_equal(np.asarray(decode(VALID[name])), oracle(VALID[name]))
    with Image.open(io.BytesIO(VALID[name])) as image:
        found = examine(VALID[name], 64_000_000)
        assert (found.width, found.height, found.format) == (*image.size, image.format)


def chunk(kind: bytes, body: bytes, broken: bool = False) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ broken)


def in_png(*chunks: bytes, late: bool = False) -> bytes:
    """The gradient as a PNG with chunks after its header, or before its end."""
    data = encoded(GRADIENT)
    place = len(data) - 12 if late else 33
    return data[:place] + b"".join(chunks) + data[place:]


def in_jpeg(*segments: tuple[int, bytes], **options: Any) -> bytes:
    data = encoded(GRADIENT, "JPEG", **options)
    return (
        data[:2] + b"".join(struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body for kind, body in segments) + data[2:]
    )


def in_webp(*chunks: tuple[bytes, bytes]) -> bytes:
    data = encoded(GRADIENT, "WEBP", lossless=True, exif=exif(1))
    data = data[:12] + data[12 : data.index(b"EXIF")]
    data += b"".join(kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for kind, body in chunks)
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def tiff_exif(*entries: tuple[int, int, int, int]) -> bytes:
    body = b"".join(struct.pack(">HHLL", tag, kind, count, value) for tag, kind, count, value in entries)
    return b"MM\0*" + struct.pack(">LH", 8, len(entries)) + body + bytes(4)


TURNED = (0x0112, 3, 1, 6 << 16)
NO_TIFF, LONG = b"not a TIFF at all", b"t" * 2_000_000
BEYOND = tiff_exif((0x010F, 2, 500, 60_000), TURNED, (0x0110, 99, 1, 0))
"""Beside the orientation: a tag whose value is beyond the end, and one of an unknown type."""
INVALID = tiff_exif(TURNED, (0x011A, 5, 1, 2), (0x0132, 3, 4, 8), (0x8769, 4, 1, 9_999))
PACKED = zlib.compress(LONG)


def in_avif(payload: bytes) -> bytes:
    """The gradient with EXIF data that are replaced, in place, by others of the same length."""
    inner = tiff_exif((0x011A, 3, 1, 72 << 16), (0x011B, 3, 1, 72 << 16))
    data = encoded(GRADIENT, "AVIF", exif=inner)
    assert inner in data
    return data.replace(inner, payload[: len(inner)].ljust(len(inner), b"\xff"))


def tiff_with(tag: int, kind: int, count: int, value: int, compression: str | None = None) -> bytes:
    """The gradient as a TIFF whose tag for the software, 305, is replaced by another."""
    data = encoded(GRADIENT, "TIFF", software="somebody's software", compression=compression)
    place = data.index(struct.pack("<HH", 305, 2))
    return data[:place] + struct.pack("<HHLL", tag, kind, count, value) + data[place + 12 :]


ODD: dict[str, tuple[bytes, str, int]] = {
    # name: file, format, orientation that it says
    "PNG, EXIF is no TIFF": (in_png(chunk(b"eXIf", NO_TIFF)), "PNG", 1),
    "PNG, empty EXIF": (in_png(chunk(b"eXIf", b"")), "PNG", 1),
    "PNG, EXIF cut": (in_png(chunk(b"eXIf", INVALID[:9])), "PNG", 1),
    "PNG, EXIF beside invalid tags": (in_png(chunk(b"eXIf", INVALID)), "PNG", 6),
    "PNG, EXIF after an invalid tag": (in_png(chunk(b"eXIf", BEYOND)), "PNG", 6),
    "PNG, late EXIF": (in_png(chunk(b"eXIf", INVALID), late=True), "PNG", 6),
    "PNG, EXIF of a wrong CRC": (in_png(chunk(b"eXIf", INVALID, broken=True)), "PNG", 1),
    "PNG, EXIF, then a broken text": (in_png(chunk(b"eXIf", INVALID), chunk(b"tEXt", b"a\0b", broken=True)), "PNG", 6),
    "PNG, profile not hexadecimal": (in_png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\nzz zz")), "PNG", 1),
    "PNG, profile of one line": (in_png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"4d"))), "PNG", 1),
    "PNG, long profile": (in_png(chunk(b"zTXt", b"Raw profile type exif\0\0" + PACKED)), "PNG", 1),
    "PNG, long zTXt": (in_png(chunk(b"zTXt", b"note\0\0" + PACKED)), "PNG", 1),
    "PNG, long late zTXt": (in_png(chunk(b"zTXt", b"note\0\0" + PACKED), late=True), "PNG", 1),
    "PNG, long iTXt": (in_png(chunk(b"iTXt", b"note\0\1\0\0\0" + PACKED)), "PNG", 1),
    "PNG, long XMP": (in_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + PACKED)), "PNG", 1),
    "PNG, long tEXt": (in_png(chunk(b"tEXt", b"note\0" + LONG)), "PNG", 1),
    "PNG, texts of 80 MB": (in_png(*[chunk(b"zTXt", b"note\0\0" + zlib.compress(LONG[:1_000_000]))] * 80), "PNG", 1),
    "PNG, long ICC profile": (in_png(chunk(b"iCCP", b"icc\0\0" + PACKED)), "PNG", 1),
    "PNG, ICC profile without a name": (in_png(chunk(b"iCCP", b"icc")), "PNG", 1),
    "PNG, unknown compression": (in_png(chunk(b"iCCP", b"i\0\7x"), chunk(b"zTXt", b"n\0\7x")), "PNG", 1),
    "PNG, wrong CRC of a text": (in_png(chunk(b"tEXt", b"note\0words", broken=True)), "PNG", 1),
    "PNG, wrong CRC of a late text": (in_png(chunk(b"tEXt", b"note\0words", broken=True), late=True), "PNG", 1),
    "PNG, short chunks": (in_png(*[chunk(k, b"") for k in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"acTL", b"fcTL")]), "PNG", 1),
    "PNG, frames out of order": (in_png(chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", bytes(26))), "PNG", 1),
    "JPEG, EXIF is no TIFF": (in_jpeg((0xE1, b"Exif\0\0" + NO_TIFF)), "JPEG", 1),
    "JPEG, empty EXIF": (in_jpeg((0xE1, b"Exif\0\0")), "JPEG", 1),
    "JPEG, EXIF beside invalid tags": (in_jpeg((0xE1, b"Exif\0\0" + INVALID)), "JPEG", 6),
    "JPEG, EXIF after an invalid tag": (in_jpeg((0xE1, b"Exif\0\0" + BEYOND)), "JPEG", 6),
    "JPEG, XMP beside a bad EXIF": (in_jpeg((0xE1, b"Exif\0\0" + NO_TIFF), xmp=XMP.encode()), "JPEG", 6),
    "JPEG, short segments": (in_jpeg((0xE0, b"JFIF"), (0xEE, b"Adobe"), (0xED, b"Photoshop 3.0\0" + b"8BIM")), "JPEG", 1),
    "JPEG, short ICC profile": (in_jpeg((0xE2, b"ICC_PROFILE\0")), "JPEG", 1),
    "JPEG, bad list of images": (in_jpeg((0xE2, b"MPF\0" + INVALID)), "JPEG", 1),
    "JPEG, list of images that is no TIFF": (in_jpeg((0xE2, b"MPF\0" + NO_TIFF)), "JPEG", 1),
    "WEBP, EXIF is no TIFF": (in_webp((b"EXIF", NO_TIFF)), "WEBP", 1),
    "WEBP, EXIF beside invalid tags": (in_webp((b"EXIF", INVALID)), "WEBP", 6),
    "WEBP, EXIF after an invalid tag": (in_webp((b"EXIF", BEYOND)), "WEBP", 6),
    "WEBP, cut after the pixels": (in_webp((b"EXIF", INVALID), (b"XMP ", b"x" * 99))[:-50], "WEBP", 6),
    "AVIF, EXIF is no TIFF": (in_avif(NO_TIFF), "AVIF", 1),
    "AVIF, EXIF beside invalid tags": (in_avif(tiff_exif((0x011A, 5, 1, 2))), "AVIF", 1),
    "TIFF, tag beyond the end": (tiff_with(305, 2, 90, 999_999), "TIFF", 1),
    "TIFF, bad Exif directory": (tiff_with(0x8769, 2, 4, 0x41414141), "TIFF", 1),
    "TIFF, Exif directory beyond the end": (tiff_with(0x8769, 4, 1, 999_999), "TIFF", 1),
    "TIFF, bad GPS directory, packed": (tiff_with(0x8825, 2, 4, 0x41414141, "tiff_lzw"), "TIFF", 1),
    "GIF, long comment": (
        (lambda data: data[:781] + b"!\xfe" + (b"\xff" + b"x" * 255) * 9000 + b"\0" + data[781:])(encoded(GRADIENT, "GIF")),
        "GIF",
        1,
    ),
}  # fmt: skip
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    6: lambda pixels: np.rot90(pixels, -1),
}


@pytest.mark.parametrize("name", ODD)
def test_whole_pixels_beside_odd_metadata_are_an_image(name: str) -> None:
    data, kind, turned = ODD[name]
    plain = in_webp() if kind == "WEBP" else encoded(GRADIENT, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = examine(data, 64_000_000)
        pixels = np.asarray(decode(data))
    assert (found.width, found.height, found.format) == (80, 60, kind)
    assert np.array_equal(pixels, TURNS[turned](oracle(plain)))


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_pixels_are_not_an_image(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    data = encoded(noise, kind, **({"exif": exif(6)} if kind not in ("GIF", "BMP") else {}))
    for cut in (0.2, 0.5, 0.8):
        for judge in (decode, lambda data: examine(data, 64_000_000)):
            with pytest.raises(UnreadableError):
                judge(data[: int(cut * len(data))])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(VALID)), st.integers(0, 2**32))
def test_both_decoders_agree_on_damaged_files(name: str, seed: int) -> None:
    chance = random.Random(seed)
    damaged = bytearray(VALID[name])
    for _ in range(chance.randrange(1, 4)):
        damaged[chance.randrange(min(len(damaged), 500))] = chance.randrange(256)
    data = bytes(damaged[: chance.randrange(1, len(damaged))] if chance.random() < 0.2 else damaged)

    def reason(judge: Callable[[bytes], object]) -> str:
        try:
            judge(data)
        except UnreadableError as error:
            return error.kind
        return ""

    ours, other = reason(decode), reason(lambda data: examine(data, 64_000_000))
    assert bool(ours) == bool(other) or {ours, other} & {"no range", "too narrow", "placeholder"}


def scans_of(data: bytes) -> list[int]:
    return [match.start() for match in re.finditer(rb"\xff\xda", data)]


def test_the_scans_of_a_jpeg_are_bounded() -> None:
    data = encoded(GRADIENT, "JPEG", progressive=True)
    scans = scans_of(data)
    last, own = data[scans[-1] : -2], len(scans)

    def repeated(count: int) -> bytes:
        return data[:-2] + last * (count - own) + b"\xff\xd9"

    assert decode(repeated(100)).size == (80, 60)
    for judge in (decode, lambda data: examine(data, 64_000_000)):
        with pytest.raises(UnreadableError, match="a JPEG of 80 x 60 pixels in 101 scans, more than the 100 allowed"):
            judge(repeated(101))


def test_the_scans_of_a_huge_jpeg_are_bounded_sooner() -> None:
    data = encoded(Image.new("L", (8000, 8000)), "JPEG", progressive=True)
    last = data[scans_of(data)[-1] : -2]
    with pytest.raises(UnreadableError, match="in 46 scans, more than the 20 allowed"):
        decode(data[:-2] + last * 40 + b"\xff\xd9")


def test_bytes_of_metadata_and_of_later_images_are_not_scans() -> None:
    assert decode(in_jpeg((0xFE, b"\xff\xda" * 30_000))).size == (80, 60)
    assert decode(encoded(GRADIENT, "JPEG") + encoded(GRADIENT, "JPEG") * 200).size == (80, 60)


def strips(count: int) -> bytes:
    tags = [(256, 4, 1, 8), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, count, 16)]
    tags += [(277, 3, 1, 1), (278, 4, 1, 1), (279, 4, count, 16 + 4 * count)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHLL", *tag) for tag in tags) + bytes(4)
    start = struct.pack("<L", 16 + 8 * count)
    return b"II*\0" + start + bytes(8) + struct.pack("<L", 8) * 2 * count + directory


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (in_png(*[chunk(b"tEXt", b"")] * 500_000), "more than the 500000 segments, chunks or blocks"),
        (in_jpeg(*[(0xFE, b"")] * 500_000), "more than the 500000 segments, chunks or blocks"),
        (
            encoded(GRADIENT, "GIF")[:781] + b"!\xfe" + b"\1x" * 500_000 + b"\0" + encoded(GRADIENT, "GIF")[781:],
            "more than the 500000 segments, chunks or blocks",
        ),
        (strips(100_001), "a TIFF of 100001 strips or tiles, more than the 100000 allowed"),
    ],
    ids=["PNG", "JPEG", "GIF", "TIFF"],
)
def test_files_of_very_many_parts_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        examine(data, 64_000_000)


def test_only_the_first_of_many_frames_is_decoded() -> None:
    frames = [Image.new("P", (10, 10), n % 200) for n in range(3000)]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames)
        assert decode(data).size == (10, 10)


def test_profiles_that_inflate_are_not_read() -> None:
    profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(1 << 20)))
    (pixels,) = without_metadata(in_png(*[profile] * 5_000))
    assert len(pixels.data) < 20_000


OUT_OF_MEMORY = """
import io, resource, sys
import numpy as np
from PIL import Image
from cm3.common.errors import UserError
from cm3.common.image_decode import UnreadableError, decode
kind, options = sys.argv[1], eval(sys.argv[2])
file = io.BytesIO()
Image.new("RGB", (6000, 6000)).save(file, kind, **options)
decode(file.getvalue())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]), -1))
try:
    decode(file.getvalue())
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize(
    ("kind", "options", "room"),
    [
        ("JPEG", {"progressive": True}, 150_000_000),
        ("JPEG", {}, 50_000_000),
        ("PNG", {}, 50_000_000),
        ("WEBP", {"lossless": True, "method": 0}, 200_000_000),
        ("TIFF", {"compression": "tiff_lzw"}, 50_000_000),
    ],
)
def test_too_little_memory_is_not_a_fault_of_the_image(kind: str, options: dict[str, Any], room: int) -> None:
    arguments = [sys.executable, "-c", OUT_OF_MEMORY, kind, repr(options), str(room)]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "decoding an image failed for a reason of this machine, not of the data" in ended.stdout, ended.stderr
