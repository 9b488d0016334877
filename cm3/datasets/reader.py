"""Interface between a source's reader and the prepare stage: interactions, items and malformed lines."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.tables import INTERACTIONS

log = logging.getLogger("cm3.datasets.reader")

ROWS = pa.schema(
    [
        ("user", pa.string()),
        ("item", pa.string()),
        ("rating", pa.float32()),  # null where the source has none
        ("timestamp", pa.int64()),  # Unix seconds; null where the source has none
        ("split", pa.int8()),  # 0 train, 1 valid, 2 test as published; null where the source has none
    ]
)
"""Interactions from a reader: original ids, in any order, duplicates included."""

RATINGS = pa.schema(
    [*(INTERACTIONS.field(name) for name in ("user", "item", "rating", "timestamp")), ("published", pa.int8())]
)
"""ratings.parquet: interactions before the split; `published` is the label of a published split, or null."""


def interaction_table(
    user: pa.Array, item: pa.Array, rating: Any = None, timestamp: Any = None, split: int | pa.Array | None = None
) -> pa.Table:
    """Return a table of ROWS; absent columns are null, a single `split` label applies to all rows."""
    n = len(user)
    columns: dict[str, Any] = {"rating": rating, "timestamp": timestamp, "split": split}
    for name, value in columns.items():
        kind = ROWS.field(name).type
        if value is None:
            columns[name] = pa.nulls(n, kind)
        elif isinstance(value, int):
            columns[name] = pa.repeat(pa.scalar(value, kind), n)
    return pa.table({"user": user, "item": item, **columns}).cast(ROWS)


@dataclass(frozen=True)
class Item:
    """One row of the item table; texts are plain text, empty where absent.

    Attributes:
        features: selling points; details: "name: value"; price: in the shop's currency;
        sales_rank: 1 is the best seller of its main category; image_urls: candidate URLs, best first.
    """

    title: str = ""
    brand: str = ""
    categories: Sequence[str] = ()
    description: str = ""
    features: Sequence[str] = ()
    details: Sequence[str] = ()
    price: float | None = None
    sales_rank: int | None = None
    image_urls: Sequence[str] = field(default=())


class Reader(Protocol):
    """Parser of a source's raw files: `Reader(spec, inputs)` with the dataset's prepare_spec().

    Attributes:
        notes: counts of skipped and repaired lines by reason, for stats.json.
    """

    notes: dict[str, int]

    def interactions(self) -> Iterator[pa.Table]:
        """Yield all interactions as tables of ROWS with some 100,000 rows each.

        Raises:
            UserError: malformed input, with file and line.
        """

    def known_items(self) -> Iterable[list[str]] | None:
        """Return the ids of the item table in batches, duplicates allowed; None without an item table."""

    def items(self, wanted: set[str]) -> dict[str, Item]:
        """Return the wanted items by id; the result lacks ids that are not in the item table."""


class MalformedLines:
    """Malformed lines of a published file: skipped, counted by reason, and an error if there are too many.

    Args:
        path: the file.
        limit: largest accepted fraction of malformed lines.
    """

    LOGGED = 5
    ABORT_FROM = 10_000

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.limit = path, limit
        self.reasons: Counter[str] = Counter()
        self.first = ""

    def add(self, number: int, reason: str, line: bytes) -> None:
        """Count line `number` as malformed."""
        text = line[:80].decode(errors="replace")
        place = f"{self.path}, line {number}: {reason}: {text!r}"
        self.first = self.first or place
        if self.reasons.total() < self.LOGGED:
            log.warning("skipped: %s", place)
        self.reasons[reason] += 1
        # Do not read a wrong file of a hundred million lines to its end.
        if self.reasons.total() >= self.ABORT_FROM and self.reasons.total() > max(self.limit, 0.5) * number:
            self.check(number)

    def check(self, lines: int) -> dict[str, int]:
        """Return the counts by reason for the notes, after all `lines` were read.

        Raises:
            UserError: the file is empty, or too many lines are malformed.
        """
        if not lines:
            raise UserError(f"{self.path}: is empty; download the file again")
        bad = self.reasons.total()
        if bad > self.limit * lines:
            raise UserError(
                f"{self.path}: {bad} of {lines} lines are malformed, more than the fraction {self.limit:g} that `malformed` "
                f"allows; is it the right file? The first: {self.first}"
            )
        return {f"left out: {reason}": count for reason, count in sorted(self.reasons.items())}
