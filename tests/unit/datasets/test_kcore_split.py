"""k-core and split against slow recomputations, as properties, and on the published Baby data."""

import collections
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_sources import kcore_oracle, split_sizes_oracle

from cm3.common.errors import UserError
from cm3.common.tables import INTERACTIONS, ITEMS, USERS, read_table, write_table
from cm3.datasets.k_core import kcore
from cm3.datasets.reader import RATINGS
from cm3.datasets.splits import split, split_ratings

PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), max_size=90)


def test_the_package_exports_functions_without_heavy_imports():
    program = (
        "import sys; import cm3.datasets, cm3.datasets.registry; "
        "assert not {'numpy', 'pyarrow', 'PIL', 'aiohttp', 'torch'} & set(sys.modules), 'heavy'; "
        "from cm3.datasets import kcore, split; import numpy as np; "
        "assert kcore(np.array([0]), np.array([0]), 2).tolist() == [False]; "
        "assert split(np.zeros(3, int), 1).dtype == np.int8"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


@settings(deadline=None, max_examples=150)
@given(PAIRS, st.integers(0, 5))
def test_kcore_is_the_oracles(pairs: list[tuple[int, int]], k: int):
    user, item = (np.array([p[n] for p in pairs], dtype=np.int64) for n in (0, 1))
    assert kcore(user, item, k).tolist() == kcore_oracle(pairs, k)


@settings(deadline=None, max_examples=50)
@given(PAIRS, st.integers(2, 4), st.randoms(use_true_random=False))
def test_kcore_ignores_order_and_the_values_of_ids(pairs: list[tuple[int, int]], k: int, random):
    user, item = (np.array([p[n] for p in pairs], dtype=np.int64) for n in (0, 1))
    keep = kcore(user, item, k)
    order = np.array(random.sample(range(len(pairs)), len(pairs)), dtype=np.int64)
    assert kcore(user[order] * -(10**15) - 3, item[order] * 10**12, k).tolist() == keep[order].tolist()
    assert kcore(user[keep], item[keep], k).all()


def test_kcore_unravels_a_chain_to_the_end():
    # Each link has degree 2 but for the ends, so the 2-core peels the chain one round at a time to nothing.
    user = np.repeat(np.arange(500), 2)[:-1]
    item = np.repeat(np.arange(500), 2)[1:]
    assert not kcore(user, item, 2).any()


def test_kcore_refuses_what_is_no_column_of_integers():
    with pytest.raises(ValueError, match="equal length"):
        kcore(np.zeros(3, int), np.zeros(2, int), 2)
    with pytest.raises(ValueError, match="integers"):
        kcore(np.zeros(3), np.zeros(3, int), 2)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=12), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_random_split_gives_every_user_the_sizes_of_the_rule(counts: list[int], seed: int, random):
    user = np.repeat(np.arange(len(counts)) * 1000 - 3, counts)
    user = user[np.array(random.sample(range(len(user)), len(user)))]
    labels = split(user, seed)
    assert labels.dtype == np.int8
    for number, count in enumerate(counts):
        mine = labels[user == number * 1000 - 3]
        assert tuple(np.bincount(mine, minlength=3)) == split_sizes_oracle(count)
    assert labels.tolist() == split(user, seed).tolist()


def test_random_split_is_a_fair_shuffle():
    user = np.repeat(np.arange(4000), 10)
    held = (split(user, 7) > 0).reshape(4000, 10).mean(axis=0)
    # Each place is held out with probability 1/5; five standard errors of 4,000 users.
    assert np.abs(held - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / 4000)
    assert (split(user, 7) != split(user, 8)).mean() > 0.2


def test_a_single_interaction_stays_in_train():
    assert split(np.array([5]), 0).tolist() == [0]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=60), st.integers(0, 9))
def test_leave_one_out_holds_out_the_last_two(rows: list[tuple[int, int]], seed: int):
    user, time = (np.array([r[n] for r in rows]) for n in (0, 1))
    labels = split(user, seed, "leave-one-out", time)
    for u in np.unique(user):
        mine = user == u
        sizes = np.bincount(labels[mine], minlength=3).tolist()
        n = int(mine.sum())
        assert sizes == ([1, 0, 0] if n == 1 else [1, 0, 1] if n == 2 else [n - 2, 1, 1])
        for earlier, later in ((0, 1), (1, 2), (0, 2)):
            if sizes[earlier] and sizes[later]:
                assert time[mine & (labels == earlier)].max() <= time[mine & (labels == later)].min()


def test_global_time_parts_time_and_never_equal_times():
    rng = np.random.default_rng(0)
    time = rng.integers(0, 400, 20_000)
    labels = split(rng.integers(0, 50, 20_000), 0, "global-time", time)
    for earlier, later in ((0, 1), (1, 2)):
        assert time[labels == earlier].max() < time[labels == later].min()
    assert np.abs(np.bincount(labels) / 20_000 - [0.8, 0.1, 0.1]).max() < 0.005
    days = np.repeat(np.arange(7), 100)
    assert np.bincount(split(np.zeros(700, int), 0, "global-time", days)).tolist() == [500, 100, 100]


