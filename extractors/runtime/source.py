"""What a stage's input tables hold for an extractor: one input per item, or the reason why there is none."""

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
    """The inputs of N items, streamed in an order that is cheap to read.

    Attributes:
        item_ids: N ids, in the order of items.parquet.
        status: (N,) str: ok where there is an input; else missing or failed.
        errors: reasons by row, for rows that are not ok.
        rows: the ok rows in the order in which they stream.
        stream: yields the inputs of the rows asked for, a part of `rows` in its order.
        digests: (N,) sha256 of what the model is shown of each item, 32 bytes; null where there is nothing. Neither the
            item's id nor its row is in it: equal inputs, equal digests.
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
    """Return the item ids themselves as inputs: what precomputed vectors are looked up by."""
    ids: list[str] = read_table(items, ITEMS, ["item_id"]).column("item_id").to_pylist()
    status = np.full(len(ids), OK, dtype=object)
    return Source(ids, status, np.arange(len(ids)), lambda rows: (ids[row] for row in rows), digests_of(ids))


def statuses(present: Iterable[bool]) -> np.ndarray:
    """Return (N,) ok where something is present, else missing."""
    return np.array([OK if there else MISSING for there in present], dtype=object)


def require_some(source: Source[T], name: str, modality: str) -> None:
    """Raise if not one item has an input.

    Raises:
        UserError: with the counts and the first reasons.
    """
    if len(source.rows) == 0:
        reasons = "; ".join(f"{source.item_ids[row]}: {error}" for row, error in list(source.errors.items())[:3])
        raise UserError(
            f"{name}: not one of {len(source.item_ids)} items has an input for {modality} vectors "
            f"({int((source.status == MISSING).sum())} missing, {len(source.errors)} failed{': ' * bool(reasons)}{reasons}). "
            "Mend the data, or leave this modality out of the experiment"
        )
