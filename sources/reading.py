"""What every source's reader hands to the prepare stage."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np
import pyarrow as pa

from stages.errors import UserError
from stages.tables import INTERACTIONS

RATINGS = pa.schema([INTERACTIONS.field(name) for name in ("user", "item", "rating", "timestamp")])


@dataclass(frozen=True)
class Interactions:
    """N interactions in file order.

    Attributes:
        user, item: (N,) codes into user_ids and item_ids.
        user_ids, item_ids: the ids as the source writes them, each once.
        rating: (N,) float32, or None where the source has none.
        timestamp: (N,) int64 Unix seconds, or None where the source has none.
    """

    user: np.ndarray
    item: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray
    rating: np.ndarray | None
    timestamp: np.ndarray | None

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Interactions":
        """Return the interactions at `rows` (a mask or row numbers); the ids stay as they are."""
        return replace(
            self,
            user=self.user[rows],
            item=self.item[rows],
            rating=None if self.rating is None else self.rating[rows],
            timestamp=None if self.timestamp is None else self.timestamp[rows],
        )


@dataclass(frozen=True)
class Item:
    """One row of the item table; texts are clean, absent ones empty."""

    title: str = ""
    brand: str = ""
    categories: Sequence[str] = ()
    description: str = ""
    image_urls: Sequence[str] = field(default=())


class Reader(Protocol):
    """A source's parser: `Reader(spec, inputs)`, where spec is the data set's prepare_spec().

    Attributes:
        notes: counts of what was skipped or mended while reading, for stats.json.
    """

    notes: dict[str, int]

    def interactions(self) -> Interactions:
        """Read all interactions. Raises UserError with file and line where one is malformed."""

    def known_items(self) -> set[str] | None:
        """Return the ids in the item table, or None where the source has no item table."""

    def items(self, wanted: set[str]) -> dict[str, Item]:
        """Read the wanted items; ids that the table lacks are absent from the result."""


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading; gzip is told by its first bytes, not by its name.

    Raises:
        UserError: there is no such file.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(2)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    return cast(BinaryIO, gzip.open(path, "rb")) if magic == b"\x1f\x8b" else path.open("rb")


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line without its end) of a plain or gzip file; blank lines are left out.

    Raises:
        UserError: no such file, or the gzip stream is damaged or cut short.
    """
    number = 0
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                if stripped := line.strip():
                    yield number, stripped
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip after line {number} ({error}); fetch the file again") from None
