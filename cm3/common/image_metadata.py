"""Image files without their metadata: only the parts that decide the pixels, with EXIF and XMP set aside.

Decoders stop at damaged metadata (a text over a limit, an EXIF block that is not a TIFF, a wrong checksum of a comment)
although the pixels are whole, and a file of nothing but metadata can take them minutes. They are given the pixels alone.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_MAX_TEXT = 1 << 20
"""Longest text with an orientation that is decompressed."""
_MAX_XMP_SEARCH = 1 << 20

MAX_PARTS = 500_000
"""Segments of a JPEG, chunks of a PNG or WebP, blocks of a GIF before its image."""
MAX_TILES = 100_000
"""Strips or tiles of a TIFF."""

ORIENTATION = 0x0112
_EXIF_PREFIX = re.compile(rb"(?:Exif\0\0){1,2}")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_TIFF_ORDERS = {b"MM\0*": ">", b"II*\0": "<", b"MM*\0": ">", b"II\0*": "<"}  # the last two are wrong but known
_INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L"}  # TIFF types with struct's letters

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset({b"tRNS"})  # and all chunks that the standard calls critical
_XMP_KEYWORD, _RAW_EXIF_KEYWORD = b"XML:com.adobe.xmp", b"Raw profile type exif"

_WEBP_METADATA = frozenset({b"EXIF", b"XMP ", b"ICCP"})
_WEBP_METADATA_FLAGS = 0b00101100  # ICC profile, EXIF, XMP

# Scan data of a JPEG: 0xFF is followed by 0 or is a restart marker; everything else ends the scan.
_JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_JPEG_EXIF, _JPEG_XMP, _JPEG_MPF = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0"
_JPEG_GAIN_MAP = b' hdrgm:Version="'
# Shortest JFIF and Adobe segments that Pillow can read. libjpeg ignores shorter ones, and needs the others for the colours.
_JFIF_LENGTH, _ADOBE_LENGTH = 7, 12

_AVIF_EXIF = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)

# Tags of a TIFF that decide its pixels: size, layout, compression, colours, orientation.
_TIFF_KEPT = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325}
    | {332, 334, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532}
)


class TooManyPartsError(Exception):
    """A file of so many parts that they take longer to read than the pixels."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """An image file without metadata.

    Attributes:
        data: the file to decode.
        exif, xmp: metadata that may hold the orientation, where the decoder does not return them itself; else empty.
    """

    data: bytes
    exif: bytes = b""
    xmp: bytes = b""


def without_metadata(data: bytes) -> Iterator[Pixels]:
    """Yield an image file with less and less metadata: if one cannot be decoded, the next may be.

    The pixels of each are those of the file. Files of other formats, or too damaged to be parsed, are yielded unchanged.

    Raises:
        TooManyPartsError: the file has over MAX_PARTS parts or MAX_TILES strips or tiles.
    """
    if data.startswith(b"\xff\xd8\xff"):
        yield from _jpeg(data)
    elif data.startswith(_PNG):
        yield _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        yield Pixels(data)
        yield _webp(data)
    elif data[4:8] == b"ftyp":
        yield Pixels(_AVIF_EXIF.sub(rb"\1skip", data[: 1 << 16]) + data[1 << 16 :])
    elif data[:4] in _TIFF_ORDERS:
        pixels = _tiff(data)
        yield Pixels(data)
        yield Pixels(pixels)
    elif data[:4] == b"GIF8":
        _require_few_blocks(data)
        yield Pixels(data)
    else:
        yield Pixels(data)


def stated_pixels(data: bytes) -> int:
    """Return the width x height that a WebP or AVIF states, whose decoders allocate memory when they are made; else 0."""
    if data[:4] == b"RIFF" and len(data) >= 30:
        if data[12:16] == b"VP8X":
            return (1 + int.from_bytes(data[24:27], "little")) * (1 + int.from_bytes(data[27:30], "little"))
        if data[12:16] == b"VP8L":
            sides = int.from_bytes(data[21:25], "little")
            return (1 + (sides & 0x3FFF)) * (1 + (sides >> 14 & 0x3FFF))
        return (int.from_bytes(data[26:28], "little") & 0x3FFF) * (int.from_bytes(data[28:30], "little") & 0x3FFF)
    if data[4:8] == b"ftyp" and (place := data.find(b"ispe", 0, 1 << 16)) >= 0 and place + 16 <= len(data):
        return int.from_bytes(data[place + 8 : place + 12], "big") * int.from_bytes(
            data[place + 12 : place + 16], "big"
        )
    return 0


def _counted(count: int) -> int:
    if count == MAX_PARTS:
        raise TooManyPartsError(f"a file of more than the {MAX_PARTS} segments, chunks or blocks allowed")
    return count + 1


def orientation(exif: bytes, xmp: bytes) -> int:
    """Return the EXIF orientation, 1 to 8, of EXIF data or else of an XMP packet; 1 where it is unreadable."""
    found = _exif_orientation(exif)
    if found is None and (match := _XMP_ORIENTATION.search(xmp, 0, _MAX_XMP_SEARCH)):
        found = int(match[1])
    return found if found is not None and 1 <= found <= 8 else 1


def _exif_orientation(exif: bytes) -> int | None:
    if prefix := _EXIF_PREFIX.match(exif):
        exif = exif[prefix.end() :]
    order = _TIFF_ORDERS.get(exif[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "L", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHL", exif, entry)
            if tag == ORIENTATION and kind in _INTEGERS and count:
                letter = order + _INTEGERS[kind]
                inline = count * struct.calcsize(letter) <= 4
                place = entry + 8 if inline else struct.unpack_from(order + "L", exif, entry + 8)[0]
                value: int = struct.unpack_from(letter, exif, place)[0]
                return value
    except struct.error:
        pass  # the data end before the entry
    return None


def _jpeg(data: bytes) -> Iterator[Pixels]:
    kept: list[bytes] = []
    exif: list[bytes] = []
    xmp, several, gain_map, several_at = b"", b"", False, 0
    start = 0
    for marker, begin, end in _jpeg_segments(data):
        if marker == 0xDA:
            break
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            continue
        body = data[begin + 4 : end]
        if marker == 0xE1:
            gain_map = gain_map or _JPEG_GAIN_MAP in body
            if body.startswith(_JPEG_EXIF):
                exif.append(body[len(_JPEG_EXIF) :])
            elif body.startswith(_JPEG_XMP):
                xmp = body[len(_JPEG_XMP) :]
        elif marker == 0xE2 and body.startswith(_JPEG_MPF):
            several = data[begin:end]
        keep = (marker == 0xE0 and not (body[:4] == b"JFIF" and len(body) < _JFIF_LENGTH)) or (
            marker == 0xEE and not (body[:5] == b"Adobe" and len(body) < _ADOBE_LENGTH)
        )
        if not keep:
            kept.append(data[start:begin])
            start = end
            if body.startswith(_JPEG_MPF):
                several_at = len(kept)
    kept.append(data[start:])
    found = b"".join(exif), xmp
    if several and not gain_map:  # a file of several images (MPO); Pillow names the format after this segment
        yield Pixels(b"".join([*kept[:several_at], several, *kept[several_at:]]), *found)
    yield Pixels(b"".join(kept) if len(kept) > 1 else data, *found)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, begin, end) of the segments of a JPEG's first image, without scan data; stop where it makes no sense."""
    place, count = 2, 0
    while (begin := data.find(b"\xff", place)) >= 0:
        count = _counted(count)
        while data[begin + 1 : begin + 2] == b"\xff":
            begin += 1
        marker = data[begin + 1] if begin + 1 < len(data) else 0
        if marker == 0xD9:
            return
        if marker <= 1 or 0xD0 <= marker <= 0xD8:
            place = begin + 2
            if place >= len(data):
                return
            continue
        end = begin + 2 + max(2, int.from_bytes(data[begin + 2 : begin + 4], "big"))
        if end > len(data):
            return
        yield marker, begin, end
        place = end
        if marker == 0xDA:
            following = _JPEG_SCAN_END.search(data, end)
            if following is None:
                return
            place = following.start()


