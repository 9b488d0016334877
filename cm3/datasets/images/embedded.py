"""Image source `embedded`: images inside a column of the item table, as bytes or as Hugging Face's {bytes, path}."""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cm3.common.errors import UserError
from cm3.common.http import one_line
from cm3.common.ids import id_column
from cm3.common.image_decode import UnreadableError
from cm3.common.input_files import check_readable, parts_in
from cm3.common.strict import nearest
from cm3.common.tables import FAILED, MISSING, OK
from cm3.common.values import InvalidValueError, is_binary
from cm3.datasets.images.source import Found, Search
from cm3.datasets.images.validate import PlaceholderError, examine

_ROWS = 16
_NONE = Found("", MISSING, ("the item table holds no image",), ("the item table holds no image",))
_BYTES = "bytes"


def find(search: Search) -> Iterator[Found]:
    """Yield each item's image: the first of its columns, or of a list in one, whose bytes decode.

    The table is read once, in its own order; images wait in a temporary file for their items.

    Raises:
        UserError: a column is missing, or holds no images.
    """
    wanted = {item.item_id for item in search.wanted}
    with tempfile.TemporaryFile(dir=search.folder) as file:
        places: dict[str, tuple[Found, int]] = {}
        with ThreadPoolExecutor(search.runtime.get("threads")) as pool:
            for item_ids, images, path in _rows(search):
                known = {item_id: row for row, item_id in enumerate(item_ids) if item_id in wanted}
                tries = partial(_first, path=path, spec=search.spec)
                for item_id, image in zip(known, pool.map(tries, [images[row] for row in known.values()]), strict=True):
                    places[item_id] = _without_data(image, file)
        for item in search.wanted:
            image, start = places.get(item.item_id, (_NONE, 0))
            yield _with_data(image, start, file)


def _without_data(found: Found, file: BinaryIO) -> tuple[Found, int]:
    """Append the bytes of an image, and their number before them, to a file; return the image without them, and the place."""
    start = file.seek(0, 2)
    file.write(len(found.data).to_bytes(8) + found.data)
    return replace(found, data=b""), start


def _with_data(found: Found, start: int, file: BinaryIO) -> Found:
    if found.status != OK:
        return found
    file.seek(start)
    return replace(found, data=file.read(int.from_bytes(file.read(8))))


def _rows(search: Search) -> Iterator[tuple[list[str], list[list[Any]], Path]]:
    """Yield (item ids, the values of the image columns of each item, file) of some rows."""
    key, columns = search.spec["item_id"], search.spec["columns"]
    for path in parts_in(search.inputs, "table"):
        check_readable(path)
        try:
            with pq.ParquetFile(path) as file:
                _check_columns(path, file.schema_arrow, key, columns)
                for batch in file.iter_batches(_ROWS, columns=[key, *columns]):
                    yield _ids(path, batch.column(key)), _values(batch, columns), path
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error})") from None


def _check_columns(path: Path, schema: pa.Schema, key: str, columns: Sequence[str]) -> None:
    for name in (key, *columns):
        if name not in schema.names:
            raise UserError(f"{path}: has no column {name!r}{nearest(name, schema.names)}")
    for name in columns:
        kind = schema.field(name).type
        if not holds_images(kind):
            raise UserError(
                f"{path}: column {name!r} is of type {kind}; images.embedded needs bytes, or structs with a field `bytes`"
            )


def holds_images(kind: pa.DataType) -> bool:
    """Return whether a column holds bytes, structs with a field `bytes`, or lists of these."""
    if isinstance(kind, pa.BaseExtensionType):
        return holds_images(kind.storage_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index(_BYTES) >= 0 and bool(is_binary(kind.field(_BYTES).type))
    if is_binary(kind):
        return True
    return bool(pa.types.is_nested(kind) and not pa.types.is_map(kind) and holds_images(kind.value_type))


def _ids(path: Path, values: pa.Array) -> list[str]:
    try:
        ids: list[str] = id_column(values)[0].to_pylist()
        return ids
    except InvalidValueError as error:
        raise UserError(f"{path}: item id {error.value!r} {error.reason}") from None


def _values(batch: pa.RecordBatch, columns: Sequence[str]) -> list[list[Any]]:
    rows = zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
    return [[value for cell in row for value in (cell if isinstance(cell, list) else [cell])] for row in rows]


def _first(values: Sequence[Any], path: Path, spec: dict[str, Any]) -> Found:
    bad: list[Found] = []
    for value in values:
        data = value.get(_BYTES) if isinstance(value, dict) else value
        if not data:
            continue
        name = value.get("path") if isinstance(value, dict) else None
        found = _examined(data, f"{path}:{name}" if isinstance(name, str) and name else str(path), spec)
        if found.status == OK:
            return found
        bad.append(found)
    return min(bad, key=lambda found: found.status != FAILED, default=_NONE)


def _examined(data: bytes, place: str, spec: dict[str, Any]) -> Found:
    if len(data) > spec["max_bytes"]:
        reason = f"more than the {spec['max_bytes']} bytes allowed"
        return Found(place, FAILED, (reason,), ("too many bytes",))
    try:
        return Found(place, OK, (), (), examine(data, spec["max_pixels"], spec["placeholders"]), data)
    except UnreadableError as error:
        status = MISSING if isinstance(error, PlaceholderError) else FAILED
        return Found(place, status, (one_line(str(error)),), (error.kind,))
