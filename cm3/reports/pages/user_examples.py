"""Example users: their history, held-out items and recommendations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cm3.common.tables import read_parquet
from cm3.reports.pages.item_cards import Shop, evenly_spaced

USERS_EACH, HISTORY_SHOWN, LIST_WANTED = 4, 10, 12


def list_length(ks: Sequence[int]) -> int:
    """Return the number of recommendations to show: the largest cut-off up to 12."""
    return max((k for k in ks if k <= LIST_WANTED), default=min(ks))


def history_panels(shop: Shop, per_user: Path, recommendations: Path, k: int) -> dict[str, Any]:
    """Return a few test users with and without a hit among their first `k` recommendations, and the share with a hit.

    In both groups, users are evenly spaced from the shortest to the longest training history.
    """
    measured = read_parquet(per_user, ["user", f"recall@{k}"])
    users = measured.column("user").to_numpy()
    hit = measured.column(f"recall@{k}").to_numpy() > 0
    lengths = np.bincount(shop.users[shop.splits == "train"], minlength=len(shop.user_ids))[users]
    order = np.lexsort((users, lengths))
    picked = [(user, True) for user in evenly_spaced(users[order][hit[order]], USERS_EACH)]
    picked += [(user, False) for user in evenly_spaced(users[order][~hit[order]], USERS_EACH)]
    lists = _recommended(recommendations, [shop.user_ids[user] for user, _ in picked], k)
    number = {item_id: item for item, item_id in enumerate(shop.item_ids)}
    panels = []
    for user, has_hit in picked:
        mine = shop.users == user
        held_out = set(shop.items[mine & (shop.splits == "test")].tolist())
        items = [number[item_id] for item_id in lists[shop.user_ids[user]]]
        history = _history(shop, mine & (shop.splits == "train"))
        panels.append(
            {
                "user_id": shop.user_ids[user],
                "hit": has_hit,
                "bought": len(history),
                "history": [shop.card(item) for item in history[:HISTORY_SHOWN]],
                "held_out": [shop.card(item) for item in sorted(held_out)[:HISTORY_SHOWN]],
                "held_out_count": len(held_out),
                "recommended": [
                    shop.card(item, str(rank), item in held_out) for rank, item in enumerate(items, start=1)
                ],
            }
        )
    return {"k": k, "share_hit": float(hit.mean()), "test_users": len(users), "panels": panels}


def _history(shop: Shop, rows: np.ndarray) -> list[int]:
    # Latest first if times are known; each item once.
    places = np.flatnonzero(rows)
    times = np.nan_to_num(shop.times[places], nan=0.0)
    order = places[np.lexsort((places, -times))]
    return list(dict.fromkeys(shop.items[order].tolist()))


def _recommended(path: Path, user_ids: list[str], k: int) -> dict[str, list[str]]:
    wanted = (pc.field("rank") <= k) & pc.field("user_id").isin(user_ids)
    table = read_parquet(path, ["user_id", "item_id", "rank"], wanted)
    table = table.sort_by([("user_id", "ascending"), ("rank", "ascending")])
    found: dict[str, list[str]] = {user_id: [] for user_id in user_ids}
    for user_id, item_id in zip(table.column("user_id").to_pylist(), table.column("item_id").to_pylist(), strict=True):
        found[user_id].append(item_id)
    return found
