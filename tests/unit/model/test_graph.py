"""Nearest neighbours, the two graphs, and propagation against dense matrices."""

import warnings

import numpy as np
import oracles_cm3 as oracle
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cm3.similarity.exact
from cm3.model.graph import (
    SparseMatrix,
    add_neighbours,
    add_rows,
    item_item_matrix,
    knn,
    propagate,
    user_item_matrix,
)


def brute_force(x: np.ndarray, k: int, include_self: bool) -> tuple[list[list[int]], np.ndarray]:
    x = x.astype(np.float64)
    norms = np.sqrt((x * x).sum(1))
    scale = np.array([1 / n if n else 0.0 for n in norms])
    cosine = np.float32((x @ x.T) * scale[:, None] * scale[None, :])
    lists = [oracle.ranked(row, set() if include_self else {i}, k) for i, row in enumerate(cosine)]
    return lists, np.take_along_axis(cosine, np.array(lists), 1)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(3, 70),
    distinct=st.integers(1, 70),
    include_self=st.booleans(),
    block=st.sampled_from([1, 200, 8_000_000]),
)
def test_knn_with_repeated_rows_orders_ties_by_lower_index(seed, n, distinct, include_self, block):
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (distinct, 3)).astype(np.float32)[rng.integers(0, distinct, n)]
    k = int(rng.integers(1, n))
    cm3.similarity.exact.BLOCK_ENTRIES, before = block, cm3.similarity.exact.BLOCK_ENTRIES
    try:
        indices, scores = knn(torch.from_numpy(x), k, include_self)
    finally:
        cm3.similarity.exact.BLOCK_ENTRIES = before
    expected, cosine = brute_force(x, k, include_self)
    np.testing.assert_allclose(scores.numpy(), cosine, rtol=0, atol=1e-7)
    # Parallel rows of different length have cosines that round alike only almost always: compare where they do.
    if np.array_equal(scores.numpy(), cosine):
        assert indices.tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_knn_of_wide_rows(dtype, device):
    x = np.random.default_rng(0).standard_normal((300, 700)).astype(dtype)
    x[200:260] = x[17]
    indices, scores = (found.cpu() for found in knn(torch.from_numpy(x).to(device), 10))
    expected, cosine = brute_force(x, 10, True)
    assert indices.tolist() == expected
    np.testing.assert_allclose(scores.numpy(), cosine, rtol=0, atol=1e-7)
    assert scores.numpy().dtype == dtype


def test_knn_follows_a_relabelling_of_rows():
    rng = np.random.default_rng(1)
    x, order = rng.standard_normal((80, 5)).astype(np.float32), rng.permutation(80)
    plain, moved = knn(torch.from_numpy(x), 6)[0].numpy(), knn(torch.from_numpy(x[order]), 6)[0].numpy()
    np.testing.assert_array_equal(order[moved], plain[order])


@pytest.mark.parametrize(("k", "include_self"), [(0, True), (6, True), (5, False)])
def test_knn_refuses_more_neighbours_than_there_are(k, include_self):
    with pytest.raises(ValueError, match=f"k = {k}"):
        knn(torch.rand(5, 3), k, include_self)


def test_knn_refuses_values_that_are_not_finite():
    with pytest.raises(ValueError, match="NaN"):
        knn(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]), 1)


@pytest.fixture
def interactions() -> sp.csr_matrix:
    matrix = (np.random.default_rng(2).random((12, 9)) < 0.3).astype(np.float32)
    matrix[4] = 0  # a user and an item without an edge
    matrix[:, 7] = 0
    return sp.csr_matrix(matrix)


def test_user_item_matrix_is_symmetric_normalised(interactions):
    expected = oracle.dense_adjacency(interactions.toarray())
    np.testing.assert_allclose(user_item_matrix(interactions).toarray(), expected, rtol=1e-12)


