"""Texts of an item's reviews: those of training interactions alone, a stated number of them in a stated order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from cm3.common.strict import Strict
from cm3.common.tables import INTERACTIONS, ITEMS, OK, REVIEWS, read_table
from extractors.runtime.source import Source, digests_of, statuses
from extractors.text.item_text import clean

MODALITY = "reviews"


class ReviewChoice(Strict):
    """The reviews of an item that are encoded; its vector is the mean of theirs."""

    count: int = Field(default=20, gt=0, description="Largest number of reviews per item.")
    order: Literal["newest", "oldest", "longest"] = Field(
        default="newest",
        description="The reviews that are taken first; of equal ones, and where times are unknown, in the order of users.",
    )


def read_reviews(items: Path, reviews: Path, interactions: Path, choice: ReviewChoice) -> Source[tuple[str, ...]]:
    """Return the texts of each item's training reviews as its input; an item without any is missing.

    Reviews of validation and test interactions are never read into an input: they would tell the model what to predict.

    Args:
        items: items.parquet.
        reviews: reviews.parquet, of all interactions.
        interactions: interactions.parquet, whose split decides.
        choice: number and order.
    """
    ids: list[str] = read_table(items, ITEMS, ["item_id"]).column("item_id").to_pylist()
    split = read_table(interactions, INTERACTIONS, ["user", "item", "timestamp", "split"])
    train = split.filter(pc.equal(split["split"].cast(pa.string()), "train")).drop_columns(["split"])
    texts = read_table(reviews, REVIEWS).join(train, ["user", "item"], join_type="inner")
    chosen: list[list[str]] = [[] for _ in ids]
    for item, text in zip(*(_ordered(texts, choice)[name].to_pylist() for name in ("item", "text")), strict=True):
        if len(chosen[item]) < choice.count and (line := clean(text)):
            chosen[item].append(line)
    inputs = [tuple(found) for found in chosen]
    status = statuses(bool(found) for found in inputs)
    return Source(
        item_ids=ids,
        status=status,
        rows=np.flatnonzero(status == OK),
        stream=lambda rows: (inputs[row] for row in rows),
        # No text holds a line end, because `clean` removes them.
        digests=digests_of("\n".join(found) if found else None for found in inputs),
    )


def _ordered(texts: pa.Table, choice: ReviewChoice) -> pa.Table:
    if choice.order == "longest":
        texts = texts.append_column("length", pc.utf8_length(texts["text"]))
    keys = {
        "newest": ("timestamp", "descending"),
        "oldest": ("timestamp", "ascending"),
        "longest": ("length", "descending"),
    }
    return texts.sort_by([keys[choice.order], ("user", "ascending")])


def pooled(vectors: np.ndarray, groups: Sequence[Sequence[int]], normalise: bool) -> dict[int, np.ndarray]:
    """Return the mean of the rows of each group, of unit length with `normalise`, by the number of the group.

    Args:
        vectors: (n, d) float32.
        groups: rows of `vectors`; an empty group has no mean.
    """
    means: dict[int, np.ndarray] = {}
    for number, rows in enumerate(groups):
        if rows:
            mean = vectors[list(rows)].mean(axis=0, dtype=np.float64)
            length = float(np.linalg.norm(mean)) if normalise else 1.0
            means[number] = np.asarray(mean / (length or 1.0), np.float32)
    return means
