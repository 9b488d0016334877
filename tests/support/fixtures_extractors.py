"""Small builders of the tables that extractors read: items, manifest with image shards; and images of every kind."""

import hashlib
import io
import sys
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from cm3.common.images import shard_path
from cm3.common.tables import FAILED, IMAGES, ITEMS, MANIFEST, MISSING, OK, write_table

COLOURS = {
    "red": (220, 20, 20),
    "blue": (20, 20, 220),
    "green": (20, 200, 20),
    "yellow": (230, 230, 20),
    "black": (5, 5, 5),
    "white": (250, 250, 250),
}


class CountingTokenizer:
    """A tokenizer that counts how often it gets each text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.seen: Counter[str] = Counter()

    def __call__(self, texts: Sequence[str], **options: Any) -> Any:
        self.seen.update(texts)
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def write_items(folder: Path, items: Sequence[Mapping[str, Any]]) -> Path:
    """Write items.parquet; fields that an item lacks are null, ids count up from "i0"."""
    rows = [
        dict.fromkeys(ITEMS.names) | {"item": row, "item_id": f"i{row}", "image_urls": []} | dict(item)
        for row, item in enumerate(items)
    ]
    path = folder / "items.parquet"
    write_table(path, pa.Table.from_pylist(rows, schema=ITEMS), ITEMS)
    return path


def write_images(
    folder: Path, images: Sequence[bytes | str | None], per_shard: int = 5, ids: Sequence[str] | None = None
) -> Path:
    """Write a manifest and its shards: bytes are ok, None is missing, a str is a failed image's reason."""
    ids = ids or [f"i{row}" for row in range(len(images))]
    kept = [image for image in images if isinstance(image, bytes)]
    manifest = folder / "manifest.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(kept), per_shard):
        part = kept[start : start + per_shard]
        table = pa.table({"sha256": [hashlib.sha256(one).hexdigest() for one in part], "bytes": part}, schema=IMAGES)
        pq.write_table(table, shard_path(manifest, start // per_shard), row_group_size=3)
    rows: list[dict[str, Any]] = []
    number = 0
    for item_id, image in zip(ids, images, strict=True):
        row: dict[str, Any] = dict.fromkeys(MANIFEST.names) | {"item_id": item_id}
        if isinstance(image, bytes):
            place = {"shard": number // per_shard, "row": number % per_shard}
            row |= {"status": OK, "sha256": hashlib.sha256(image).hexdigest()} | place
            number += 1
        else:
            row |= {"status": MISSING} if image is None else {"status": FAILED, "error": image}
        rows.append(row)
    write_table(manifest, pa.Table.from_pylist(rows, schema=MANIFEST), MANIFEST)
    return manifest


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shape(kind: str, colour: str, side: int = 160, seed: int = 0) -> bytes:
    """Return a JPEG of a square or a circle in a colour on a plain background, its place and size varied by seed."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), (245, 245, 245))
    middle, half = side / 2 + random.integers(-10, 11, 2), int(random.integers(side // 5, side // 3))
    box = (*(middle - half), *(middle + half))
    draw = ImageDraw.Draw(image)
    (draw.rectangle if kind == "square" else draw.ellipse)(box, fill=COLOURS[colour])
    return encoded(image, "JPEG", quality=90)


def plain(colour: str, size: tuple[int, int] = (60, 60)) -> bytes:
    """Return an image of one colour."""
    return encoded(Image.new("RGB", size, COLOURS[colour]))


def png_header(width: int, height: int) -> bytes:
    """Return a small PNG file whose header claims another size."""
    small = bytearray(encoded(Image.new("L", (1, 1))))
    small[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)


def no_room_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory run out when an extractor sends its model to the device, and not when a library does so before."""
    import torch
    import transformers

    bases: tuple[Any, ...] = (torch.nn.Module, transformers.PreTrainedModel)
    for base in bases:

        def to(self: Any, *arguments: Any, original: Any = base.to, **options: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("extractors."):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(self, *arguments, **options)

        monkeypatch.setattr(base, "to", to)
