"""Readers of csv, tsv, jsonl and parquet tables, plain or gzip; errors name the line."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from cm3.common.errors import UserError
from cm3.common.ids import LONE_SURROGATE, id_text
from cm3.common.input_files import check_readable
from cm3.common.strict import nearest
from cm3.common.values import first_valid, python_value, shown
from cm3.datasets.download.gzip import GZIP_ERRORS
from cm3.datasets.files.delimited import Dialect, QuoteCounter, check_quotes, delimited_lines
from cm3.datasets.files.lines import lines, open_bytes
from cm3.datasets.text import is_unicode

DELIMITER = {"csv": ",", "tsv": "\t"}
"""Default delimiter by format."""
PART_ROWS, PART_BYTES = 1 << 18, 1 << 24
"""Rows (jsonl, parquet) or bytes (csv, tsv) of a part of a table."""

_NESTED = (
    "is of type {}, where text is expected; store the text in a column of its own and name that, and for a column of images "
    "set images: {{embedded: true}}"
)


@dataclass(frozen=True)
class Columns:
    """Columns of consecutive rows of a table file, with their position in the file.

    Attributes:
        values: arrays of equal length by column name; text for csv, tsv and jsonl, the stored type for parquet.
        first: number of rows in the file before these.
    """

    path: Path
    format: str
    values: dict[str, pa.ChunkedArray]
    first: int
    dialect: Dialect | None = None

    def place(self, row: int) -> str:
        """Return "path, line N" of a row, counted from 0, for messages."""
        row += self.first
        if self.format == "parquet":
            return f"{self.path}, row {row}"
        if self.format == "jsonl":
            return next(place for i, (place, _) in enumerate(_json_objects(self.path)) if i == row)
        found = delimited_lines(self.path, self.dialect or DELIMITER[self.format])
        return f"{self.path}, line {next(n for i, (n, _) in enumerate(found) if i == row + 1)}"


def read_columns(
    path: Path | Sequence[Path],
    format: str,
    names: Sequence[str],
    ids: Sequence[str] = (),
    dialect: Dialect | None = None,
) -> Iterator[Columns]:
    """Yield the columns `names` of a csv, tsv, jsonl or parquet file in parts of bounded size.

    Args:
        path: the file, or several that are read one after the other.
        format: csv, tsv, jsonl or parquet.
        names: columns to read.
        ids: those of `names` that hold ids, which are normalised in jsonl (null: a missing id).
        dialect: how a csv or tsv file is written; by default as its format says.

    Raises:
        UserError: missing or empty file, missing column (in jsonl: missing in the first part), or malformed line.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    rows = 0
    for file in paths:
        for part in _columns_of(file, format, names, ids, dialect):
            rows += len(next(iter(part.values.values())))
            yield part
    if not rows:
        raise UserError(f"{paths[0]}: has no rows" + (", only a header" if format in DELIMITER else ""))


def _columns_of(
    path: Path, format: str, names: Sequence[str], ids: Sequence[str], dialect: Dialect | None
) -> Iterator[Columns]:
    if format == "parquet":
        parts = _parquet_parts(path, names)
    elif format == "jsonl":
        parts = _jsonl_parts(path, names, ids)
    else:
        dialect = dialect or Dialect(DELIMITER[format], configurable=False)
        parts = _delimited_parts(path, dialect, names)
    first = 0
    for table in parts:
        yield Columns(path, format, {name: table.column(name) for name in names}, first, dialect)
        first += len(table)


def column_names(path: Path, format: str) -> list[str]:
    """Return the names of the columns of a table file; of jsonl, the keys of its first line.

    Raises:
        UserError: the file is missing, empty or unreadable.
    """
    if format == "parquet":
        with _open_parquet(path, []) as file:
            return list(file.schema_arrow.names)
    check_readable(path)
    if format == "jsonl":
        return list(next(_read_jsonl(path, []))[1])
    return _header(path, Dialect(DELIMITER[format], configurable=False), [])


def _parquet_parts(path: Path, names: Sequence[str]) -> Iterator[pa.Table]:
    with _open_parquet(path, names) as file:
        try:
            for batch in file.iter_batches(PART_ROWS, columns=list(names)):
                yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            raise _unreadable_parquet(path, error) from None


