"""Split of interactions into train, valid and test."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cm3.common.errors import UserError
from cm3.common.tables import INTERACTIONS, ITEMS, MADE_FROM, SPLITS, USERS, read_table, write_table
from cm3.datasets.reader import RATINGS

log = logging.getLogger(__name__)

TRAIN, VALID, TEST = 0, 1, 2
STRATEGIES = ("random", "user-time", "global-time", "leave-one-out")


def split(
    user: np.ndarray,
    seed: int,
    strategy: str = "random",
    timestamp: np.ndarray | None = None,
    kept: np.ndarray | None = None,
) -> np.ndarray:
    """Return the label of every interaction: train (0), valid (1) or test (2).

    - `random`: per user, after a shuffle; n < 10 interactions give n-2 / 1 / 1, else h = int(0.2 n),
      valid h // 2 and test h - h // 2. A user's only interaction is in train.
    - `user-time`: the same sizes, but each user's interactions in time order, test last.
    - `leave-one-out`: per user, the last in time is test and the one before it valid. A user's first
      interaction is always in train.
    - `global-time`: two points in time for all users, closest to 80 % and 90 % of the interactions; interactions with
      equal times get the same label.

    Interactions of a user at equal times (all of them without `timestamp`) are in random order, by the seed.

    Args:
        user: (N,) integers, any values. The result depends on the order of rows; sort them first if it may vary.
        seed: of the shuffle.
        timestamp: (N,) integers, for the strategies that use time.
        kept: (N,) labels of an earlier split, -1 for new interactions. `random` keeps all labels and draws from the new
            interactions of each user until test, then valid, have the sizes above; the rest is train. The strategies
            that use time keep train only: valid and test are the last of a user's interactions after the last in train.

    Returns:
        (N,) int8.

    Raises:
        ValueError: unknown strategy, or `global-time` without three different timestamps, or with kept labels.
    """
    user = np.asarray(user)
    if strategy == "global-time":
        if kept is not None:
            raise ValueError("a split by two points in time does not keep labels")
        return _by_time(user, timestamp)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")
    n = len(user)
    shuffle = np.random.default_rng(seed).random(n)
    labels = np.full(n, -1, np.int8) if kept is None else np.array(kept, np.int8)
    keys: Sequence[np.ndarray] = (shuffle, user)
    if strategy != "random":
        # At equal times: earlier train, then new, then earlier valid and test, so that most labels are kept.
        kept_order = np.array([1, 0, 2, 3])[labels + 1]
        keys = (shuffle, kept_order, user) if timestamp is None else (shuffle, kept_order, np.asarray(timestamp), user)
    order = np.lexsort(keys)
    codes, count = np.unique(user, return_inverse=True, return_counts=True)[1:]
    valid, test = _last_two(count) if strategy == "leave-one-out" else _sizes(count)
    if strategy == "random":
        order = order[labels[order] < 0]
        has_valid, has_test = (np.bincount(codes[labels == label], minlength=len(count)) for label in (VALID, TEST))
        valid, test = valid - has_valid, test - has_test
    else:
        order = order[_after_train(codes[order], labels[order])]
        labels[:] = TRAIN
    of = codes[order]
    drawn = np.bincount(of, minlength=len(count))
    test = np.clip(test, 0, drawn)
    valid = np.clip(valid, 0, drawn - test)
    rank = np.arange(len(order)) - (np.cumsum(drawn) - drawn)[of]
    labels[order] = (rank >= (drawn - valid - test)[of]).astype(np.int8) + (rank >= (drawn - test)[of])
    return labels


def _after_train(user: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return which of (N,) rows, sorted by user and time, come after the last training row of their user."""
    place = np.arange(len(user))
    last = np.full(user.max(initial=-1) + 1, -1)
    last[user[labels == TRAIN]] = place[labels == TRAIN]
    found: np.ndarray = place > last[user]
    return found


