"""Lists by bfloat16 products against those by float32 products, to the last bit."""

import numpy as np
import oracles_cm3 as oracle
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from cm3.common import topk
from cm3.common.embeddings import write_embeddings
from cm3.config import Evaluation
from cm3.evaluation import products, ranking
from cm3.evaluation.evaluate import evaluate
from cm3.evaluation.products import ProductScores, ReducedProducts
from cm3.evaluation.ranking import Ranking

USERS, ITEMS, DIM = 70, 260, 16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make bfloat16 products be used for a few users and items, on any CPU."""
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(products, "REDUCED_FROM", 1)
    monkeypatch.setattr(ranking, "REDUCED_USERS", 1)
    monkeypatch.setattr(topk, "GROUP", 2)


@pytest.fixture
def whole_rows(monkeypatch):
    """The numbers of users whose whole float32 products were computed, padding included."""
    counts = []
    call = ProductScores.__call__

    def counted(self, rows):
        counts.append(len(rows))
        return call(self, rows)

    monkeypatch.setattr(ProductScores, "__call__", counted)
    return counts


def vectors(seed=0, users=USERS, items=ITEMS, dim=DIM):
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(0.3, 2, (items, 1))
    found = rng.standard_normal((users, dim)), rng.standard_normal((items, dim)) * lengths
    return [torch.from_numpy(x.astype(np.float32)) for x in found]


def masked(seed=0, share=0.05, users=USERS, items=ITEMS):
    return sp.csr_matrix(np.random.default_rng(seed).random((users, items)) < share)


def assert_same_lists(users, items, hidden, k, unit=False):
    chosen = np.arange(0, len(users), 2) if len(users) > 40 else np.arange(len(users))
    items = functional.normalize(items, dim=1) if unit else items
    score = ProductScores(users, items, unit)
    expected = Ranking(chosen, hidden).top_by(lambda rows: score(rows), k)  # not known as products
    found = Ranking(chosen, hidden).top_by(score, k)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1].view(np.int32), expected[1].view(np.int32))
    return found


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("k", [1, 10, 20])
def test_lists_and_scores_are_those_of_float32(unit, k, whole_rows):
    users, items = vectors()
    assert_same_lists(users, items, masked(), k, unit)
    del whole_rows[: len(whole_rows)]
    Ranking(np.arange(USERS), masked()).top_by(ProductScores(users, items, unit), k)
    assert sum(whole_rows) < USERS / 2


@pytest.mark.parametrize("levels", [2, 3, 50])
def test_of_equal_scores_the_lower_item_is_kept(levels):
    rng = np.random.default_rng(levels)
    users, items = (torch.from_numpy(rng.integers(0, levels, (n, 5)).astype(np.float32)) for n in (USERS, ITEMS))
    hidden = masked(1)
    found, _ = assert_same_lists(users, items, hidden, 12)
    exact = users.double() @ items.double().T
    for row, user in enumerate(range(0, USERS, 2)):
        assert found[row].tolist() == oracle.ranked(exact[user].numpy(), set(hidden[[user]].indices.tolist()), 12)


def test_duplicates_of_items_are_ties_to_the_last_bit():
    users, items = vectors(2)
    assert_same_lists(users, items[torch.arange(ITEMS) // 2], masked(2), 9)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    dim=st.integers(1, 40),
    k=st.integers(1, 20),
    exponent=st.sampled_from([-40, -25, -12, 0, 12, 18]),
    spread=st.sampled_from([0, 1e-6, 1e-3, 3]),
    share=st.sampled_from([0, 0.1, 0.9, 1]),
    unit=st.booleans(),
)
def test_any_lengths_neighbours_and_masks(seed, dim, k, exponent, spread, share, unit):
    """Items that differ by little, lists that end early, numbers whose squares vanish or overflow."""
    rng = np.random.default_rng(seed)
    users, items = vectors(seed, 20, 200, dim)
    items = items[:1] + spread * items
    users = users * torch.from_numpy(10.0 ** rng.uniform(-2, 2, (20, 1))).float() * 10.0**exponent
    assert_same_lists(users, items, masked(seed, share, 20, 200), k, unit)


def test_some_long_items_leave_no_doubt_about_the_others(whole_rows):
    """Their copies are far off. Before each item had its own bound, the longest of all made every list uncertain."""
    users, items = vectors()
    items[::50] *= 100
    assert_same_lists(users, items, masked(), 10)
    del whole_rows[: len(whole_rows)]
    Ranking(np.arange(USERS), masked()).top(users, items, 10)
    assert sum(whole_rows) < USERS / 2


def test_scores_below_zero_are_left_to_float32(whole_rows):
    users, items = vectors()
    assert_same_lists(users.abs(), -items.abs(), masked(), 10)
    assert sum(whole_rows) >= 2 * len(range(0, USERS, 2))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_left_to_float32(value):
    users, items = vectors()
    users[4, 1] = value
    unsure = ReducedProducts(items).top(users, 5, (torch.zeros(0, dtype=torch.int64),) * 2)[2]
    assert unsure[4] and not unsure.all()
    items[7, 2] = value
    assert ReducedProducts(items).top(users, 5, (torch.zeros(0, dtype=torch.int64),) * 2)[2].all()


def test_scores_that_overflow_are_left_to_float32():
    users, items = vectors()
    users[4] *= 1e22
    items[7] *= 1e22
    assert ReducedProducts(items).top(users, 5, (torch.zeros(0, dtype=torch.int64),) * 2)[2][4]
    assert_same_lists(users, items, masked(), 10)


def test_a_cpu_whose_tiles_give_other_sums_uses_float32(monkeypatch):
    users, items = vectors()
    scores = ReducedProducts.scores
    monkeypatch.setattr(ReducedProducts, "scores", lambda *given: scores(*given) * (1 + 2.0**-22))
    assert ProductScores(users, items).reduced(10) is None
    assert_same_lists(users, items, masked(), 10)


def test_products_that_are_worse_than_promised_are_found_out():
    users, items = vectors()
    reduced = ReducedProducts(items)
    reduced.copies[:, :DIM] = items * 1.05
    assert reduced.top(users, 10, (torch.zeros(0, dtype=torch.int64),) * 2)[2].all()


def test_blocks_change_nothing():
    users, items = vectors()
    found = []
    for block in (16, 23, USERS):
        one = Ranking(np.arange(USERS), masked())
        one.block = block
        found.append(one.top(users, items, 10))
    for items_found, scores in found[1:]:
        np.testing.assert_array_equal(items_found, found[0][0])
        np.testing.assert_array_equal(scores, found[0][1])


def test_metrics_and_lists_of_the_stage_are_the_same_bytes(tmp_path, monkeypatch, whole_rows):
    rng = np.random.default_rng(8)
    pairs = rng.permutation(USERS * ITEMS)[: USERS * 8]
    split = rng.choice(3, len(pairs), p=[0.8, 0.1, 0.1]).astype(np.int8)
    shop = oracle.write_interactions(tmp_path, *np.divmod(pairs, ITEMS), split, USERS, ITEMS)
    for kind, table in zip(("user", "item"), vectors(8), strict=True):
        shop[f"{kind}_embeddings"] = tmp_path / f"{kind}_embeddings.parquet"
        write_embeddings(shop[f"{kind}_embeddings"], f"{kind}_id", [f"{kind}{i}" for i in range(len(table))], table.numpy(), {"epoch": 3})  # fmt: skip

    def run(name):
        (tmp_path / name).mkdir()
        evaluate(
            **{table: shop[table] for table in ("interactions", "items", "users")},
            files={table: shop[table] for table in ("user_embeddings", "item_embeddings")},
            settings=Evaluation(ks=[5, 10], top_n=20),
            metrics_output=tmp_path / name / "evaluation.json",
            per_user_output=tmp_path / name / "per_user.parquet",
            recommendations_output=tmp_path / name / "recommendations.parquet",
        )
        return sum(whole_rows)

    rows = run("reduced")
    monkeypatch.setattr(ProductScores, "reduced", lambda self, k: None)
    assert run("float32") > 3 * rows
    for path in (tmp_path / "float32").iterdir():
        assert (tmp_path / "reduced" / path.name).read_bytes() == path.read_bytes(), path.name