def _jsonl_parts(path: Path, names: Sequence[str], ids: Sequence[str]) -> Iterator[pa.Table]:
    rows = _read_jsonl(path, names)
    first = 0
    while part := list(itertools.islice(rows, PART_ROWS)):
        if not first:
            _require(path, names, set().union(*(row for _, row in part)))
        columns = {name: _texts(part, name, id_text if name in ids else _text) for name in names}
        try:
            yield pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        except UnicodeEncodeError:
            raise _not_unicode(Columns(path, "jsonl", {}, first), columns) from None
        first += len(part)


def _texts(
    rows: Sequence[tuple[str, dict[str, Any]]], name: str, text_of: Callable[[Any], str | None]
) -> list[str | None]:
    texts = []
    for place, row in rows:
        value = row.get(name)
        try:
            texts.append(text_of(value))
        except ValueError as error:
            raise UserError(f"{place}: {name} = {shown(value)} {error}") from None
    return texts


def _not_unicode(part: Columns, columns: dict[str, list[str | None]]) -> UserError:
    row, name, value = min(
        (row, name, value)
        for name, values in columns.items()
        for row, value in enumerate(values)
        if value is not None and not is_unicode(value)
    )
    return UserError(f"{part.place(row)}: {name} = {value!r} {LONE_SURROGATE}")


def _delimited_parts(path: Path, dialect: Dialect, names: Sequence[str]) -> Iterator[pa.Table]:
    found = _header(path, dialect, names)
    rows = 1
    with dialect.open(path) as file:
        counter = QuoteCounter(file)
        try:
            with pa_csv.open_csv(
                counter,
                read_options=pa_csv.ReadOptions(block_size=PART_BYTES),
                parse_options=pa_csv.ParseOptions(delimiter=dialect.delimiter, newlines_in_values=True),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=list(names), column_types=dict.fromkeys(names, pa.string())
                ),
            ) as batches:
                for batch in batches:
                    rows += len(batch)
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError, *GZIP_ERRORS) as error:
            raise _malformed(path, dialect, len(found), error) from None
    check_quotes(path, dialect, rows, counter.quotes)


