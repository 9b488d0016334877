"""What every source's reader hands to the prepare stage."""

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
"""Interactions as a reader yields them: ids as the source writes them, in any order, repeats included."""

RATINGS = pa.schema(
    [*(INTERACTIONS.field(name) for name in ("user", "item", "rating", "timestamp")), ("published", pa.int8())]
)
"""ratings.parquet: interactions that are not labelled yet; `published` is a label that came with the data, or null."""


def rows(
    user: pa.Array, item: pa.Array, rating: Any = None, timestamp: Any = None, split: int | pa.Array | None = None
) -> pa.Table:
    """Return a table of ROWS; what the source lacks is null, and one number as `split` holds for all rows."""
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
    """One row of the item table; texts are clean, absent ones empty.

    Attributes:
        features: selling points; details: "name: value"; price: in the shop's currency;
        sales_rank: 1 is the best seller of its main category; image_urls: candidates, best first.
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
    """A source's parser: `Reader(spec, inputs)`, where spec is the data set's prepare_spec().

    Attributes:
        notes: counts of what was skipped or mended while reading, for stats.json.
    """

    notes: dict[str, int]

    def interactions(self) -> Iterator[pa.Table]:
        """Yield all interactions as tables of ROWS, of a size that memory takes lightly.

        Raises:
            UserError: with file and line where the input is malformed.
        """

    def known_items(self) -> Iterable[list[str]] | None:
        """Return the ids in the item table in pieces, repeats allowed, or None where the source has no item table."""

    def items(self, wanted: set[str]) -> dict[str, Item]:
        """Read the wanted items; ids that the table lacks are absent from the result."""


class Faults:
    """Malformed lines of a published file: left out, counted by reason, and an error when there are too many.

    Args:
        path: the file.
        most: share of lines that may be malformed.
    """

    SHOWN = 5
    HOPELESS = 10_000

    def __init__(self, path: Path, most: float) -> None:
        self.path, self.most = path, most
        self.reasons: Counter[str] = Counter()
        self.first = ""

    def add(self, number: int, reason: str, line: bytes) -> None:
        """Count line `number` out."""
        text = line[:80].decode(errors="replace")
        place = f"{self.path}, line {number}: {reason}: {text!r}"
        self.first = self.first or place
        if self.reasons.total() < self.SHOWN:
            log.warning("left out: %s", place)
        self.reasons[reason] += 1
        # A wrong file of a hundred million lines is not read to its end.
        if self.reasons.total() >= self.HOPELESS and self.reasons.total() > max(self.most, 0.5) * number:
            self.check(number)

    def check(self, lines: int) -> dict[str, int]:
        """Return counts by reason for the notes, once all `lines` are read.

        Raises:
            UserError: the file is empty, or too many lines are malformed.
        """
        if not lines:
            raise UserError(f"{self.path}: is empty; fetch the file again")
        bad = self.reasons.total()
        if bad > self.most * lines:
            raise UserError(
                f"{self.path}: {bad} of {lines} lines are malformed, more than the share {self.most:g} that `malformed` "
                f"allows; is it the right file? The first: {self.first}"
            )
        return {f"left out: {reason}": count for reason, count in sorted(self.reasons.items())}
