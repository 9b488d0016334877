"""What a stage's input tables hold for an extractor: one input per item, or the reason why there is none."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from stages.errors import UserError
from stages.tables import ITEMS, MISSING, OK, read_table

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
        fingerprint: digest of the content; equal content, equal fingerprint.
    """

    item_ids: list[str]
    status: np.ndarray
    rows: np.ndarray
    stream: Callable[[np.ndarray], Iterator[T]]
    fingerprint: str
    errors: dict[int, str] = field(default_factory=dict)


def digest_of_rows(rows: Iterable[object]) -> str:
    """Return a digest of the rows' values in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
        digest.update(b"\0")
    return digest.hexdigest()


def read_ids(items: Path) -> Source[str]:
    """Return the item ids themselves as inputs: what precomputed vectors are looked up by."""
    ids: list[str] = read_table(items, ITEMS).column("item_id").to_pylist()
    status = np.full(len(ids), OK, dtype=object)
    return Source(ids, status, np.arange(len(ids)), lambda rows: (ids[row] for row in rows), digest_of_rows(ids))


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