def jpeg_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG's first image."""
    if (most := data.count(b"\xff\xda")) <= 1:
        return most
    return sum(marker == 0xDA for marker, _, _ in _jpeg_segments(data))


def _png(data: bytes) -> Pixels:
    kept = [_PNG]
    found: dict[bytes, tuple[bytes, bytes]] = {}
    place, count, animated, pixels, ended = len(_PNG), 0, False, False, False
    while place + 8 <= len(data) and not ended:
        count = _counted(count)
        kind = data[place + 4 : place + 8]
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if not kind.isalpha():
            kept.append(data[place:])
            break
        if not kind[0] & 0x20 or kind in _PNG_KEPT:  # a capital letter: the pixels need it
            kept.append(data[place:end])
            pixels, ended = pixels or kind == b"IDAT", kind == b"IEND"
        elif kind == b"acTL":
            animated = True
        elif kind == b"fcTL" and animated and pixels:
            break  # the metadata of later frames
        elif kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and _crc_fits(data, place, end):
            body = data[place + 8 : end - 4]
            keyword = kind if kind == b"eXIf" else body[: len(_RAW_EXIF_KEYWORD) + 1].partition(b"\0")[0]
            if keyword in (b"eXIf", _RAW_EXIF_KEYWORD, _XMP_KEYWORD):
                found[keyword] = kind, body
        place = end
    xmp = _png_text(*found[_XMP_KEYWORD]) if _XMP_KEYWORD in found else b""
    if b"eXIf" in found:
        return Pixels(b"".join(kept), found[b"eXIf"][1], xmp)
    exif = _raw_profile(_png_text(*found[_RAW_EXIF_KEYWORD])) if _RAW_EXIF_KEYWORD in found else b""
    return Pixels(b"".join(kept), exif, xmp)


