"""Reader of MicroLens: pairs of user and video, titles, categories, URLs of covers.

The formats are those in the authors' repository (westlake-repl/MicroLens) and in third-party code; the files themselves
were not available when this was written. pairs.csv has the header user,item,timestamp, with times in milliseconds;
pairs.tsv has a user, a tab and the user's videos separated by spaces, in time order. Titles are `item,title`, with a header
and quotes in 50k and without a header in 100k, where titles with commas may lack quotes; both are read. Covers are
{item}.jpg in MicroLens-{size}_covers/, on the web and in the zip of that name. In the features of 100k, row i belongs to
video i + 1, as in the authors' script for video features (video_feature_extraction_(from_lmdb).py) and, for the other
features, in third-party code.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from cm3.datasets.files.lines import line_blocks, lines
from cm3.datasets.reader import Item, MalformedLines, interaction_table
from cm3.datasets.text import plain_text

_HEADER = ("user", "item", "timestamp")
_TIMES = (0, 4_102_444_800_000)
"""Milliseconds: 1970 to 2099."""
_BATCH = 10_000


class Reader:
    """Reads `microlens` datasets. Inputs: csv or tsv, titles, optionally categories."""

    def __init__(self, spec: dict[str, Any], inputs: dict[str, Path]) -> None:
        self.spec, self.inputs = spec, inputs
        self.notes: dict[str, int] = {}

    def interactions(self) -> Iterator[pa.Table]:
        """Yield the pairs, from csv with times in Unix seconds, from tsv without times.

        Raises:
            UserError: a larger fraction of malformed lines than `malformed`.
        """
        kind = self.spec["interactions"]
        read = _pairs_with_time if kind == "csv" else _pairs_by_user
        yield from read(self.inputs[kind], self.spec["malformed"], self.notes)

    def known_items(self) -> Iterator[list[str]]:
        """Yield the ids of the titles in batches."""
        batch: list[str] = []
        for item_id, _ in self._read("titles"):
            batch.append(item_id)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        yield batch

    def items(self, wanted: set[str]) -> dict[str, Item]:
        """Return titles, categories and cover URLs; a video without title still has a cover."""
        titles = {item_id: text for item_id, text in self._read("titles") if item_id in wanted}
        categories = {}
        if "categories" in self.inputs:
            categories = {item_id: text for item_id, text in self._read("categories") if item_id in wanted}
        return {
            item_id: Item(
                title=titles.get(item_id, ""),
                categories=[text for text in [categories.get(item_id, "")] if text],
                image_urls=[f"{folder}/{item_id}.jpg" for folder in self.spec["covers"]] if _is_id(item_id) else [],
            )
            for item_id in wanted
        }

    def _read(self, kind: str) -> Iterator[tuple[str, str]]:
        """Yield (id, plain text) of a table of ids and texts; lines without id are skipped and counted."""
        path = self.inputs[kind]
        faults, count = MalformedLines(path, self.spec["malformed"]), 0
        item_id, text = "", ""
        for number, line in lines(path):
            count += 1
            decoded = line.decode(errors="replace").removeprefix("\ufeff")
            first, comma, rest = decoded.partition(",")
            if comma and _is_id(first.strip().strip('"')):
                if item_id:
                    yield item_id, plain_text(_unquoted(text))
                item_id, text = first.strip().strip('"'), rest
            elif item_id and text.lstrip().startswith('"') and text.count('"') % 2:
                text += " " + decoded  # a quoted text may continue on the next line
            elif number > 1 or first.strip('"') != "item":
                faults.add(number, "is not an id, a comma and a text", line)
        if item_id:
            yield item_id, plain_text(_unquoted(text))
        self.notes |= {f"{kind}: {reason}": n for reason, n in faults.check(count).items()}


def _pairs_with_time(path: Path, malformed: float, notes: dict[str, int]) -> Iterator[pa.Table]:
    faults, count = MalformedLines(path, malformed), 0
    for first, block in line_blocks(path):
        if first == 1 and block[0].removeprefix(b"\xef\xbb\xbf").strip() == ",".join(_HEADER).encode():
            first, block = 2, block[1:]
        filled = [(number, line) for number, line in enumerate(block, first) if line.strip()]
        count += len(filled)
        yield _table(*(_quick(filled) or _line_by_line(filled, faults)))
    notes |= faults.check(count)


def _quick(found: Sequence[tuple[int, bytes]]) -> tuple[np.ndarray, ...] | None:
    """Return users, items and milliseconds if all lines are valid, else None."""
    try:
        table = pa_csv.read_csv(
            io.BytesIO(b"\n".join(line for _, line in found)),
            read_options=pa_csv.ReadOptions(column_names=_HEADER, use_threads=False),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(_HEADER, pa.int64()), null_values=[]),
        )
    except pa.ArrowInvalid:
        return None
    user, item, time = (column.to_numpy() for column in table.columns)
    good = (user >= 0).all() and (item >= 0).all() and ((time > _TIMES[0]) & (time < _TIMES[1])).all()
    return (user, item, time) if good and len(time) == len(found) else None


def _line_by_line(found: Sequence[tuple[int, bytes]], faults: MalformedLines) -> tuple[np.ndarray, ...]:
    kept = []
    for number, line in found:
        values = line.strip().split(b",")
        if len(values) != len(_HEADER):
            faults.add(number, "is not user,item,timestamp", line)
        elif not all(value.isdigit() and len(value) <= 18 for value in values):
            faults.add(number, "a value is not a number", line)
        elif not _TIMES[0] < int(values[2]) < _TIMES[1]:
            faults.add(number, "the time is not in milliseconds", line)
        else:
            kept.append([int(value) for value in values])
    return tuple(np.asarray(kept, np.int64).reshape(-1, 3).T)


def _table(user: np.ndarray, item: np.ndarray, milliseconds: np.ndarray) -> pa.Table:
    text = pa.string()
    return interaction_table(
        pa.array(user).cast(text), pa.array(item).cast(text), timestamp=pa.array(milliseconds // 1000)
    )


def _pairs_by_user(path: Path, malformed: float, notes: dict[str, int]) -> Iterator[pa.Table]:
    faults, count = MalformedLines(path, malformed), 0
    for first, block in line_blocks(path):
        users: list[str] = []
        items: list[str] = []
        for number, line in enumerate(block, first):
            if not line.strip():
                continue
            count += 1
            user, tab, rest = line.strip().decode(errors="replace").removeprefix("\ufeff").partition("\t")
            videos = rest.split()
            if not (tab and _is_id(user) and videos and all(map(_is_id, videos))):
                faults.add(number, "is not a user, a tab and videos with blanks between", line)
                continue
            users += [user] * len(videos)
            items += videos
        yield interaction_table(pa.array(users, pa.string()), pa.array(items, pa.string()))
    notes |= faults.check(count)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


def _unquoted(text: str) -> str:
    """Return a csv field that extends to the end of the line, unchanged if it is not properly quoted."""
    if not text.lstrip().startswith('"'):
        return text
    fields = next(csv.reader([text], skipinitialspace=True), [])
    return fields[0] if len(fields) == 1 else text
