"""Stage: raw files -> k-core filtered ratings with dense ids, item table, user table and statistics."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.cli import stage
from cm3.common.errors import UserError
from cm3.common.files import write_json
from cm3.common.limits import Limits
from cm3.common.tables import ITEMS, MADE_FROM, USERS, write_table
from cm3.datasets.interactions_db import InteractionArrays, InteractionsDatabase
from cm3.datasets.k_core import kcore
from cm3.datasets.raw_files import provenance
from cm3.datasets.reader import RATINGS, Item
from cm3.datasets.registry import source_spec
from cm3.datasets.statistics import describe

log = logging.getLogger("cm3.datasets.prepare")

_NO_LIMITS = Limits()
_SPREADSHEET_DAYS = 80_000
"""Days since 1900 in the year 2119."""


def prepare(
    spec: dict[str, Any],
    inputs: dict[str, Path],
    ratings: Path,
    items: Path,
    users: Path,
    stats: Path,
    made_from: Mapping[str, str] | None = None,
    limits: Limits = _NO_LIMITS,
) -> dict[str, Any]:
    """Read a source, remove duplicates and unknown items, filter to the k-core, and write the common tables.

    Order of steps: rows with equal user, item and timestamp count once; of several rows of a (user, item) pair the first
    in time is kept, at equal times the highest rating; `unknown_items` decides on interactions with items that are not
    in the item table; k-core. Users and items are numbered in the order of their ids and rows sorted by (user,
    timestamp, item), so the result does not depend on the order of lines.

    Args:
        spec: a dataset's prepare_spec().
        inputs: raw files by name.
        ratings, items, users, stats: files to write.
        made_from: keys of the settings by stage, for the metadata of the tables.
        limits: threads and memory of the database.

    Returns:
        the statistics that are written to `stats`.

    Raises:
        UserError: malformed input, unknown items with `unknown_items: error`, an empty k-core, or counts that differ
            from `expected`.
    """
    reader = source_spec(spec["source"]).open_reader(spec, inputs)
    log.info("reading %s", ", ".join(str(path) for path in inputs.values()))
    k = spec["kcore"]
    with InteractionsDatabase(ratings.parent, limits) as database:
        for table in reader.interactions():
            database.add(table)
        raw = database.encode()
        repeats = database.drop_duplicates()
        known = reader.known_items()
        unknown = database.apply_policy(known, spec["unknown_items"])
        usable = database.size()
        if not usable["interactions"]:
            raise UserError(
                f"{_first_path(inputs)}: none of the {raw['interactions']} interactions has an item of the item table; "
                "check that both files use the same item ids, or set unknown_items: keep"
            )
        found = database.fetch(k)
        core = found.take(kcore(found.user, found.item, k))
        if not len(core):
            raise UserError(
                f"{_first_path(inputs)}: the {k}-core of {usable['interactions']} interactions ({usable['users']} users, "
                f"{usable['items']} items) is empty; set kcore to {_largest_core(database, k)} or less"
            )
        user_codes, item_codes = np.unique(core.user), np.unique(core.item)
        user_ids, item_ids = database.ids("user", user_codes), database.ids("item", item_codes)
        number = np.arange(len(item_ids))
        if known is not None and spec["cold_items"] == "keep":
            core_ids, item_ids = item_ids, database.known_ids(item_codes)
            numbers = {item_id: n for n, item_id in enumerate(item_ids)}
            number = np.asarray([numbers[item_id] for item_id in core_ids])
    core = _renumbered(core, user_codes, item_codes, number)
    table = reader.items(set(item_ids)) if known is not None else {}
    ordered = [table.get(item_id, Item()) for item_id in item_ids]
    facts = {
        "users": len(user_ids),
        "items": len(item_ids),
        "interactions": len(core),
        "kcore": k,
        "raw": raw,
        "before_kcore": usable,
        "dropped": {
            **repeats,
            "unknown_items": raw["interactions"] - sum(repeats.values()) - usable["interactions"],
            "kcore": usable["interactions"] - len(core),
        },
        "unknown_items": unknown,
        **describe(core, len(user_ids), ordered),
        "reading": reader.notes,
    }
    _warn_of_numbers(facts["timestamps"])
    _check_expected(facts, spec["expected"], inputs)
    metadata = {MADE_FROM: dict(made_from)} if made_from else None
    write_table(ratings, _ratings_table(core), RATINGS, metadata)
    write_table(items, _items_table(item_ids, ordered), ITEMS, metadata)
    numbers = pa.array(range(len(user_ids)), pa.int32())
    write_table(users, pa.table({"user": numbers, "user_id": user_ids}), USERS, metadata)
    write_json(stats, facts)
    log.info(
        "%d users, %d items, %d interactions after the %d-core (%d, %d, %d before)",
        len(user_ids),
        len(item_ids),
        len(core),
        k,
        *usable.values(),
    )
    return facts


def _warn_of_numbers(times: dict[str, int] | None) -> None:
    """Warn of times that are numbers of days, as in spreadsheets, or running numbers."""
    if times and 0 < times["last"] < _SPREADSHEET_DAYS:
        log.warning(
            "all times are between %d and %d seconds after 1970-01-01: if they are days of a spreadsheet, write them as dates; "
            "of a running number only the order counts",
            times["first"],
            times["last"],
        )


def _largest_core(database: InteractionsDatabase, k: int) -> int:
    found = database.fetch(2)
    return next((n for n in range(k - 1, 1, -1) if kcore(found.user, found.item, n).any()), 1)


def _renumbered(core: InteractionArrays, users: np.ndarray, items: np.ndarray, number: np.ndarray) -> InteractionArrays:
    """Return the interactions sorted by (user, timestamp, item) with dense codes; `items`[n] becomes number[n]."""
    user = np.searchsorted(users, core.user).astype(np.int32)
    item = number[np.searchsorted(items, core.item)].astype(np.int32)
    keys = (item, user) if core.timestamp is None else (item, core.timestamp, user)
    dense = InteractionArrays(user, item, core.rating, core.timestamp, core.split)
    return dense.take(np.lexsort(keys))


def _ratings_table(core: InteractionArrays) -> pa.Table:
    columns = {"user": core.user, "item": core.item, "rating": core.rating, "timestamp": core.timestamp}
    columns["published"] = core.split
    # from_pandas: NaN, an unknown rating, becomes null.
    return pa.table(
        {
            name: pa.nulls(len(core)) if values is None else pa.array(values, from_pandas=True)
            for name, values in columns.items()
        }
    )


def _items_table(item_ids: Sequence[str], items: Sequence[Item]) -> pa.Table:
    columns = {
        "item": list(range(len(items))),
        "item_id": list(item_ids),
        "title": [item.title for item in items],
        "brand": [item.brand for item in items],
        "categories": [list(item.categories) for item in items],
        "description": [item.description for item in items],
        "features": [list(item.features) for item in items],
        "details": [list(item.details) for item in items],
        "price": [item.price for item in items],
        "sales_rank": [item.sales_rank for item in items],
        "image_urls": [list(item.image_urls) for item in items],
    }
    return pa.table(columns, schema=ITEMS)


def _check_expected(facts: dict[str, Any], expected: dict[str, int | None], inputs: dict[str, Path]) -> None:
    wrong = {k: (v, facts[k]) for k, v in expected.items() if v is not None and facts[k] != v}
    if wrong:
        counts = ", ".join(f"{name} {got} (expected {want})" for name, (want, got) in wrong.items())
        raise UserError(
            f"{_first_path(inputs)}: {counts}; the raw files are not the published ones, or `expected` is wrong"
        )


def _first_path(inputs: dict[str, Path]) -> str:
    return str(next(iter(inputs.values())))


def main() -> None:
    """Spec: a dataset's prepare_spec(). Inputs: its prepare_inputs(). Outputs: ratings, items, users, stats, record."""
    with stage("cm3.datasets.prepare") as call:
        out = call.outputs
        call.record["raw"] = provenance(call.inputs, call.spec.get("checksums", {}))
        if published := source_spec(call.spec["source"]).published_files(call.inputs):
            call.record["published"] = published
        call.record["stats"] = prepare(
            call.spec,
            call.inputs,
            out["ratings"],
            out["items"],
            out["users"],
            out["stats"],
            call.made_from,
            call.limits,
        )


if __name__ == "__main__":
    main()
