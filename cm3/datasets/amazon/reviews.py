"""Readers of Amazon interactions: reviews in JSON lines and CSV tables of ratings."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from cm3.common.errors import UserError
from cm3.datasets.download.gzip import GZIP_ERRORS
from cm3.datasets.files.lines import line_blocks, open_bytes
from cm3.datasets.reader import MalformedLines, interaction_table
from cm3.datasets.text import is_unicode
from cm3.datasets.times import plausible, seconds_of

_CSV_BLOCK = 8 << 20
_LARGEST_RATING = float(np.finfo(np.float32).max)


class Names(NamedTuple):
    """Field names of the four values of an interaction."""

    user: str
    item: str
    rating: str
    timestamp: str


def read_reviews(path: Path, names: Names, malformed: float, notes: dict[str, int]) -> Iterator[pa.Table]:
    """Yield the interactions of a file of reviews, one JSON object per line, plain or gzip.

    Ids must be non-empty texts, ratings finite numbers, times Unix seconds or milliseconds; other lines are skipped and
    counted in `notes`.

    Raises:
        UserError: a larger fraction of malformed lines than `malformed`, or a damaged file.
    """
    faults, count = MalformedLines(path, malformed), 0
    for first, block in line_blocks(path):
        count += len(block)
        table = _quick(block, names)
        yield table if table is not None else _line_by_line(first, block, names, faults)
    notes |= faults.check(count)


def _quick(block: Sequence[bytes], names: Names) -> pa.Table | None:
    """Return the rows of a block in which every line is valid, else None."""
    try:
        reviews = [orjson.loads(line) for line in block]
        user, item, rating, time = (pa.array([review[name] for review in reviews]) for name in names)
    except (ValueError, KeyError, TypeError, OverflowError, pa.ArrowException):
        return None
    if not (user.type == item.type == pa.string() and pa.types.is_integer(time.type)):
        return None
    if not (pa.types.is_floating(rating.type) or pa.types.is_integer(rating.type)):
        return None
    if user.null_count or item.null_count or rating.null_count or time.null_count:
        return None
    ratings, times = rating.cast(pa.float32(), safe=False), seconds_of(time.to_numpy())
    empty = pc.any(pc.or_(pc.equal(user, ""), pc.equal(item, ""))).as_py()
    if empty or not np.isfinite(ratings.to_numpy()).all() or not plausible(times).all():
        return None
    return interaction_table(user, item, ratings, pa.array(times))


def _line_by_line(first: int, block: Sequence[bytes], names: Names, faults: MalformedLines) -> pa.Table:
    kept: list[tuple[str, str, float, int]] = []
    for number, line in enumerate(block, first):
        if not line.strip():
            continue
        try:
            kept.append(_interaction(line, names))
        except ValueError as error:
            faults.add(number, str(error), line)
    user, item, rating, time = zip(*kept, strict=True) if kept else ((), (), (), ())
    return interaction_table(pa.array(user, pa.string()), pa.array(item, pa.string()), pa.array(rating), pa.array(time))


def _interaction(line: bytes, names: Names) -> tuple[str, str, float, int]:
    """Return (user, item, rating, Unix seconds). Raises ValueError with the reason."""
    try:
        review = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(review, dict):
        raise ValueError("not a JSON object")
    return values_of(review, names)


def values_of(review: dict[str, Any], names: Names) -> tuple[str, str, float, int]:
    """Return (user, item, rating, Unix seconds) of a review. Raises ValueError with the reason if one is invalid."""
    for name in (names.user, names.item):
        value = review.get(name)
        if not isinstance(value, str) or not value or not is_unicode(value):
            raise ValueError(f"{name} is no id")
    rating, time = _number(review.get(names.rating)), _number(review.get(names.timestamp))
    if not abs(rating) < _LARGEST_RATING:
        raise ValueError(f"{names.rating} is no finite number")
    seconds = seconds_of(np.asarray([time]))
    if not plausible(seconds)[0]:
        raise ValueError(f"{names.timestamp} is no time")
    return review[names.user], review[names.item], rating, int(seconds[0])


def _number(value: Any) -> float:
    if isinstance(value, bool):
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def read_ratings(
    path: Path,
    names: Names,
    malformed: float,
    notes: dict[str, int],
    header: Sequence[str] | None = None,
    split: int | None = None,
) -> Iterator[pa.Table]:
    """Yield the interactions of a csv file of ratings, plain or gzip; malformed lines as in `read_reviews`.

    Args:
        header: names of all columns, for a file without header line.
        split: the published label of all interactions in the file: 0, 1 or 2.

    Raises:
        UserError: too many malformed lines, a missing column, or a damaged file.
    """
    faults, count = MalformedLines(path, malformed), 0
    skipped: list[int] = []

    def refuse(row: Any) -> str:
        faults.add(row.number, f"{row.actual_columns} values, not {row.expected_columns}", row.text.encode())
        skipped.append(row.number)
        return "skip"

    with open_bytes(path) as file:
        try:
            found = pa_csv.open_csv(
                file,
                # One thread, because the handler needs line numbers.
                read_options=pa_csv.ReadOptions(
                    column_names=list(header) if header else None, block_size=_CSV_BLOCK, use_threads=False
                ),
                # No quotes: an unclosed quote would include the following lines.
                parse_options=pa_csv.ParseOptions(quote_char=False, invalid_row_handler=refuse),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=list(names), column_types=dict.fromkeys(names, pa.binary())
                ),
            )
            for batch in found:
                yield _rated(batch, faults, split, partial(_line, skipped, count + (1 if header else 2)))
                count += len(batch)
        except pa.ArrowKeyError as error:
            raise UserError(f"{path}: {error}; is it the right file?") from None
        except pa.ArrowInvalid as error:
            if "Empty CSV" not in str(error):
                raise UserError(f"{path}: not a table of ratings ({error})") from None
        except GZIP_ERRORS as error:
            raise UserError(f"{path}: damaged gzip after line {count} ({error}); download the file again") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read to its end ({error}); download the file again") from None
    notes |= faults.check(count + len(skipped))


def _line(skipped: Sequence[int], first: int, row: int) -> int:
    """Return the line number of row `first` + `row`; row numbers do not count the skipped lines."""
    row += first
    return row + bisect_right(range(len(skipped)), row, key=lambda place: skipped[place] - place)


def _rated(batch: pa.RecordBatch, faults: MalformedLines, split: int | None, line: Callable[[int], int]) -> pa.Table:
    user, item = (_texts(batch.column(place)) for place in (0, 1))
    rating, time = (_numbers(batch.column(place)) for place in (2, 3))
    with np.errstate(over="ignore"):
        ratings = rating.astype(np.float32)
    seconds = seconds_of(time)
    no_id = pc.or_(pc.equal(user, ""), pc.equal(item, "")).to_numpy(zero_copy_only=False)
    wrong = {
        "an id is empty": no_id,
        f"{batch.schema.names[2]} is no finite number": ~np.isfinite(ratings),
        f"{batch.schema.names[3]} is no time": ~plausible(seconds),
    }
    bad = np.zeros(len(batch), dtype=bool)
    for reason, mask in wrong.items():
        for row in np.flatnonzero(mask & ~bad):
            faults.add(line(int(row)), reason, b",".join(column[row].as_py() or b"" for column in batch.columns))
        bad |= mask
    table = interaction_table(user, item, pa.array(ratings), pa.array(seconds), split)
    return table.filter(pa.array(~bad)) if bad.any() else table


def _texts(values: pa.Array) -> pa.Array:
    values = pc.fill_null(values, b"")
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([value.decode(errors="replace") for value in values.to_pylist()], pa.string())


def _numbers(values: pa.Array) -> np.ndarray:
    """Return (N,) float64, NaN where a value is not a number."""
    try:
        found: np.ndarray = values.cast(pa.string()).cast(pa.float64()).to_numpy(zero_copy_only=False)
        return found
    except pa.ArrowInvalid:
        return np.asarray([_number(v) for v in values.to_pylist()], dtype=np.float64)
