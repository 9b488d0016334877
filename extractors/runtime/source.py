"""Inputs of a model, read from a job's tables: one input per item, or the reason for its absence."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from cm3.common.errors import UserError
from cm3.common.tables import ITEMS, MISSING, OK, read_table
from extractors.runtime.cache import DIGEST

T = TypeVar("T")


@dataclass
class Source(Generic[T]):
    """The inputs of N items, streamed in an order that is fast to read.

    Attributes:
        item_ids: N ids, in the order of items.parquet.
        status: (N,) str: ok if there is an input; else missing or failed.
        errors: reasons by row, for rows that are not ok.
        rows: the ok rows, in the order of reading.
        stream: function of a part of `rows`, in that order, that yields their inputs.
        digests: (N,) sha256 of each input, 32 bytes; null without an input. Equal inputs have equal digests, whatever the
            item's id and row.
    """

    item_ids: list[str]
    status: np.ndarray
    rows: np.ndarray
    stream: Callable[[np.ndarray], Iterator[T]]
    digests: pa.FixedSizeBinaryArray
    errors: dict[int, str] = field(default_factory=dict)


def digests_of(texts: Iterable[str | None]) -> pa.FixedSizeBinaryArray:
    """Return the digests of texts, null for None."""
    return pa.array(
        (None if t is None else hashlib.sha256(t.encode("utf-8", "surrogatepass")).digest() for t in texts), DIGEST
    )


def read_ids(items: Path) -> Source[str]:
    """Return the item ids themselves as inputs: keys of precomputed vectors."""
    ids: list[str] = read_table(items, ITEMS, ["item_id"]).column("item_id").to_pylist()
    status = np.full(len(ids), OK, dtype=object)
    return Source(ids, status, np.arange(len(ids)), lambda rows: (ids[row] for row in rows), digests_of(ids))


def statuses(present: Iterable[bool]) -> np.ndarray:
    """Return (N,) statuses: ok where an input is present, else missing."""
    return np.array([OK if one else MISSING for one in present], dtype=object)


def require_some(source: Source[T], name: str, modality: str) -> None:
    """Raise if no item has an input.

    Raises:
        UserError: with the counts and the first reasons.
    """
    if len(source.rows) == 0:
        reasons = "; ".join(f"{source.item_ids[row]}: {error}" for row, error in list(source.errors.items())[:3])
        raise UserError(
            f"{name}: none of {len(source.item_ids)} items has an input for {modality} vectors "
            f"({int((source.status == MISSING).sum())} missing, {len(source.errors)} failed{': ' * bool(reasons)}{reasons}). "
            "Fix the data, or leave this modality out of the experiment"
        )
