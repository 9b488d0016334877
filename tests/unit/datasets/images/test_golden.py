"""Golden outputs of the images stage: manifest rows and shard contents for a folder of good, unusual and bad images."""

import base64
import hashlib
import struct
import zlib
from pathlib import Path

import pyarrow.parquet as pq
from golden import check_golden, digest
from oracles_sources import items_file

from cm3.common.images import iter_images
from cm3.common.stages import STAGES
from cm3.common.tables import MANIFEST, read_table
from cm3.datasets.images.config import Images
from cm3.datasets.images.stage import collect_images

# Bytes that no encoder's version changes.
GIF = base64.b64decode("R0lGODdhBQADAIAAAAAAAAAAACwAAAAABQADAAAICAABCBxIsGBAADs=")
WEBP = base64.b64decode("UklGRh4AAABXRUJQVlA4TBEAAAAvCIABAAdQwVKUp/+BiOh/AAA=")
JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62rZ4C8"
    "ybqmx5moq6T/wAALCAAHAAkBAREA/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQR"
    "BRIhMUEGE1FhByJxFDKBkaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4"
    "eXqDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/9oACAEB"
    "AAA/AK9Ff//Z"
)


def png(width: int, height: int, depth: int = 8, colour: int = 2, broken: bool = False) -> bytes:
    """Return an uncompressed PNG of one colour; a `broken` one has a wrong checksum."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ broken)

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    rows = (b"\0" + b"\x55" * (width * channels * depth // 8)) * height
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")


BMP = (
    b"BM"
    + struct.pack("<IHHI", 54 + 3 * 16, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 5, 3, 1, 24, 0, 48, 0, 0, 0, 0)
    + bytes(48)
)
FILES = {
    "grey": png(7, 5, colour=0),
    "deep": png(7, 5, depth=16, colour=0),
    "transparent": png(7, 5, colour=6),
    "again": png(7, 5, colour=0),
    "thin": png(3, 1200),
    "gif": GIF,
    "bmp": BMP,
    "jpeg": JPEG,
    "webp": WEBP,
    "blank": png(8, 8),
    "dot": png(1, 1),
    "stripe": png(2, 90),
    "large": png(70, 60, colour=0),
    "heavy": png(60, 60),
    "empty": b"",
    "page": b"<html>not found</html>",
    "cut": png(30, 30)[:1500],
    "broken": png(30, 30, broken=True),
    "portable": b"P6 4 4 255\n" + bytes(48),
}


def test_images_of_a_folder_are_golden(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / f"{name}.img").write_bytes(data)
    blank = hashlib.sha256(FILES["blank"]).hexdigest()
    limits = {"max_pixels": 4000, "max_bytes": 10_900, "placeholders": [blank]}
    spec = Images(folder=str(folder), pattern=["{item_id}.img", "{item_id:.3}.img"], **limits).spec()
    items = items_file(tmp_path / "items.parquet", {name: [] for name in [*FILES, "gifts", "absent"]})
    manifest = tmp_path / "out" / "manifest.parquet"
    facts = collect_images(spec, {"threads": 2}, items, {}, manifest, shard_bytes=3000)
    rows = read_table(manifest, MANIFEST).to_pylist()
    for row in rows:
        # Neither the folder nor the wording of a reason is a result.
        row["url"] = row["url"] and Path(row["url"]).name
        row["error"] = bool(row["error"])
    shards = sorted(manifest.parent.glob("shard-*.parquet"))
    outputs = {
        "statuses": {row["item_id"]: row["status"] for row in rows},
        "rows": {row["item_id"]: digest(row) for row in rows},
        "shards": [digest(pq.read_table(path).column("sha256").to_pylist()) for path in shards],
        "bytes": digest({item: hashlib.sha256(data).hexdigest() for item, data in iter_images(manifest)}),
        "counts": {name: facts[name] for name in ("images_ok", "images_missing", "images_failed", "distinct_images")},
        "kinds": facts["reasons"],
    }
    check_golden("images", STAGES["images"].version, outputs)