def test_split_names_what_it_cannot_do():
    with pytest.raises(ValueError, match="randm"):
        split(np.zeros(3, int), 0, "randm")
    with pytest.raises(ValueError, match="3 different timestamps"):
        split(np.zeros(9, int), 0, "global-time", np.repeat([1, 2], [5, 4]))


def test_user_time_parts_each_users_time_in_the_sizes_of_random():
    rng = np.random.default_rng(1)
    user, time = rng.integers(0, 40, 900), rng.integers(0, 10**6, 900)
    labels = split(user, 0, "user-time", time)
    for one in range(40):
        mine = user == one
        assert tuple(np.bincount(labels[mine], minlength=3)) == split_sizes_oracle(int(mine.sum()))
        for earlier, later in ((0, 1), (1, 2)):
            assert time[mine & (labels == earlier)].max() <= time[mine & (labels == later)].min()
    # Where times do not decide the seed does.
    same = np.zeros(900, int)
    assert (split(user, 0, "user-time", same) != split(user, 1, "user-time", same)).any()
    assert (split(user, 5, "user-time", same) == split(user, 5, "user-time", same)).all()


def test_published_labels_are_taken_as_they_are(tmp_path: Path):
    labels = [0, 0, 1, 2, 0, 2, 1]
    ratings = _ratings(tmp_path / "ratings.parquet", [0, 0, 0, 0, 1, 1, 1], None, labels)
    split_ratings(ratings, tmp_path / "interactions.parquet", "published", 9)
    after = read_table(tmp_path / "interactions.parquet", INTERACTIONS).column("split").to_pylist()
    assert after == [("train", "valid", "test")[label] for label in labels]
    bare = _ratings(tmp_path / "bare.parquet", [0] * 7, None)
    with pytest.raises(UserError, match="have no published split"):
        split_ratings(bare, tmp_path / "out.parquet", "published", 9)


def _ratings(path: Path, user: list[int], timestamp: list[int] | None, labels: list[int] | None = None) -> Path:
    n = len(user)
    times = pa.nulls(n) if timestamp is None else timestamp
    table = {"user": user, "item": list(range(n)), "rating": [1.0] * n, "timestamp": times}
    table["published"] = pa.nulls(n) if labels is None else labels
    write_table(path, pa.table(table), RATINGS)
    return path


def test_split_stage_keeps_rows_in_order_and_changes_the_label_only(tmp_path: Path):
    ratings = _ratings(tmp_path / "ratings.parquet", [0] * 10 + [1] * 20, list(range(30)))
    facts = split_ratings(ratings, tmp_path / "interactions.parquet", "random", 3)
    before = read_table(ratings, RATINGS)
    after = read_table(tmp_path / "interactions.parquet", INTERACTIONS)
    assert after.drop_columns("split").equals(before.drop_columns("published"))
    counts = collections.Counter(after.column("split").to_pylist())
    assert counts == facts["split"] == {"train": 24, "valid": 3, "test": 3}


def test_split_stage_names_the_way_out(tmp_path: Path):
    ratings = _ratings(tmp_path / "ratings.parquet", [0] * 10, None)
    with pytest.raises(UserError, match=r"ratings\.parquet.*timestamp.*strategy: random"):
        split_ratings(ratings, tmp_path / "out.parquet", "leave-one-out", 0)
    lonely = _ratings(tmp_path / "lonely.parquet", [0, 1, 2], [1, 2, 3])
    with pytest.raises(UserError, match="valid and test without"):
        split_ratings(lonely, tmp_path / "out.parquet", "random", 0)
    assert not (tmp_path / "out.parquet").exists()


def test_the_published_baby_data_are_their_own_5_core(real_data: Path):
    parts = [
        json.loads(gzip.decompress((real_data / "baby" / f"{p}.json.gz").read_bytes()))
        for p in ("train", "val", "test")
    ]
    pairs = [(int(u), i) for part in parts for u, items in part.items() for i in items]
    user, item = np.array(pairs).T
    assert (len(np.unique(user)), len(np.unique(item)), len(pairs)) == (19_445, 7_050, 160_792)
    assert kcore(user, item, 5).all()
    # Stray interactions around it peel off and leave exactly the published set.
    strays = np.arange(4000) % 1000
    keep = kcore(np.concatenate([user, strays + 10**6]), np.concatenate([item, strays * 7 % 7050]), 5)
    assert keep[: len(user)].all() and not keep[len(user) :].any()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=90, unique=True), st.integers(0, 60))
def test_kept_labels_stand_and_new_rows_fill_up_the_sizes(pairs: list[tuple[int, int]], n_old: int):
    user = np.array([u for u, _ in pairs], np.int64)
    old = split(user[:n_old], 1)
    kept = np.full(len(user), -1, np.int8)
    kept[: len(old)] = old
    labels = split(user, 2, kept=kept)
    assert np.array_equal(labels[: len(old)], old)
    assert np.array_equal(split(user, 2, kept=np.full(len(user), -1)), split(user, 2))
    for u in np.unique(user):
        mine, had = labels[user == u], old[user[:n_old] == u]
        _, valid, test = split_sizes_oracle(len(mine)) if len(mine) > 1 else (1, 0, 0)
        new = len(mine) - len(had)
        more_test = min(new, max(0, test - (had == 2).sum()))
        assert (mine == 2).sum() == (had == 2).sum() + more_test
        assert (mine == 1).sum() == (had == 1).sum() + min(new - more_test, max(0, valid - (had == 1).sum()))