def read_rows(
    path: Path | Sequence[Path], format: str, names: Sequence[str], dialect: Dialect | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("path, line N", row) of a table file, or of several; a row has at least those of `names` that the line has.

    Raises:
        UserError: as `read_columns`; in jsonl a column may be missing in some rows, but not in all.
    """
    if format == "parquet":
        for part in read_columns(path, format, names):
            for name, values in part.values.items():
                if (row := first_valid(values)) is not None and _holds_objects(values.type):
                    value = shown(python_value(values, row))
                    raise UserError(f"{part.place(row)}: {name} = {value} {_NESTED.format(_short(values.type))}")
            for number, cells in enumerate(_python_rows(part), part.first):
                yield f"{part.path}, row {number}", cells
        return
    for file in [path] if isinstance(path, Path) else path:
        if format == "jsonl":
            yield from _read_jsonl(file, names)
        else:
            yield from _delimited_rows(file, dialect or Dialect(DELIMITER[format], configurable=False), names)


def _delimited_rows(path: Path, dialect: Dialect, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    found = _header(path, dialect, names)
    rows = delimited_lines(path, dialect)
    next(rows)
    for number, values in rows:
        if len(values) != len(found):
            raise UserError(f"{path}, line {number}: has {len(values)} values, the header has {len(found)}")
        yield f"{path}, line {number}", dict(zip(found, values, strict=True))


def _python_rows(part: Columns) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pa.table(part.values).to_pylist()
        return rows
    except ValueError:  # text that is not UTF-8, or a time that Python does not have
        for row in range(len(next(iter(part.values.values())))):
            for name, values in part.values.items():
                try:
                    values[row].as_py()
                except ValueError as error:
                    raise UserError(f"{part.place(row)}: {name} cannot be read ({error}); store it as text") from None
        raise


def _holds_objects(kind: pa.DataType) -> bool:
    """Return whether a column holds structs, maps or unions, also within lists."""
    if isinstance(kind, pa.BaseExtensionType):
        return _holds_objects(kind.storage_type)
    if pa.types.is_struct(kind) or pa.types.is_map(kind) or pa.types.is_union(kind):
        return True
    return bool(pa.types.is_nested(kind) and _holds_objects(kind.value_type))


def _short(kind: pa.DataType) -> str:
    return shown(str(kind)).strip("'\"")


def _read_jsonl(path: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    unseen, keys = set(names), set[str]()
    place = ""
    for place, row in _json_objects(path):
        if unseen:
            unseen.difference_update(row)
            keys.update(row)
        yield place, row
    if not place:
        raise UserError(f"{path}: is empty")
    _require(path, sorted(unseen), keys)


def _json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) of a file with an object on each line, or with one array of objects.

    Raises:
        UserError: a line or entry is not an object.
    """
    array = _json_array(path)
    for n, row in enumerate(array or (), 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, entry {n}: not a JSON object: {_excerpt(json.dumps(row).encode())}")
        yield f"{path}, entry {n}", row
    if array is not None:
        return
    for number, line in lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object ({error}): {_excerpt(line)}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object: {_excerpt(line)}")
        yield f"{path}, line {number}", row


def _json_array(path: Path) -> list[Any] | None:
    """Return the entries of a file that holds one JSON array; None if its first line does not begin one of objects."""
    with open_bytes(path) as file:
        try:
            if not re.match(rb"(\xef\xbb\xbf)?\s*\[\s*(\{|\]|$)", file.read(1 << 12)):
                return None
            file.seek(0)
            found = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError, *GZIP_ERRORS):
            return None  # reported with its line
    return found if isinstance(found, list) else None


def _open_parquet(path: Path, names: Sequence[str]) -> pq.ParquetFile:
    check_readable(path)
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable_parquet(path, error) from None
    found = file.schema_arrow.names
    _require(path, names, found)
    twice = [name for name in names if found.count(name) > 1]
    if twice:
        raise UserError(f"{path}: duplicate column {twice[0]!r}; rename one of them")
    return file


def _unreadable_parquet(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable Parquet file ({error})")


def _header(path: Path, dialect: Dialect, names: Sequence[str]) -> list[str]:
    """Return the names of the columns. Raises UserError if they lack one of `names`, or have one twice."""
    first = next(delimited_lines(path, dialect), None)
    if first is None:
        raise UserError(f"{path}: is empty")
    found = first[1]
    if dialect.configurable and not set(names) & set(found):
        _check_layout(path, dialect, found)
    # Spreadsheets write empty columns without names.
    twice = sorted({name for name in found if name and found.count(name) > 1})
    if twice:
        raise UserError(f"{path}, line {first[0]}: duplicate column {twice[0]!r} in the header")
    _require(path, names, found)
    return found


_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


def _check_layout(path: Path, dialect: Dialect, found: Sequence[str]) -> None:
    """Raise UserError with the key to set if a first row without any wanted name shows another delimiter or no header."""
    if found and found[0].startswith("sep="):
        raise UserError(
            f"{path}: its first line, {_excerpt(dialect.delimiter.join(found).encode())}, is a note of Excel on the delimiter; "
            f"remove it, and set delimiter: {json.dumps(found[0].removeprefix('sep=') or dialect.delimiter)} next to path"
        )
    other = next((mark for mark in ";\t|," if len(found) == 1 and mark != dialect.delimiter and mark in found[0]), None)
    if other:
        raise UserError(
            f"{path}: its first line is one column, {_excerpt(found[0].encode())}; if the columns are separated by {other!r}, "
            f"set delimiter: {json.dumps(other)} next to path"
        )
    if not dialect.header and any(_NUMBER.fullmatch(cell) for cell in found):
        raise UserError(
            f"{path}: its first line holds values, not the names of columns: {_excerpt(dialect.delimiter.join(found).encode())}; "
            f"set header to the names of its {len(found)} columns next to path, such as header: [user, item, rating]"
        )


def _require(path: Path, names: Sequence[str], found: Any) -> None:
    for name in names:
        if name not in found:
            raise UserError(
                f"{path}: has no column {name!r}{nearest(name, found)}; fix the column names in the configuration"
            )


def _malformed(path: Path, dialect: Dialect, width: int, error: Exception) -> UserError:
    for number, values in delimited_lines(path, dialect):
        if len(values) != width:
            shown = _excerpt(dialect.delimiter.join(values).encode())
            return UserError(f"{path}, line {number}: has {len(values)} values, the header has {width}: {shown}")
    return UserError(f"{path}: {error}")


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 80 else text[:77] + "...")
