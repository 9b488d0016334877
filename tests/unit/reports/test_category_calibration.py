"""Calibration by category against its formula in plain loops."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from cm3.common.tables import ITEMS
from cm3.reports.analysis import category_calibration
from cm3.reports.analysis.category_calibration import category_divergence, read_item_categories

CATEGORIES = [["shoes", "red"], ["shoes"], ["hats", "red", "wool"], None, ["hats", "hats"], [], ["wool"]]


def item_table(path, categories):
    columns = {name: pa.nulls(len(categories), ITEMS.field(name).type) for name in ITEMS.names}
    columns["item_id"] = pa.array([f"item{i}" for i in range(len(categories))])
    columns["categories"] = pa.array(categories, ITEMS.field("categories").type)
    pq.write_table(pa.table(columns, schema=ITEMS), path)
    return path


def shares(items):
    found = {}
    counted = [set(CATEGORIES[i]) for i in items if CATEGORIES[i]]
    for names in counted:
        for name in names:
            found[name] = found.get(name, 0) + 1 / len(names) / len(counted)
    return found


def expected(histories, lists, k):
    values = []
    for history, found in zip(histories, lists, strict=True):
        p, q = shares(history), shares([i for i in found[:k] if i >= 0])
        if p and q:
            values.append(sum(x * math.log(x / (0.99 * q.get(c, 0) + 0.01 * x)) for c, x in p.items()))
    return sum(values) / len(values)


HISTORIES = [[0, 1], [2, 3, 4], [3], [6, 0, 2], [1]]
LISTS = np.array([[2, 4, 1], [0, 3, -1], [0, 1, 2], [5, 6, -1], [-1, -1, -1]])


def history() -> sp.csr_matrix:
    x = np.zeros((5, 7), np.float32)
    for user, items in enumerate(HISTORIES):
        x[user, items] = 1
    return sp.csr_matrix(x)


@pytest.mark.parametrize("entries", [1, 1000])
def test_it_is_the_divergence_of_the_two_distributions(tmp_path, monkeypatch, entries):
    monkeypatch.setattr(category_calibration, "BLOCK_ENTRIES", entries)
    categories = read_item_categories(item_table(tmp_path / "items.parquet", CATEGORIES))
    found = category_divergence(LISTS, history(), categories, [1, 3, 20])
    assert set(found) == {"category_divergence@1", "category_divergence@3"}
    for k in (1, 3):
        assert found[f"category_divergence@{k}"] == pytest.approx(expected(HISTORIES, LISTS, k), rel=1e-12)


def test_a_list_of_the_same_proportions_has_none(tmp_path):
    categories = read_item_categories(item_table(tmp_path / "items.parquet", CATEGORIES))
    lists = np.array([[0, 1, -1], [4, 2, -1], [3, -1, -1], [0, 6, 2], [1, -1, -1]])
    found = category_divergence(lists, history(), categories, [3])
    assert found["category_divergence@3"] == pytest.approx(0, abs=1e-15)


def test_items_without_any_category_give_nothing(tmp_path):
    assert read_item_categories(item_table(tmp_path / "items.parquet", [None, [], None])) is None


def test_users_without_a_category_are_left_out(tmp_path):
    categories = read_item_categories(item_table(tmp_path / "items.parquet", CATEGORIES))
    found = category_divergence(np.array([[3], [5]]), history()[2:4], categories, [1])
    assert found == {"category_divergence@1": 0.0}
