"""Reader of the Amazon 2014 files: reviews or ratings, and metadata whose lines are Python literals."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sources.columns import encode_ids, parse_ratings, parse_times
from sources.reading import Interactions, Item, lines
from sources.tabular import read_columns
from sources.text import clean
from stages.errors import UserError

_RATINGS_HEADER = ("user", "item", "rating", "timestamp")
_ASIN = re.compile(rb"""["']asin["']\s*:\s*["']([^"'\\]+)["']""")
_REVIEW_KEYS = ("reviewerID", "asin", "overall", "unixReviewTime")


class Reader:
    """Reads `amazon-2014` data sets. Spec: interactions, "ratings" (csv) or "reviews" (JSON lines)."""

    def __init__(self, spec: dict[str, Any], inputs: dict[str, Path]) -> None:
        self.spec, self.inputs = spec, inputs
        self.notes: dict[str, int] = {}

    def interactions(self) -> Interactions:
        """Read ratings_X.csv (user, item, rating, time; no header) or reviews_X_5.json.gz.

        Raises:
            UserError: a malformed line, with its number.
        """
        path = self.inputs["reviews"]
        if self.spec["interactions"] == "reviews":
            return _read_reviews(path)
        table = read_columns(path, "csv", _RATINGS_HEADER, header=_RATINGS_HEADER)
        user, user_ids = encode_ids(table, "user")
        item, item_ids = encode_ids(table, "item")
        return Interactions(
            user, item, user_ids, item_ids, parse_ratings(table, "rating"), parse_times(table, "timestamp")
        )

    def known_items(self) -> set[str] | None:
        """Return the ASINs of the metadata, found without parsing it; lines without one are counted."""
        known, malformed = set[str](), 0
        for _, line in lines(self.inputs["meta"]):
            found = _ASIN.search(line)
            if found:
                known.add(found[1].decode())
            else:
                malformed += 1
        self.notes["metadata_lines_malformed"] = malformed
        return known

    def items(self, wanted: set[str]) -> dict[str, Item]:
        """Parse the metadata of the wanted ASINs only; the first line of an ASIN counts.

        Raises:
            UserError: the line of a wanted item is no Python literal, with its number.
        """
        asked = {asin.encode() for asin in wanted}
        items: dict[str, Item] = {}
        repeated = 0
        for number, line in lines(self.inputs["meta"]):
            found = _ASIN.search(line)
            if not found or found[1] not in asked:
                continue
            asin = found[1].decode()
            if asin in items:
                repeated += 1
                continue
            items[asin] = _item(_parse(line, self.inputs["meta"], number, asin))
        self.notes["metadata_lines_repeated"] = repeated
        return items


def _read_reviews(path: Path) -> Interactions:
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    rows: list[tuple[int, int, float, int]] = []
    number = 0
    for number, line in lines(path):
        try:
            review = json.loads(line)
            user, item, rating, time = (review[key] for key in _REVIEW_KEYS)
            row = float(rating), int(time)
        except KeyError as error:
            raise UserError(f"{path}, line {number}: the review has no {error}; is it a 2014 review file?") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a review in JSON ({error}): {line[:80]!r}") from None
        if not (isinstance(user, str) and user and isinstance(item, str) and item):
            raise UserError(f"{path}, line {number}: reviewerID {user!r} or asin {item!r} is not an id")
        if not np.isfinite(row[0]):
            raise UserError(f"{path}, line {number}: overall = {rating!r} is not a finite number")
        rows.append((users.setdefault(user, len(users)), items.setdefault(item, len(items)), *row))
    if not number:
        raise UserError(f"{path}: is empty; fetch the file again")
    user_code, item_code, ratings, times = zip(*rows, strict=True)
    return Interactions(
        np.asarray(user_code, np.int64), np.asarray(item_code, np.int64), _ids(users), _ids(items),
        np.asarray(ratings, np.float32), np.asarray(times, np.int64),
    )  # fmt: skip


def _ids(codes: dict[str, int]) -> np.ndarray:
    return np.asarray(list(codes), dtype=object)


def _parse(line: bytes, path: Path, number: int, asin: str) -> dict[str, Any]:
    try:
        # literal_eval and not eval: the line is a stranger's. Depth and digit bombs end in one of these errors.
        record = ast.literal_eval(line.decode())
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}, not a dict")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(
            f"{path}, line {number}: metadata of item {asin} is not a Python literal ({error}): {line[:80]!r}; "
            "mend or delete that line"
        ) from None
    return record


def _item(record: dict[str, Any]) -> Item:
    return Item(
        title=" ".join(_texts(record.get("title"))),
        brand=" ".join(_texts(record.get("brand"))),
        categories=list(dict.fromkeys(_texts(record.get("categories")))),
        description=" ".join(_texts(record.get("description"))),
        image_urls=list(_strings(record.get("imUrl"))),
    )


def _texts(value: Any) -> list[str]:
    return [text for text in map(clean, _strings(value)) if text]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)
