"""Images of items, read from the output of the images stage: a manifest and shards of original bytes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.images import images_at, reading_order
from cm3.common.tables import ITEMS, MANIFEST, MISSING, OK, read_table
from extractors.runtime.cache import DIGEST
from extractors.runtime.source import Source


def image_of(item: Mapping[str, Any]) -> bytes | None:
    """Return the bytes of an item's `image`, which may be bytes or the path of a file; None without one."""
    image = item.get("image", item.get("picture"))
    return Path(image).read_bytes() if isinstance(image, (str, Path)) else image


def read_images(items: Path, manifest: Path) -> Source[bytes]:
    """Return the images of a manifest as inputs, in the order of items, equal images one after another.

    Raises:
        UserError: the manifest is of other items.
    """
    ids: list[str] = read_table(items, ITEMS, ["item_id"]).column("item_id").to_pylist()
    table = read_table(manifest, MANIFEST)
    if table.column("item_id").to_pylist() != ids:
        raise UserError(f"{manifest}: its item ids are not those of {items}; delete it and run again")
    status = np.asarray(table.column("status").to_pylist(), dtype=object)
    rows = np.flatnonzero(status == OK)
    shard, place = (table.column(name).fill_null(-1).to_numpy() for name in ("shard", "row"))
    errors = table.column("error").to_pylist()
    names: list[str] = table.column("sha256").to_pylist()
    digests = (bytes.fromhex(sha256) if state == OK else None for sha256, state in zip(names, status, strict=True))
    return Source(
        item_ids=ids,
        status=status,
        rows=rows[reading_order(shard[rows], place[rows])],
        stream=lambda wanted: _stream(manifest, wanted, shard[wanted], place[wanted], [names[row] for row in wanted]),
        digests=pa.array(digests, DIGEST),
        errors={
            row: errors[row] or "the image could not be fetched"
            for row in range(len(ids))
            if status[row] not in (OK, MISSING)
        },
    )


def _stream(
    manifest: Path, wanted: np.ndarray, shard: np.ndarray, place: np.ndarray, digests: list[str]
) -> Iterator[bytes]:
    for row, (item, data) in zip(wanted, images_at(manifest, wanted, shard, place, digests), strict=True):
        if item != row:
            raise UserError(f"{manifest}: does not match the image shards; delete the images folder and run again")
        yield data