def _crc_fits(data: bytes, begin: int, end: int) -> bool:
    return end <= len(data) and zlib.crc32(data[begin + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def _png_text(kind: bytes, body: bytes) -> bytes:
    """Return the text of a chunk, without its keyword; empty where it cannot be read or is too long."""
    text = body.partition(b"\0")[2]
    compressed = kind == b"zTXt"
    if kind == b"iTXt":
        compressed, method, text = text[:1] != b"\0", text[1:2], text[2:]
        text = text.partition(b"\0")[2].partition(b"\0")[2]
    elif compressed:
        method, text = text[:1], text[1:]
    if not compressed:
        return text
    if method != b"\0":
        return b""
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(text, _MAX_TEXT)
    except zlib.error:
        return b""
    return b"" if inflate.unconsumed_tail else text


def _raw_profile(text: bytes) -> bytes:
    """Return the EXIF data that ImageMagick writes as text: an empty line, a name, a length, then hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _webp(data: bytes) -> Pixels:
    kept, place, count, found = [b"WEBP"], 12, 0, dict.fromkeys(_WEBP_METADATA, b"")
    while place + 8 <= len(data):
        count = _counted(count)
        kind = data[place : place + 4]
        end = place + 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        body = data[place + 8 : end]
        end += end & 1
        if kind in _WEBP_METADATA:
            found[kind] = body
        elif kind == b"VP8X" and body:
            kept += [data[place : place + 8], bytes([body[0] & ~_WEBP_METADATA_FLAGS]), data[place + 9 : end]]
        else:
            kept.append(data[place:end])
        place = end
    size = sum(map(len, kept))
    return Pixels(b"".join([b"RIFF", size.to_bytes(4, "little"), *kept]), found[b"EXIF"], found[b"XMP "])


def _tiff(data: bytes) -> bytes:
    """Return a TIFF whose first directory has only the tags of the pixels, at its place; values stay where they are."""
    order = _TIFF_ORDERS[data[:4]]
    try:
        (start,) = struct.unpack_from(order + "L", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
    except struct.error:
        return data
    if start + 2 + 12 * count > len(data):
        return data  # an entry that is cut off may be one of the pixels
    _require_few_tiles(data, order, start, count)
    entries = [data[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in _TIFF_KEPT]
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)  # no next directory
    return data[:start] + directory + data[start + len(directory) :]


def _require_few_tiles(data: bytes, order: str, start: int, entries: int) -> None:
    for entry in range(start + 2, start + 2 + 12 * entries, 12):
        tag, _, count = struct.unpack_from(order + "HHL", data, entry)
        if tag in (273, 324) and count > MAX_TILES:
            raise TooManyPartsError(f"a TIFF of {count} strips or tiles, more than the {MAX_TILES} allowed")


def _require_few_blocks(data: bytes) -> None:
    """Count the blocks of a GIF's extensions before its first image."""
    place, count = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0), 0
    while data[place : place + 1] not in (b",", b";", b""):
        count = _counted(count)
        if data[place] != 0x21:
            place += 1
            continue
        place += 2
        while place < len(data) and (size := data[place]):
            count = _counted(count)
            place += 1 + size
        place += 1
