"""Ids, vectors and small data in cm3.fit: missing ids are errors, and errors are in the terms of the caller."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
import torch

import cm3

SMALL = {"embedding_dim": 4, "knn_k": 3}
QUICK = {"epochs": 1, "device": "cpu"}
RNG = np.random.default_rng(0)
USERS = np.repeat(np.arange(12), 4)
ITEMS = np.concatenate([RNG.choice(8, 4, replace=False) for _ in range(12)])
VECTORS = RNG.normal(size=(8, 5))


def fit(
    users: Any = USERS, items: Any = ITEMS, table: Any = None, vectors: Any = VECTORS, **settings: Any
) -> cm3.Recommender:
    pairs = {"user": users, "item": items} if table is None else table
    rows = len(vectors) if not sp.issparse(vectors) else vectors.shape[0]
    return cm3.fit(pairs, {"text": vectors}, range(rows), SMALL | settings.pop("model", {}), QUICK, **settings)


WITHOUT_ONE = [*map(str, USERS[:-1])]


@pytest.mark.parametrize(
    ("users", "complaint"),
    [
        ([*WITHOUT_ONE, None], "None is empty"),
        ([*WITHOUT_ONE, ""], "'' is empty"),
        ([*WITHOUT_ONE, "nan"], "'nan' is the text of a missing value"),
        ([*WITHOUT_ONE, float("nan")], "nan is a missing value"),
        ([*WITHOUT_ONE, pd.NaT], "NaT is a missing value"),
        ([*WITHOUT_ONE, np.datetime64("NaT")], "is a missing value"),
        (pd.Series([*USERS[:-1], None], dtype="Int64"), "<NA> is a missing value"),
        (pd.Series([*USERS[:-1], None], dtype="float64"), "nan is a missing value"),
        (pd.Series([*WITHOUT_ONE, None]), "is a missing value|is empty"),
        (pd.Series([*WITHOUT_ONE, None], dtype="string"), "<NA> is a missing value"),
        (pd.Series(pd.Categorical([*WITHOUT_ONE, None])), "nan is a missing value"),
        (pa.array([*WITHOUT_ONE, None]), "None is empty"),
        ([*USERS[:-1], 1.5], r"1\.5 is not a whole number"),
        ([*USERS[:-1], True], "True is a truth value"),
        ([*USERS[:-1], {"id": 1}], r"{'id': 1} is an object"),
        ([*USERS[:-1], pd.Timestamp("2020-01-01")], "is a Timestamp; ids must be text or integers"),
        ([*WITHOUT_ONE, b"\xff"], "is binary data, not UTF-8 text"),
        ([*WITHOUT_ONE, "a\ud800"], "has half of a character"),
    ],
)
def test_a_missing_or_invalid_id_is_never_a_user(users: Any, complaint: str):
    with pytest.raises(ValueError, match=rf"interactions\['user'\], row 47: .*({complaint})"):
        fit(users)


def test_a_missing_id_is_never_an_item():
    with pytest.raises(ValueError, match=r"interactions\['item'\], row 47: nan is a missing value"):
        fit(items=[*ITEMS[:-1], float("nan")])
    with pytest.raises(ValueError, match=r"item_ids, row 1: None is empty"):
        cm3.fit({"user": ["u"], "item": ["i"]}, {"text": np.ones((2, 2))}, ["i", None])


class PolarsLike:
    """A column with the methods of polars that are used: it has no `tolist` and no `to_pylist`."""

    def __init__(self, values: Any) -> None:
        self.values = list(map(int, values))

    def to_list(self) -> list[int]:
        return self.values


@pytest.mark.parametrize(
    "convert",
    [
        lambda ids: ids.astype(np.float64),
        lambda ids: ids.astype(np.uint8),
        lambda ids: pd.Series(ids).astype("Int64"),
        lambda ids: pd.Series(ids).astype("category").cat.add_categories([99]),
        lambda ids: pd.Series(ids).astype("float64"),
        lambda ids: pd.Series(ids).astype(str),
        lambda ids: pa.array(map(str, ids)).dictionary_encode(),
        lambda ids: [str(x).encode() for x in ids],
        lambda ids: torch.from_numpy(ids),
        PolarsLike,
    ],
)
def test_the_type_of_a_column_does_not_change_the_ids(convert: Callable[[Any], Any]):
    expected, found = fit(), fit(convert(USERS), convert(ITEMS))
    assert found.user_ids == expected.user_ids and found.item_ids == expected.item_ids
    assert np.array_equal(found.users, expected.users)
    assert cm3.recommend(found, convert(np.arange(3)), k=2) == cm3.recommend(expected, [0, 1, 2], k=2)


def test_a_column_that_is_absent_or_duplicated_is_named():
    with pytest.raises(ValueError, match=r"has no column 'user' \(did you mean 'usr'\?\)"):
        fit(table=pd.DataFrame({"usr": USERS, "item": ITEMS}))
    for table in (
        pd.DataFrame([[1, 2, 3]], columns=["user", "user", "item"]),
        pa.Table.from_arrays([[1], [2], [3]], names=["user", "user", "item"]),
    ):
        with pytest.raises(ValueError, match="duplicate column 'user'"):
            fit(table=table)


@pytest.mark.parametrize(
    "convert", [lambda x: torch.tensor(x, requires_grad=True), sp.csr_matrix, lambda x: x.tolist(), pd.DataFrame]
)
def test_vectors_of_every_kind_are_the_same(convert: Callable[[Any], Any]):
    assert np.array_equal(fit(vectors=convert(VECTORS)).users, fit().users)


def test_a_narrow_tensor_is_read():
    assert np.isfinite(fit(vectors=torch.tensor(VECTORS).bfloat16()).users).all()


ZERO, FEW = np.zeros((8, 5)), np.where(np.arange(8)[:, None] < 2, VECTORS, np.nan)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (
            {"model": {"knn_k": 10}},
            r"features\['text'\]: 8 items have a vector .* fewer than model\.knn_k = 10; set model\.knn_k to 8",
        ),
        ({"vectors": FEW}, r"features\['text'\]: 2 items have a vector .* set model\.knn_k to 2 or less"),
        ({"vectors": ZERO}, r"features\['text'\]: all vectors are zero"),
        ({"vectors": np.zeros((8, 0))}, r"features\['text'\]: \(8, 0\) is not \(8, d\)"),
        ({"vectors": VECTORS * 1e60}, r"features\['text'\]: holds a number beyond float32"),
        ({"vectors": [["a"] * 5] * 8}, r"features\['text'\]: not an array of numbers"),
        ({"vectors": [{"x": 1}] * 8}, r"features\['text'\]: not an array of numbers"),
        ({"valid_share": 0.0}, "holds out none of 48 interactions for validation; raise it"),
        ({"valid_share": 1.5}, r"valid_share = 1\.5: must be between 0 and 1"),
        ({"valid_share": float("nan")}, "valid_share = nan: must be between 0 and 1"),
        ({"users": np.arange(48)}, "each of the 48 users has only one, which is needed for training"),
        ({"users": [], "items": []}, "interactions: has no rows"),
    ],
)
def test_errors_are_in_the_terms_of_the_caller(changed: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=complaint) as error:
        fit(**changed)
    assert ("raise it" in str(error.value)) == ("0.0 holds out none" in str(error.value))


def test_lists_have_a_length_and_one_id_gives_one_list():
    model = fit()
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k = {k}: must be at least 1"):
            cm3.recommend(model, [0], k=k)
        with pytest.raises(ValueError, match=f"k = {k}: must be at least 1"):
            cm3.similar_items(model, [0], k=k)
    for one in ("0", 0, np.int64(0)):
        assert cm3.recommend(model, one, k=3) == cm3.recommend(model, ["0"], k=3)[0]
        assert cm3.similar_items(model, one, k=3) == cm3.similar_items(model, ["0"], k=3)[0]
    with pytest.raises(ValueError, match=r"interactions\['user'\] = '0': is one id; give a list of ids"):
        fit(users="0")