def test_the_newest_is_test_again_and_what_was_learnt_stays_in_train():
    user, time = np.zeros(9, int), np.arange(1, 10)
    for strategy in ("user-time", "leave-one-out"):
        old = split(user[:5], 1, strategy, time[:5])
        assert old.tolist() == [0, 0, 0, 1, 2]
        kept = np.append(old, np.full(4, -1, np.int8))
        assert split(user, 2, strategy, time, kept).tolist() == [0] * 7 + [1, 2]
        # One that comes late but is older than what was learnt is not asked.
        late = np.where(time == 9, 0, time)
        assert split(user, 2, strategy, late, kept).tolist() == [0] * 6 + [1, 2, 0]


@pytest.mark.parametrize("strategy", ["user-time", "leave-one-out"])
@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=80),
    n_old=st.integers(0, 60),
    in_order=st.booleans(),
)
def test_a_split_in_time_order_keeps_train_and_asks_for_the_newest(
    strategy: str, rows: list[tuple[int, int]], n_old: int, in_order: bool
):
    rows = sorted(rows, key=lambda row: row[1]) if in_order else rows
    user, time = (np.array([row[n] for row in rows], np.int64) for n in (0, 1))
    old = split(user[:n_old], 1, strategy, time[:n_old])
    kept = np.append(old, np.full(len(user) - len(old), -1, np.int8))
    labels = split(user, 2, strategy, time, kept)
    assert not labels[kept == 0].any()
    assert np.array_equal(split(user[:n_old], 2, strategy, time[:n_old], old), old)
    assert np.array_equal(split(user, 2, strategy, time, np.full(len(user), -1)), split(user, 2, strategy, time))
    for u in np.unique(user):
        mine = user == u
        for earlier, later in ((0, 1), (1, 2), (0, 2)):
            if (mine & (labels == earlier)).any() and (mine & (labels == later)).any():
                assert time[mine & (labels == earlier)].max() <= time[mine & (labels == later)].min()
        fresh = np.bincount(split(user[mine], 3, strategy, time[mine]), minlength=3)
        sizes = np.bincount(labels[mine], minlength=3)
        learnt = time[mine & (kept == 0)].max(initial=-1)
        free = int((mine & (kept != 0) & (time >= learnt)).sum())
        assert sizes[2] == min(fresh[2], free) and sizes[1] == min(fresh[1], free - sizes[2])
        if in_order and mine.sum() != 2:  # the two of a user who had one are not both held out
            assert sizes.tolist() == fresh.tolist()


def test_labels_are_kept_by_ids_whatever_the_numbers(tmp_path: Path):
    def prepared(folder: str, users: list[str], items: list[str], pairs: list[tuple[str, str]]) -> dict[str, Path]:
        place = tmp_path / folder
        place.mkdir()
        columns = {
            "user": pa.array([users.index(u) for u, _ in pairs], pa.int32()),
            "item": pa.array([items.index(i) for _, i in pairs], pa.int32()),
            "rating": pa.nulls(len(pairs), pa.float32()),
            "timestamp": pa.nulls(len(pairs), pa.int64()),
            "published": pa.nulls(len(pairs), RATINGS.field("published").type),
        }
        write_table(place / "ratings.parquet", pa.table(columns), RATINGS)
        write_table(place / "users.parquet", pa.table({"user": range(len(users)), "user_id": users}), USERS)
        absent = {field.name: pa.nulls(len(items), field.type) for field in ITEMS}
        write_table(place / "items.parquet", pa.table(absent | {"item": range(len(items)), "item_id": items}), ITEMS)
        return {name: place / f"{name}.parquet" for name in ("ratings", "interactions", "users", "items")}

    rng = np.random.default_rng(3)
    users, items = [f"u{n}" for n in range(12)], [f"i{n}" for n in range(20)]
    pairs = [(u, i) for u in users for i in items if rng.random() < 0.4]
    old = [(u, i) for u, i in pairs if u != "u3" and i != "i7"]
    first = prepared("first", [u for u in users if u != "u3"][::-1], [i for i in items if i != "i7"][::-1], old)
    split_ratings(first["ratings"], first["interactions"], "random", 1)
    later = prepared("later", users, items, pairs)
    tables = later | {f"keep.{name}": first[name] for name in ("interactions", "items", "users")}
    facts = split_ratings(later["ratings"], later["interactions"], "random", 2, tables)
    assert facts["kept_labels"] == len(old) < len(pairs)
    before, after = (
        dict(zip(rows, read_table(place["interactions"], INTERACTIONS)["split"].to_pylist(), strict=True))
        for rows, place in ((old, first), (pairs, later))
    )
    assert {pair: after[pair] for pair in old} == before
    assert {after[u, i] for u, i in pairs if u == "u3"} == {"train", "valid", "test"}
