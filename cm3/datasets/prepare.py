"""Stage: raw files -> k-cored ratings with dense ids, the item and the user table, and statistics."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cm3.common.cli import stage
from cm3.common.errors import UserError
from cm3.common.files import write_json
from cm3.common.tables import ITEMS, USERS, write_table
from cm3.datasets.interactions_db import Gathering, Interactions
from cm3.datasets.k_core import kcore
from cm3.datasets.raw_files import account
from cm3.datasets.reader import RATINGS, Item
from cm3.datasets.registry import source_spec
from cm3.datasets.statistics import describe

log = logging.getLogger("cm3.datasets.prepare")


def prepare(
    spec: dict[str, Any], inputs: dict[str, Path], ratings: Path, items: Path, users: Path, stats: Path
) -> dict[str, Any]:
    """Read a source, drop what is repeated or unknown, cut to the k-core, and write the common tables.

    In this order: rows with equal user, item and timestamp count once; of a repeated (user, item) pair the first
    in time stays, of equal times the one rated best; interactions of unknown items follow the policy; then the
    k-core. Users and items are numbered in the order of their ids, rows sorted by (user, timestamp, item), so the
    order of lines in a file is irrelevant.

    Args:
        spec: a data set's prepare_spec().
        inputs: raw files by name.
        ratings, items, users, stats: files to write.

    Returns:
        the statistics, as written.

    Raises:
        UserError: malformed input, unknown items under policy `error`, an empty k-core, or other counts than
            `expected`.
    """
    reader = source_spec(spec["source"]).open_reader(spec, inputs)
    log.info("reading %s", ", ".join(str(path) for path in inputs.values()))
    k = spec["kcore"]
    with Gathering(ratings.parent) as gathering:
        for table in reader.interactions():
            gathering.add(table)
        raw = gathering.encode()
        repeats = gathering.drop_repeats()
        known = reader.known_items()
        unknown = gathering.apply_policy(known, spec["unknown_items"])
        usable = gathering.size()
        if not usable["interactions"]:
            raise UserError(
                f"{_place(inputs)}: none of the {raw['interactions']} interactions names an item of the item table; "
                "check that both files write item ids the same way, or set unknown_items: keep"
            )
        found = gathering.fetch(k)
        core = found.take(kcore(found.user, found.item, k))
        if not len(core):
            raise UserError(
                f"{_place(inputs)}: the {k}-core of {usable['interactions']} interactions ({usable['users']} users, "
                f"{usable['items']} items) is empty; set kcore to {_largest_core(gathering, k)} or less"
            )
        user_codes, item_codes = np.unique(core.user), np.unique(core.item)
        user_ids, item_ids = gathering.ids("user", user_codes), gathering.ids("item", item_codes)
        number = np.arange(len(item_ids))
        if known is not None and spec["cold_items"] == "keep":
            mine, item_ids = item_ids, gathering.known_ids(item_codes)
            places = {item_id: place for place, item_id in enumerate(item_ids)}
            number = np.asarray([places[item_id] for item_id in mine])
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
    _check_expected(facts, spec["expected"], inputs)
    write_table(ratings, _ratings_table(core), RATINGS)
    write_table(items, _items_table(item_ids, ordered), ITEMS)
    write_table(users, pa.table({"user": pa.array(range(len(user_ids)), pa.int32()), "user_id": user_ids}), USERS)
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


def _largest_core(gathering: Gathering, k: int) -> int:
    found = gathering.fetch(2)
    return next((n for n in range(k - 1, 1, -1) if kcore(found.user, found.item, n).any()), 1)


def _renumbered(core: Interactions, users: np.ndarray, items: np.ndarray, number: np.ndarray) -> Interactions:
    """Return the interactions by (user, timestamp, item), with dense codes; item n of `items` becomes number[n]."""
    user = np.searchsorted(users, core.user).astype(np.int32)
    item = number[np.searchsorted(items, core.item)].astype(np.int32)
    keys = (item, user) if core.timestamp is None else (item, core.timestamp, user)
    dense = Interactions(user, item, core.rating, core.timestamp, core.split)
    return dense.take(np.lexsort(keys))


def _ratings_table(core: Interactions) -> pa.Table:
    columns = {"user": core.user, "item": core.item, "rating": core.rating, "timestamp": core.timestamp}
    columns["published"] = core.split
    return pa.table({name: pa.nulls(len(core)) if values is None else values for name, values in columns.items()})


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
        told = ", ".join(f"{name} {got} (expected {want})" for name, (want, got) in wrong.items())
        raise UserError(f"{_place(inputs)}: {told}; the raw files are not the published ones, or mend `expected`")


def _place(inputs: dict[str, Path]) -> str:
    return str(next(iter(inputs.values())))


def main() -> None:
    """Spec: a data set's prepare_spec(). Inputs: its prepare_inputs(). Outputs: ratings, items, users, stats, record."""
    with stage("cm3.datasets.prepare") as call:
        out = call.outputs
        call.record["raw"] = account(call.inputs, call.spec.get("checksums", {}))
        call.record["stats"] = prepare(call.spec, call.inputs, out["ratings"], out["items"], out["users"], out["stats"])


if __name__ == "__main__":
    main()
