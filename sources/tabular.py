"""Reading of csv, tsv, jsonl and parquet, plain or gzip, with errors that name the line."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from sources.lines import GZIP_ERRORS, lines, open_bytes
from stages.errors import UserError
from stages.strict import nearest

_DELIMITER = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class Columns:
    """Some columns of a table file, and where its rows stand in the file.

    Attributes:
        values: arrays of equal length by column name; text in csv, tsv and jsonl, the stored type in parquet.
        header: whether the first line of a csv or tsv file names the columns.
    """

    path: Path
    format: str
    values: dict[str, pa.ChunkedArray]
    header: bool = True

    def place(self, row: int) -> str:
        """Return "path, line N" of a row (0-based), for messages."""
        if self.format == "parquet":
            return f"{self.path}, row {row}"
        if self.format == "jsonl":
            return f"{self.path}, line {next(n for i, (n, _) in enumerate(lines(self.path)) if i == row)}"
        found = _delimited_lines(self.path, _DELIMITER[self.format])
        return f"{self.path}, line {next(n for i, (n, _) in enumerate(found) if i == row + self.header)}"


def read_columns(path: Path, format: str, names: Sequence[str], header: Sequence[str] | None = None) -> Columns:
    """Read the columns `names` of a csv, tsv, jsonl or parquet file.

    Args:
        header: the names of all columns, for a csv or tsv file whose first line is data already.

    Raises:
        UserError: absent or empty file, a column that it lacks, or a malformed line, named.
    """
    if format == "parquet":
        return Columns(path, format, _read_parquet(path, names))
    if format == "jsonl":
        rows = [row for _, row in read_rows(path, format, names)]
        columns = {name: [_text(row.get(name)) for row in rows] for name in names}
        return Columns(
            path, format, {name: pa.chunked_array([pa.array(v, pa.string())]) for name, v in columns.items()}
        )
    if next(_delimited_lines(path, _DELIMITER[format]), None) is None:
        raise UserError(f"{path}: is empty")
    found = list(header) if header else _header(path, _DELIMITER[format])
    _require(path, names, found)
    with open_bytes(path) as file:
        try:
            table = pa_csv.read_csv(
                file,
                read_options=pa_csv.ReadOptions(column_names=list(header) if header else None),
                parse_options=pa_csv.ParseOptions(delimiter=_DELIMITER[format]),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=list(names), column_types=dict.fromkeys(names, pa.string())
                ),
            )
        except (pa.ArrowInvalid, OSError, *GZIP_ERRORS) as error:
            raise _malformed(path, _DELIMITER[format], len(found), error) from None
    if not len(table):
        raise UserError(f"{path}: holds no rows, only a header")
    return Columns(path, format, {name: table.column(name) for name in names}, header=header is None)


def read_rows(path: Path, format: str, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("path, line N", row) of a table file; a row holds at least those of `names` that the line has.

    Raises:
        UserError: as `read_columns`; in jsonl a column may be absent from some rows, but not from all.
    """
    if format == "parquet":
        columns = _read_parquet(path, names)
        for number, row in enumerate(pa.table(columns).to_pylist()):
            yield f"{path}, row {number}", row
    elif format == "jsonl":
        yield from _read_jsonl(path, names)
    else:
        found = _header(path, _DELIMITER[format])
        _require(path, names, found)
        rows = _delimited_lines(path, _DELIMITER[format])
        next(rows)
        for number, values in rows:
            if len(values) != len(found):
                raise UserError(f"{path}, line {number}: has {len(values)} values where the header names {len(found)}")
            yield f"{path}, line {number}", dict(zip(found, values, strict=True))


def _read_jsonl(path: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    unseen, keys = set(names), set[str]()
    number = 0
    for number, line in lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a JSON object ({error}): {_excerpt(line)}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object: {_excerpt(line)}")
        if unseen:
            unseen.difference_update(row)
            keys.update(row)
        yield f"{path}, line {number}", row
    if not number:
        raise UserError(f"{path}: is empty")
    _require(path, sorted(unseen), keys)


def _read_parquet(path: Path, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    try:
        with pq.ParquetFile(path) as file:
            _require(path, names, file.schema_arrow.names)
            table = file.read(columns=list(dict.fromkeys(names)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error})") from None
    if not len(table):
        raise UserError(f"{path}: holds no rows")
    return {name: table.column(name) for name in names}


def _header(path: Path, delimiter: str) -> list[str]:
    first = next(_delimited_lines(path, delimiter), None)
    if first is None:
        raise UserError(f"{path}: is empty")
    names = first[1]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}, line {first[0]}: column {twice[0]!r} stands in the header twice")
    return names


def _require(path: Path, names: Sequence[str], found: Any) -> None:
    for name in names:
        if name not in found:
            raise UserError(f"{path}: has no column {name!r}{nearest(name, found)}; mend the columns in the config")


def _delimited_lines(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, values) of the lines that are not blank."""
    with open_bytes(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter)
        try:
            for values in reader:
                if values:
                    yield reader.line_num, values
        except UnicodeDecodeError:
            raise UserError(
                f"{path}, line {_first_bad_utf8(path)}: not UTF-8 text; convert the file to UTF-8"
            ) from None
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None
        except GZIP_ERRORS as error:
            raise UserError(f"{path}: damaged gzip after line {reader.line_num} ({error}); make it again") from None


def _first_bad_utf8(path: Path) -> int:
    for number, line in lines(path):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 0


def _malformed(path: Path, delimiter: str, width: int, error: Exception) -> UserError:
    for number, values in _delimited_lines(path, delimiter):
        if len(values) != width:
            shown = _excerpt(delimiter.join(values).encode())
            return UserError(f"{path}, line {number}: has {len(values)} values where {width} are expected: {shown}")
    return UserError(f"{path}: {error}")


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 80 else text[:77] + "...")
