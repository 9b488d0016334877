"""Stage: files with reviews -> reviews.parquet, the text of each interaction of ratings.parquet that has one."""

import importlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cm3.common.cli import stage
from cm3.common.errors import UserError
from cm3.common.tables import ITEMS, MADE_FROM, REVIEWS, USERS, read_table, write_table
from cm3.datasets.raw_files import provenance
from cm3.datasets.reader import RATINGS
from cm3.datasets.registry import source_spec

log = logging.getLogger("cm3.datasets.reviews")

_TABLES = ("ratings", "users", "items")


def collect_reviews(
    spec: dict[str, Any],
    inputs: Mapping[str, Path],
    tables: Mapping[str, Path],
    reviews: Path,
    made_from: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the text of each (user, item) pair of ratings.parquet: of several the first in time that is not empty.

    Of equal times the one with the highest rating is taken, as `prepare` does with interactions.

    Args:
        spec: a dataset's reviews_spec().
        inputs: its review_inputs().
        tables: ratings, users and items, written by the prepare stage.
        reviews: file to write, sorted by user and item.
        made_from: keys of the settings by stage, for the metadata of the table.

    Returns:
        the numbers of interactions and of those with a text.

    Raises:
        UserError: malformed input, or no interaction has a text.
    """
    pairs = read_table(tables["ratings"], RATINGS, ["user", "item"])
    user_ids = read_table(tables["users"], USERS, ["user_id"]).column("user_id").combine_chunks()
    item_ids = read_table(tables["items"], ITEMS, ["item_id"]).column("item_id").combine_chunks()
    wanted = pairs["user"].to_numpy().astype(np.int64) * len(item_ids) + pairs["item"].to_numpy()
    parts = [_known(part, user_ids, item_ids, wanted) for part in _read(spec, dict(inputs))]
    found = pa.concat_tables(parts) if parts else _known(_NOTHING, user_ids, item_ids, wanted)
    order = [("pair", "ascending"), ("timestamp", "ascending"), ("rating", "descending"), ("text", "ascending")]
    found = found.sort_by(order)
    pair = found["pair"].to_numpy()
    found = found.filter(pa.array(np.diff(pair, prepend=-1) != 0))
    if not len(found):
        first = next(iter(inputs.values()))
        raise UserError(f"{first}: none of {len(pairs)} interactions has the text of a review; is it the right file?")
    user, item = np.divmod(found["pair"].to_numpy(), len(item_ids))
    table = pa.table({"user": pa.array(user, pa.int32()), "item": pa.array(item, pa.int32()), "text": found["text"]})
    write_table(reviews, table, REVIEWS, {MADE_FROM: dict(made_from)} if made_from else None)
    log.info("%d of %d interactions have the text of a review", len(table), len(pairs))
    return {"interactions": len(pairs), "with_text": len(table)}


_NOTHING = pa.table(
    {
        "user": pa.array([], pa.string()),
        "item": pa.array([], pa.string()),
        "rating": pa.array([], pa.float32()),
        "timestamp": pa.array([], pa.int64()),
        "text": pa.array([], pa.string()),
    }
)


def _read(spec: dict[str, Any], inputs: dict[str, Path]) -> Iterator[pa.Table]:
    """Return the reviews as tables of user, item, rating, timestamp and text."""
    module, _, name = source_spec(spec["source"]).review_reader.partition(":")
    tables: Iterator[pa.Table] = getattr(importlib.import_module(module), name)(spec, inputs)
    return tables


def _known(part: pa.Table, user_ids: pa.Array, item_ids: pa.Array, wanted: np.ndarray) -> pa.Table:
    """Return the rows of known pairs that have a text, with the number of their pair in place of the ids."""
    user, item = pc.index_in(part["user"], value_set=user_ids), pc.index_in(part["item"], value_set=item_ids)
    kept = pc.and_(pc.and_(user.is_valid(), item.is_valid()), pc.not_equal(pc.fill_null(part["text"], ""), ""))
    part, user, item = part.filter(kept), user.filter(kept), item.filter(kept)
    pair = user.to_numpy().astype(np.int64) * len(item_ids) + item.to_numpy()
    table = part.select(["rating", "timestamp", "text"]).append_column("pair", pa.array(pair, pa.int64()))
    return table.filter(pa.array(np.isin(pair, wanted)))


def main() -> None:
    """Spec: a dataset's reviews_spec(). Inputs: its review_inputs(), ratings, users, items. Outputs: reviews, record."""
    with stage("cm3.datasets.reviews") as call:
        inputs = {name: path for name, path in call.inputs.items() if name not in _TABLES}
        tables = {name: call.inputs[name] for name in _TABLES}
        call.record["raw"] = provenance(inputs, call.spec.get("checksums", {}))
        call.record |= collect_reviews(call.spec, inputs, tables, call.outputs["reviews"], call.made_from)


if __name__ == "__main__":
    main()