def _sizes(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    held = (0.2 * count).astype(np.int64)
    few = count < 10
    pair = (count >= 2).astype(np.int64)
    return np.where(few, pair, held // 2), np.where(few, pair, held - held // 2)


def _last_two(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (count >= 3).astype(np.int64), (count >= 2).astype(np.int64)


def _by_time(user: np.ndarray, timestamp: np.ndarray | None) -> np.ndarray:
    times, counts = np.unique(timestamp, return_counts=True) if timestamp is not None else (np.array([]), np.array([]))
    if len(times) < 3:
        raise ValueError(f"a split by time needs at least 3 different timestamps, and there are {len(times)}")
    before = np.cumsum(counts) - counts
    test_from = 2 + int(np.argmin(np.abs(before[2:] - 0.9 * len(user))))
    valid_from = 1 + int(np.argmin(np.abs(before[1:test_from] - 0.8 * len(user))))
    place = np.searchsorted(times, np.asarray(timestamp))
    return ((place >= valid_from).astype(np.int8) + (place >= test_from)).astype(np.int8)


def split_ratings(
    ratings: Path,
    interactions: Path,
    strategy: str,
    seed: int,
    tables: Mapping[str, Path] | None = None,
    made_from: Mapping[str, str] | None = None,
    level: int = logging.INFO,
) -> dict[str, Any]:
    """Read ratings.parquet, label its rows, write interactions.parquet in the same row order.

    Args:
        tables: to keep labels: `items` and `users` of these ratings, and `keep.interactions`, `keep.items` and
            `keep.users` of the earlier split.
        made_from: keys of the settings by stage, for the metadata of the table.
        level: of the message about a random split of interactions with times.

    Returns:
        the numbers of train, valid and test interactions, of users without training interactions, and of kept labels.

    Raises:
        UserError: the strategy uses time and a timestamp is missing, or train, valid or test would be empty.
    """
    table = read_table(ratings, RATINGS)
    user = table.column("user").to_numpy()
    kept = None
    if strategy == "published":
        if table.column("published").null_count:
            raise UserError(
                f"{ratings}: the data have no published split; choose another split.strategy than published"
            )
        labels = table.column("published").to_numpy()
    else:
        kept = _kept(table, tables) if tables else None
        labels = _labels(ratings, user, table.column("timestamp"), strategy, seed, kept)
    counts = {name: int((labels == code).sum()) for code, name in enumerate(SPLITS)}
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise UserError(
            f"{ratings}: split strategy {strategy!r} leaves {' and '.join(empty)} without interactions "
            f"({len(labels)} in all); use another strategy or more data"
        )
    cold = len(np.setdiff1d(user, user[labels == TRAIN]))
    column = pa.DictionaryArray.from_arrays(pa.array(labels), pa.array(SPLITS))
    metadata = {"strategy": strategy, "seed": seed} | ({MADE_FROM: dict(made_from)} if made_from else {})
    write_table(interactions, table.drop_columns("published").append_column("split", column), INTERACTIONS, metadata)
    log.info("%s: %s; %d users without training interactions", strategy, counts, cold)
    if strategy == "random" and len(pc.unique(table.column("timestamp").drop_null())) > 1:
        log.log(
            level,
            "the interactions have times, but the split is random: training sees interactions that are later than those it "
            "is tested on. For a split in the order of time set split.strategy of the data set to user-time, global-time or "
            "leave-one-out; split.strategy: random is right to compare with papers that split at random",
        )
    facts = {"split": counts, "users_without_train": cold}
    if kept is not None:
        facts["kept_labels"] = int((kept == labels).sum())
        log.info("%d labels are kept from the earlier split", facts["kept_labels"])
    return facts


def _kept(ratings: pa.Table, tables: Mapping[str, Path]) -> np.ndarray:
    """Return (N,) int8: the label of each row's user and item in the earlier tables, or -1."""
    old = read_table(tables["keep.interactions"], INTERACTIONS)
    places, n_items = [], 0
    for name, schema in (("user", USERS), ("item", ITEMS)):
        known = read_table(tables[f"keep.{name}s"], schema).column(f"{name}_id")
        here = read_table(tables[f"{name}s"], schema).column(f"{name}_id")
        place = pc.fill_null(pc.index_in(here, value_set=known), -1).to_numpy().astype(np.int64)
        places.append(place[ratings.column(name).to_numpy()])
        n_items = len(known)
    keys = old.column("user").to_numpy().astype(np.int64) * n_items + old.column("item").to_numpy()
    order = np.argsort(keys, kind="stable")
    labels = pc.index_in(old.column("split").cast("string"), value_set=pa.array(SPLITS)).to_numpy()[order]
    there = (places[0] >= 0) & (places[1] >= 0)
    wanted = np.where(there, places[0] * n_items + places[1], -1)
    at = np.searchsorted(keys[order], wanted).clip(max=len(keys) - 1)
    return np.where(keys[order][at] == wanted, labels[at], -1).astype(np.int8)


def _labels(
    ratings: Path, user: np.ndarray, time: pa.ChunkedArray, strategy: str, seed: int, kept: np.ndarray | None
) -> np.ndarray:
    if strategy != "random" and time.null_count:
        raise UserError(
            f"{ratings}: split strategy {strategy!r} needs a timestamp for every interaction; "
            "set the timestamp column of the dataset in the configuration, or use strategy: random"
        )
    try:
        return split(user, seed, strategy, None if strategy == "random" else time.to_numpy(), kept)
    except ValueError as error:
        raise UserError(f"{ratings}: {error}; use strategy: random") from None
