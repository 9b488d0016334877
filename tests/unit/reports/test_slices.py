"""Slices, lists and geometry against plain loops."""

import math
import tracemalloc

import numpy as np
import oracles_cm3 as oracle
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.model import losses
from cm3.reports.analysis.beyond_accuracy import beyond_accuracy
from cm3.reports.analysis.geometry import draw_sample, measure
from cm3.reports.analysis.slices import ITEM_CLASSES, Slices, history_bins, item_classes

COUNTS = st.lists(st.integers(0, 20), min_size=1, max_size=25).filter(any)


def matrix(rows: list[set[int]], n_items: int) -> sp.csr_matrix:
    dense = np.zeros((len(rows), n_items), np.float32)
    for user, items in enumerate(rows):
        dense[user, list(items)] = 1
    return sp.csr_matrix(dense)


def plain_class(counts, item):
    if not counts[item]:
        return "cold"
    before = sum(c for i, c in enumerate(counts) if (-c, i) < (-counts[item], item))
    total = sum(counts)
    return "head" if before * 10 < total * 2 else "middle" if before * 10 < total * 8 else "tail"


@given(COUNTS)
def test_items_are_classed_by_the_interactions_before_them(counts):
    found = [ITEM_CLASSES[c] for c in item_classes(np.array(counts))]
    assert found == [plain_class(counts, item) for item in range(len(counts))]


def test_classes_by_hand():
    # Of 20 interactions the head is what starts before the 4th, the tail what starts at the 16th or later.
    found = [ITEM_CLASSES[c] for c in item_classes(np.array([4, 3, 4, 0, 4, 2, 1, 1, 1]))]
    assert found == ["head", "middle", "middle", "cold", "middle", "middle", "tail", "tail", "tail"]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_every_user_is_in_one_bin_and_equal_histories_share_it(found):
    lengths = np.array(found)
    bins = history_bins(lengths)
    assert sum(mask.astype(int) for _, mask in bins).tolist() == [1] * len(lengths)
    for length in set(found):
        assert sum(mask[lengths == length].any() for _, mask in bins) == 1
    assert len(bins) <= 4 and all(mask.any() for _, mask in bins)
    assert len({name for name, _ in bins}) == len(bins)


def test_bins_by_hand():
    names = {name: mask.sum() for name, mask in history_bins(np.array([3, 3, 3, 4, 5, 6, 9, 20]))}
    assert names == {"3 items": 3, "4 items": 1, "5-6 items": 2, "9-20 items": 2}
    assert [name for name, _ in history_bins(np.array([1, 1]))] == ["1 item"]


@pytest.fixture(scope="module")
def shop():
    rng = np.random.default_rng(3)
    n_items, rows = 25, []
    for _ in range(60):
        drawn = np.argsort(-(np.linspace(4, 0, n_items) + rng.gumbel(size=n_items)))
        cut = int(rng.integers(2, 9))
        rows.append((set(drawn[:cut].tolist()) - {24}, set(drawn[cut : cut + 3].tolist())))
    rows[7] = (rows[7][0], set())
    train, test = (matrix([row[part] for row in rows], n_items) for part in (0, 1))
    users = np.array([u for u, (_, truth) in enumerate(rows) if truth])
    lists = np.array([rng.permutation(n_items)[:10] for _ in users])
    lists[4, 6:] = -1
    return rows, train, test, users, lists


def test_slices_are_those_of_plain_loops(shop):
    rows, train, test, users, lists = shop
    counts = [sum(item in bought for bought, _ in rows) for item in range(25)]
    kinds = [plain_class(counts, item) for item in range(25)]
    slices = Slices(users, train, test, [3, 10])
    _, means = slices.measure(lists)
    assert [one.name for one in slices.slices[:4]] == list(ITEM_CLASSES)
    for one, mean in zip(slices.slices[:4], means[:4], strict=True):
        parts = [{item for item in rows[u][1] if kinds[item] == one.name} for u in users]
        judged = [(lists[i].tolist(), part) for i, part in enumerate(parts) if part]
        assert one.users == len(judged) > 0
        assert one.interactions == sum(len(part) for part in parts)
        assert one.items == kinds.count(one.name)
        for k in (3, 10):
            plain = [oracle.metrics_of(found, part, k) for found, part in judged]
            for name in plain[0]:
                assert mean[f"{name}@{k}"] == pytest.approx(np.mean([row[name] for row in plain]), abs=1e-12)


def test_users_are_sliced_by_their_training_items(shop):
    rows, train, test, users, lists = shop
    slices = Slices(users, train, test, [3, 10])
    overall, means = slices.measure(lists)
    lengths = [len(rows[u][0]) for u in users]
    seen = 0
    for one, mean in zip(slices.slices[4:], means[4:], strict=True):
        first, _, last = one.name.removesuffix(" items").partition("-")
        chosen = [i for i, n in enumerate(lengths) if int(first) <= n <= int(last or first)]
        assert one.users == len(chosen) and one.kind == "users" and one.items is None
        assert one.interactions == sum(len(rows[users[i]][1]) for i in chosen)
        plain = [oracle.metrics_of(lists[i].tolist(), rows[users[i]][1], 10)["ndcg"] for i in chosen]
        assert mean["ndcg@10"] == pytest.approx(np.mean(plain), abs=1e-12)
        seen += len(chosen)
    assert seen == len(users) == len(overall["recall@3"])


def test_a_slice_that_nobody_wants_has_no_numbers():
    train, test = matrix([{0, 1}, {0}], 3), matrix([{1}, {1}], 3)
    slices = Slices(np.array([0, 1]), train, test, [1])
    _, means = slices.measure(np.array([[1], [1]]))
    cold = next(i for i, one in enumerate(slices.slices) if one.name == "cold")
    assert slices.slices[cold].users == 0 and means[cold] == {}


