"""Example users: their history, held-out items and recommendations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.interactions import Interactions
from cm3.common.tables import SPLITS, read_parquet
from cm3.evaluation.recommendations import ids_of, read_recommendations
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
    data = shop.interactions
    lengths = np.bincount(data.pairs("train")[0], minlength=len(data.user_ids))[users]
    order = np.lexsort((users, lengths))
    picked = [(user, True) for user in evenly_spaced(users[order][hit[order]], USERS_EACH)]
    picked += [(user, False) for user in evenly_spaced(users[order][~hit[order]], USERS_EACH)]
    lists = _recommended(recommendations, data, [user for user, _ in picked], k)
    train, test = (data.split == SPLITS.index(name) for name in ("train", "test"))
    panels = []
    for user, has_hit in picked:
        mine = data.users == user
        held_out = set(data.items[mine & test].tolist())
        history = _history(shop, mine & train)
        panels.append(
            {
                "user_id": data.user_ids[user],
                "hit": has_hit,
                "bought": len(history),
                "history": [shop.card(item) for item in history[:HISTORY_SHOWN]],
                "held_out": [shop.card(item) for item in sorted(held_out)[:HISTORY_SHOWN]],
                "held_out_count": len(held_out),
                "recommended": [
                    shop.card(item, str(rank), item in held_out) for rank, item in enumerate(lists[user], start=1)
                ],
            }
        )
    return {"k": k, "share_hit": float(hit.mean()), "test_users": len(users), "panels": panels}


def _history(shop: Shop, rows: np.ndarray) -> list[int]:
    # Latest first if times are known; each item once.
    places = np.flatnonzero(rows)
    times = np.nan_to_num(shop.times[places], nan=0.0)
    order = places[np.lexsort((places, -times))]
    return list(dict.fromkeys(shop.interactions.items[order].tolist()))


def _recommended(path: Path, data: Interactions, users: list[int], k: int) -> dict[int, list[int]]:
    """Return the first k items of each of some users."""
    found: dict[int, list[tuple[int, int]]] = {user: [] for user in users}
    for user, item, rank in read_recommendations(path, ids_of(data.user_ids, data.item_ids)):
        for row in np.flatnonzero((rank <= k) & np.isin(user, users)):
            found[int(user[row])].append((int(rank[row]), int(item[row])))
    return {user: [item for _, item in sorted(places)] for user, places in found.items()}
