"""Stage: raw files -> k-cored ratings with dense ids, the item and the user table, and statistics."""

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sources.config import READERS
from sources.cores import kcore
from sources.reading import RATINGS, Interactions, Item, Reader
from stages.command import stage
from stages.errors import UserError
from stages.files import write_json
from stages.tables import ITEMS, USERS, write_table

log = logging.getLogger("sources.prepare")

SHOWN = 20


def prepare(
    spec: dict[str, Any], inputs: dict[str, Path], ratings: Path, items: Path, users: Path, stats: Path
) -> dict[str, Any]:
    """Read a source, drop what is repeated or unknown, cut to the k-core, and write the common tables.

    In this order: rows with equal user, item and timestamp count once; of a repeated (user, item) pair the first
    in time stays; interactions of unknown items follow the policy; then the k-core. Users and items are numbered
    in the order of their ids, rows sorted by (user, timestamp, item), so the order of lines in a file is irrelevant.

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
    reader: Reader = importlib.import_module(READERS[spec["source"]]).Reader(spec, inputs)
    log.info("reading %s", ", ".join(str(path) for path in inputs.values()))
    found = reader.interactions()
    known = reader.known_items()
    raw = _size(found)
    unique, repeats = drop_repeats(found)
    usable, unknown = _apply_policy(unique, known, spec["unknown_items"])
    if not len(usable):
        raise UserError(
            f"{_place(inputs)}: none of the {len(unique)} interactions names an item of the item table; "
            "check that both files write item ids the same way, or set unknown_items: keep"
        )
    core = usable.take(kcore(usable.user, usable.item, spec["kcore"]))
    if not len(core):
        raise _empty_core(usable, spec["kcore"], inputs)
    user_ids = np.sort(core.user_ids[np.unique(core.user)])
    item_ids = np.sort(_item_ids(core, known, spec["cold_items"]))
    table = reader.items(set(item_ids)) if known is not None else {}
    ordered = [table.get(item_id, Item()) for item_id in item_ids]
    facts = {
        "users": len(user_ids),
        "items": len(item_ids),
        "interactions": len(core),
        "density": len(core) / (len(user_ids) * len(item_ids)),
        "kcore": spec["kcore"],
        "raw": raw,
        "before_kcore": _size(usable),
        "dropped": {
            **repeats,
            "unknown_items": len(unique) - len(usable),
            "kcore": len(usable) - len(core),
        },
        "unknown_items": unknown,
        "items_without_interaction": len(item_ids) - len(np.unique(core.item)),
        "items_with_title": sum(bool(item.title) for item in ordered),
        "items_with_description": sum(bool(item.description) for item in ordered),
        "items_with_text": sum(
            bool(item.title or item.description or item.brand or item.categories) for item in ordered
        ),
        "items_with_image_reference": sum(bool(item.image_urls) for item in ordered),
        "interactions_per_user": _spread(core.user),
        "interactions_per_item": _spread(core.item),
        "has_ratings": core.rating is not None,
        "has_timestamps": core.timestamp is not None,
        "reading": reader.notes,
    }
    _check_expected(facts, spec.get("expected"), inputs)
    write_table(ratings, _ratings_table(core, user_ids, item_ids), RATINGS)
    write_table(items, _items_table(item_ids, ordered), ITEMS)
    write_table(users, pa.table({"user": pa.array(range(len(user_ids)), pa.int32()), "user_id": user_ids}), USERS)
    write_json(stats, facts)
    log.info(
        "%d users, %d items, %d interactions after the %d-core (%d, %d, %d before)",
        len(user_ids), len(item_ids), len(core), spec["kcore"], *_size(usable).values(),
    )  # fmt: skip
    return facts


def drop_repeats(found: Interactions) -> tuple[Interactions, dict[str, int]]:
    """Keep one row of equal (user, item, timestamp), then the first in time of equal (user, item).

    Returns:
        the rows left in file order, and how many went by reason.
    """
    time = np.zeros(len(found), np.int64) if found.timestamp is None else found.timestamp
    order = np.lexsort((np.arange(len(found)), time, found.item, found.user))
    user, item, time = found.user[order], found.item[order], time[order]
    same_pair = (user[1:] == user[:-1]) & (item[1:] == item[:-1])
    same_row = same_pair & (time[1:] == time[:-1])
    keep = np.sort(order[np.concatenate([[True], ~same_pair])]) if len(found) else order
    equal = int(same_row.sum())
    return found.take(keep), {"repeated_rows": equal, "repeated_pairs": int(same_pair.sum()) - equal}


def _apply_policy(
    found: Interactions, known: set[str] | None, policy: str
) -> tuple[Interactions, dict[str, int | list[str]]]:
    used = np.unique(found.item)
    strange = np.zeros(len(found.item_ids), dtype=bool)
    if known is not None:
        strange[used] = [item_id not in known for item_id in found.item_ids[used]]
    rows = strange[found.item]
    ids = sorted(found.item_ids[strange])
    facts: dict[str, int | list[str]] = {"items": len(ids), "interactions": int(rows.sum()), "first": ids[:SHOWN]}
    if not ids:
        return found, facts
    told = f"{len(ids)} items with {rows.sum()} interactions are not in the item table: {', '.join(ids[:SHOWN])}"
    told += ", ..." if len(ids) > SHOWN else ""
    if policy == "error":
        raise UserError(f"{told}. Add them to it, or set unknown_items: drop, or keep (items without text and picture)")
    log.warning("%s (%s by unknown_items: %s)", told, {"drop": "dropped", "keep": "kept"}[policy], policy)
    return (found.take(~rows) if policy == "drop" else found), facts


def _empty_core(found: Interactions, k: int, inputs: dict[str, Path]) -> UserError:
    most = next((n for n in range(k - 1, 1, -1) if kcore(found.user, found.item, n).any()), 1)
    size = _size(found)
    return UserError(
        f"{_place(inputs)}: the {k}-core of {size['interactions']} interactions ({size['users']} users, "
        f"{size['items']} items) is empty; set kcore to {most} or less"
    )


def _item_ids(core: Interactions, known: set[str] | None, cold_items: str) -> np.ndarray:
    mine = core.item_ids[np.unique(core.item)]
    if cold_items == "drop" or known is None:
        return mine
    return np.asarray(sorted(known.union(mine)), dtype=object)


def _ratings_table(core: Interactions, user_ids: np.ndarray, item_ids: np.ndarray) -> pa.Table:
    user = _renumber(core.user, core.user_ids, user_ids)
    item = _renumber(core.item, core.item_ids, item_ids)
    time = np.zeros(len(core), np.int64) if core.timestamp is None else core.timestamp
    order = np.lexsort((item, time, user))
    nothing = pa.nulls(len(core))
    return pa.table(
        {
            "user": user[order],
            "item": item[order],
            "rating": nothing if core.rating is None else pa.array(core.rating[order]),
            "timestamp": nothing if core.timestamp is None else pa.array(core.timestamp[order]),
        }
    )


def _renumber(codes: np.ndarray, ids: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    number = {item_id: n for n, item_id in enumerate(ordered)}
    return np.asarray([number.get(name, -1) for name in ids], dtype=np.int32)[codes]


def _items_table(item_ids: np.ndarray, items: Sequence[Item]) -> pa.Table:
    columns = {
        "item": list(range(len(items))),
        "item_id": item_ids.tolist(),
        "title": [item.title for item in items],
        "brand": [item.brand for item in items],
        "categories": [list(item.categories) for item in items],
        "description": [item.description for item in items],
        "image_urls": [list(item.image_urls) for item in items],
    }
    return pa.table(columns, schema=ITEMS)


def _size(found: Interactions) -> dict[str, int]:
    return {"users": len(np.unique(found.user)), "items": len(np.unique(found.item)), "interactions": len(found)}


def _spread(codes: np.ndarray) -> dict[str, float]:
    counts = np.unique(codes, return_counts=True)[1]
    return {
        "min": int(counts.min()),
        "median": float(np.median(counts)),
        "mean": float(counts.mean()),
        "max": int(counts.max()),
    }


def _check_expected(facts: dict[str, Any], expected: dict[str, int | None] | None, inputs: dict[str, Path]) -> None:
    wrong = {k: (v, facts[k]) for k, v in (expected or {}).items() if v is not None and facts[k] != v}
    if wrong:
        told = ", ".join(f"{name} {got} (expected {want})" for name, (want, got) in wrong.items())
        raise UserError(f"{_place(inputs)}: {told}; the raw files are not the published ones, or mend `expected`")


def _place(inputs: dict[str, Path]) -> str:
    return str(next(iter(inputs.values())))


def main() -> None:
    """Spec: a data set's prepare_spec(). Inputs: its prepare_inputs(). Outputs: ratings, items, users, stats, record."""
    with stage("sources.prepare") as call:
        out = call.outputs
        call.record["stats"] = prepare(call.spec, call.inputs, out["ratings"], out["items"], out["users"], out["stats"])


if __name__ == "__main__":
    main()