def test_cutoffs_beyond_the_lists_are_left_out():
    train, test = matrix([{0}], 3), matrix([{1}], 3)
    overall, _ = Slices(np.array([0]), train, test, [1, 2, 20]).measure(np.array([[1, 2]]))
    assert {name.partition("@")[2] for name in overall} == {"1", "2"}


def test_coverage_popularity_novelty_and_concentration_by_hand():
    # Four items, bought 4, 2, 1 and 0 times by 4 users; two lists, one of them short.
    lists = np.array([[0, 1], [0, -1]])
    found = beyond_accuracy(lists, np.array([4, 2, 1, 0]), n_users=4, cutoffs=[1, 2, 5])
    assert found["coverage@1"] == 1 / 4 and found["coverage@2"] == 2 / 4
    assert found["popularity@1"] == 4 and found["popularity@2"] == ((4 + 2) / 2 + 4) / 2
    # -log2(4/4) = 0 and -log2(2/4) = 1.
    assert found["novelty@1"] == 0 and found["novelty@2"] == (0.5 + 0) / 2
    assert found["gini@1"] == pytest.approx(3 / 4), "one item of four has all recommendations"
    # Shown 0, 0, 1, 2 times: (-3*0 - 1*0 + 1*1 + 3*2) / (4 * 3).
    assert found["gini@2"] == pytest.approx(7 / 12)
    assert "coverage@5" not in found
    cold = beyond_accuracy(np.array([[3]]), np.array([4, 2, 1, 0]), 4, [1])
    assert cold["novelty@1"] == 2, "a cold item counts as bought once"


def test_memory_does_not_grow_with_users_times_items():
    counts, peaks = np.ones(100_000), []
    for users in (8192, 40 * 8192):
        tracemalloc.start()
        beyond_accuracy(np.zeros((users, 1), np.int32), counts, users, [1])
        peaks.append(tracemalloc.get_traced_memory()[1] - 12 * users)
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 10e6


@given(st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3, unique=True), min_size=1, max_size=15))
def test_concentration_is_the_mean_gap_between_items(rows):
    lists = np.array(rows)
    shown = np.bincount(lists.ravel(), minlength=9)
    gaps = np.abs(shown[:, None] - shown[None, :]).mean() / (2 * shown.mean())
    found = beyond_accuracy(lists, np.arange(9), 9, [3])
    assert found["gini@3"] == pytest.approx(gaps, abs=1e-12)
    assert found["coverage@3"] == len({item for row in rows for item in row}) / 9


@pytest.fixture(scope="module")
def embedded(shop):
    _, train, *_ = shop
    rng = np.random.default_rng(8)
    return train, rng.normal(size=(60, 5)).astype(np.float32), rng.normal(size=(25, 5)).astype(np.float32) * 3


def test_geometry_is_that_of_the_losses_on_the_sphere(embedded):
    train, users, items = embedded
    sample = draw_sample(train, seed=0)
    found = measure(users, items, sample)
    u, i = (oracle.unit_rows(x.astype(np.float64)) for x in (users, items))
    pairs = list(zip(*train.nonzero(), strict=True))
    plain = np.mean([((u[a] - i[b]) ** 2).sum() for a, b in pairs])
    assert found["alignment"] == pytest.approx(plain, rel=1e-12)
    bought = sorted({int(b) for _, b in pairs})
    assert sample.items.tolist() == bought and 24 not in bought, "cold items are not measured"
    assert found["uniformity_items"] == pytest.approx(oracle.log_mean_potential(i[bought]), rel=1e-9)
    known = sorted({int(a) for a, _ in pairs})
    assert found["uniformity_users"] == pytest.approx(float(losses.uniformity(torch.tensor(u[known]))), rel=1e-12)
    scaled = measure(users * 7, items, sample)
    assert scaled == pytest.approx(found), "length plays no part"


def test_the_rows_of_the_sample_are_measured_like_all(embedded):
    train, users, items = embedded
    sample = draw_sample(train, seed=1, pairs=20, rows=9)
    some_users, some_items, places = sample.rows()
    assert len(some_users) < 60 and (np.diff(some_users) > 0).all() and (np.diff(some_items) > 0).all()
    assert measure(users[some_users], items[some_items], places) == measure(users, items, sample)


def test_the_sample_is_bounded_seeded_and_without_repetition(embedded):
    train, *_ = embedded
    one, same, other = (draw_sample(train, seed, pairs=40, rows=12) for seed in (1, 1, 2))
    ends = set(zip(one.pair_users.tolist(), one.pair_items.tolist(), strict=True))
    assert len(ends) == 40 and all(train[u, i] for u, i in ends)
    assert len(set(one.users.tolist())) == len(set(one.items.tolist())) == 12
    assert all(np.array_equal(getattr(one, n), getattr(same, n)) for n in ("pair_users", "users", "items"))
    assert not np.array_equal(one.pair_users, other.pair_users)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_best_alignment_is_zero_and_uniformity_never_above_zero(seed):
    rng = np.random.default_rng(seed)
    train = sp.csr_matrix(np.eye(6, dtype=np.float32))
    x = rng.normal(size=(6, 3)).astype(np.float32)
    found = measure(x, 2 * x, draw_sample(train, 0))
    assert found["alignment"] == pytest.approx(0, abs=1e-12)
    assert -8 <= found["uniformity_users"] <= 0 and math.isfinite(found["uniformity_items"])