def test_repeated_purchases_count_once(interactions):
    twice = sp.csr_matrix(interactions + interactions)
    assert (user_item_matrix(twice) != user_item_matrix(interactions)).nnz == 0


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_propagation_is_the_sum_of_powers_and_so_is_its_gradient(interactions, layers, device):
    dense = torch.from_numpy(oracle.dense_adjacency(interactions.toarray())).to(device)
    power = sum(torch.linalg.matrix_power(dense, layer) for layer in range(layers + 1))
    x = torch.randn(21, 4, dtype=torch.float64, device=device, requires_grad=True)
    y = propagate(SparseMatrix(user_item_matrix(interactions)).double().to(device), x, layers)
    torch.testing.assert_close(y, power @ x, rtol=1e-6, atol=1e-6)
    weights = torch.randn(21, 4, dtype=torch.float64, device=device)
    torch.testing.assert_close(torch.autograd.grad((y * weights).sum(), x)[0], power.T @ weights, rtol=1e-6, atol=1e-6)


def test_item_graph_weighs_modalities_and_rescales_rows_with_missing_ones():
    text = (np.repeat([0, 1, 2], 2), np.array([0, 1, 1, 2, 2, 0]))
    image = (np.repeat([0, 2], 2), np.array([0, 2, 2, 0]))
    graph = item_item_matrix([text, image], [0.75, 0.25], 4).toarray()
    np.testing.assert_allclose(graph[0], [0.5, 0.375, 0.125, 0])
    np.testing.assert_allclose(graph[1], [0, 0.5, 0.5, 0])  # only text: its weight is the whole
    np.testing.assert_allclose(graph.sum(1), [1, 1, 1, 0])


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_add_neighbours_and_its_gradient(layers, device):
    rng = np.random.default_rng(3)
    dense = np.where(rng.random((8, 8)) < 0.4, rng.random((8, 8)), 0).astype(np.float32)
    matrix = sp.csr_matrix(dense)
    power = torch.eye(8, dtype=torch.float64) + torch.linalg.matrix_power(torch.from_numpy(dense).double(), layers)
    power = power.to(device)
    x = torch.randn(8, 3, dtype=torch.float64, device=device, requires_grad=True)
    matrices = (SparseMatrix(some).double().to(device) for some in (matrix, matrix.T.tocsr()))
    y = add_neighbours(*matrices, x, layers)
    torch.testing.assert_close(y, power @ x)
    weights = torch.randn(8, 3, dtype=torch.float64, device=device)
    torch.testing.assert_close(torch.autograd.grad((y * weights).sum(), x)[0], power.T @ weights)


def test_a_matrix_without_entries_gives_zeros():
    empty = SparseMatrix(sp.csr_matrix((4, 5)))
    assert torch.equal(empty.product(torch.ones(5, 2)), torch.zeros(4, 2))


def test_the_sparse_matrix_of_a_device_is_made_once(monkeypatch):
    made, make = [], torch.sparse_csr_tensor

    def count(*arguments, **options):
        made.append(1)
        return make(*arguments, **options)

    monkeypatch.setattr(torch, "sparse_csr_tensor", count)
    matrix = SparseMatrix(sp.random_array((7, 5), density=0.4, format="csr", rng=0))
    x = torch.randn(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            torch.testing.assert_close(matrix.csr_product(x), matrix.product(x))
    assert len(made) == 1
    torch.testing.assert_close(matrix.csr_product(x.double()), matrix.product(x.double()))
    assert len(made) == 2
    matrix.to("cpu")
    matrix.csr_product(x)
    assert len(made) == 3, "after a move"


@pytest.mark.parametrize("columns", [slice(0, 8), slice(8, 16), slice(0, 24), slice(4, 12), slice(0, 9), slice(23, 24)])
def test_rows_are_added_to_columns_of_a_wider_table_in_their_order(columns):
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(50, 24, generator=generator)
    ids = torch.randint(0, 50, (400,), generator=generator)
    rows = torch.randn(400, 24, generator=generator)[:, columns]
    expected = table.clone()
    for place, row in zip(ids.tolist(), rows, strict=True):
        expected[place, columns] += row
    found = table.clone()
    add_rows(found[:, columns], ids, rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
