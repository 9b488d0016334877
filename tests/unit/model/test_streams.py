"""Propagation of streams: against dense powers, and to the last bit whatever number of streams is processed at a time."""

import numpy as np
import oracles_cm3 as oracle
import pytest
import scipy.sparse as sp
import torch

from cm3.model.graph import SparseMatrix, user_item_matrix
from cm3.model.layer_sums import Joint, Sides
from cm3.model.streams import propagate_streams
from cm3.model.unit_rows import UnitRows

USERS, ITEMS, STREAMS, DIM = 12, 9, 3, 4


@pytest.fixture
def interactions():
    dense = np.random.default_rng(0).random((USERS, ITEMS)) < 0.3
    dense[4] = False
    return sp.csr_matrix(dense.astype(np.float32))


def leaves(dtype, device):
    generator = torch.Generator().manual_seed(1)
    users = torch.randn(USERS, STREAMS, DIM, generator=generator, dtype=dtype).to(device).requires_grad_()
    return users, torch.randn(ITEMS, STREAMS * DIM, generator=generator, dtype=dtype).to(device).requires_grad_()


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("ids", [None, [3, 0, 3, 4], list(range(USERS))], ids=["whole", "few", "all"])
def test_streams_are_unit_rows_times_the_sum_of_powers_and_so_is_their_gradient(interactions, layers, ids, device):
    users, items = leaves(torch.float64, device)
    adjacency = SparseMatrix(user_item_matrix(interactions)).double().to(device)
    dense = torch.from_numpy(oracle.dense_adjacency(interactions.toarray())).to(device)
    power = sum(torch.linalg.matrix_power(dense, layer) for layer in range(layers + 1))
    unit = (users / users.norm(dim=2, keepdim=True)).flatten(1)
    whole = power @ torch.cat([unit, items])
    rows = slice(None) if ids is None else torch.tensor(ids, device=device)
    expected = whole[:USERS][rows], whole[USERS:]
    found = propagate_streams(adjacency, users, items, layers, None if ids is None else rows)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    grads = tuple(torch.randn_like(x) for x in expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (users, items), grads),
        torch.autograd.grad(expected, (users, items), grads),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("ids", [None, [3, 0, 3, 4], list(range(USERS))], ids=["whole", "few", "all"])
def test_streams_one_at_a_time_are_those_of_one_table_to_the_last_bit(interactions, layers, ids, device):
    adjacency = SparseMatrix(user_item_matrix(interactions)).to(device)
    ids = None if ids is None else torch.tensor(ids, device=device)
    grads, results = None, []
    for table_bytes in (None, 1, 2 * (USERS + ITEMS) * DIM * 4):
        users, items = leaves(torch.float32, device)
        found = propagate_streams(adjacency, users, items, layers, ids, table_bytes)
        grads = grads or tuple(torch.randn_like(x) for x in found)
        results.append([*found, *torch.autograd.grad(found, (users, items), grads)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_of_few_users_equal_those_of_all_to_the_last_bit(interactions):
    adjacency, ids = SparseMatrix(user_item_matrix(interactions)), torch.tensor([3, 0, 4])
    users, items = leaves(torch.float32, "cpu")
    few, rest = propagate_streams(adjacency, users, items, 3, ids)
    all_users, all_items = propagate_streams(adjacency, users, items, 3, torch.arange(USERS))
    assert torch.equal(few, all_users[ids]) and torch.equal(rest, all_items)
    grads = torch.randn_like(few), torch.randn_like(rest)
    spread = torch.zeros_like(all_users).index_add_(0, ids, grads[0])
    found = torch.autograd.grad((few, rest), (users, items), grads)
    expected = torch.autograd.grad((all_users, all_items), (users, items), (spread, grads[1]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_user_of_zeros_stays_zero_and_gets_a_finite_gradient(interactions):
    users, items = leaves(torch.float32, "cpu")
    with torch.no_grad():
        users[2] = 0
    found = propagate_streams(SparseMatrix(user_item_matrix(interactions)), users, items, 1)
    (gradient,) = torch.autograd.grad(found[0].square().sum(), users)
    assert torch.isfinite(found[0]).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("ids", [None, [3, 0, 3, 4], list(range(USERS))], ids=["whole", "few", "all"])
def test_users_and_items_in_turn_are_those_of_one_table_to_the_last_bit(interactions, layers, ids):
    users, items = (x.detach() for x in leaves(torch.float32, "cpu"))
    adjacency = SparseMatrix(user_item_matrix(interactions))
    chosen, columns = None if ids is None else torch.tensor(ids), slice(DIM, 3 * DIM)
    results = []
    for kind in (Sides, Joint):
        sums = kind(adjacency, layers, USERS, chosen)
        given = UnitRows(users, torch.empty(USERS, STREAMS, 1), slice(1, 3))
        generator = torch.Generator().manual_seed(2)
        rows = (USERS if ids is None else len(ids), ITEMS)
        grads = [torch.randn(n, STREAMS * DIM, generator=generator) for n in rows]
        grads[1][2] = -0.0
        found = sums.forward(given, items[:, columns])
        room = torch.full((USERS, STREAMS * DIM), 7.0)[:, columns]
        results.append([*found, *sums.backward(*(grad[:, columns] for grad in grads), room)])
    for a, b in zip(*results, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_sums_share_no_memory_with_what_they_are_of(interactions):
    users, items = (x.detach() for x in leaves(torch.float32, "cpu"))
    for layers in (0, 1):
        sums = Sides(SparseMatrix(user_item_matrix(interactions)), layers, USERS, None)
        found = sums.forward(UnitRows(users, torch.empty(USERS, STREAMS, 1), slice(0, STREAMS)), items)
        assert found[1].data_ptr() != items.data_ptr()
        assert sums.backward(found[0], items, torch.empty_like(found[0]))[1].data_ptr() != items.data_ptr()
