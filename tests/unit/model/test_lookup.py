"""Rows of a table and their gradient, against the gradient of a whole table."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from cm3.model.lookup import FEW, lookup
from cm3.model.network import Embeddings, Loss, backward

N, D = 200, 5


def leaf():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1)).requires_grad_()


def draws(count=3, n=N // FEW):
    """Ids with repetitions, several times."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, N // 3, (n,), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_gradients_of_several_losses_are_those_of_whole_tables_to_the_last_bit(index):
    expected, found = leaf(), leaf()
    for ids in draws():
        weights = torch.randn(len(ids), D)
        (functional.embedding(ids, expected) * weights).sum().backward()
        (lookup(found, ids.to(index)) * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0)
    assert (found.grad == 0).all(dim=1).any() and (found.grad != 0).any()


def test_one_table_is_made_for_all_losses(monkeypatch):
    made, zeros_like, table = [], torch.zeros_like, leaf()
    monkeypatch.setattr(torch, "zeros_like", lambda x: made.append(x.shape) or zeros_like(x))
    for ids in draws():
        lookup(table, ids).sum().backward()
    assert made == [(N, D)]


@pytest.mark.parametrize(
    ("table", "ids"),
    [(nn.Parameter(leaf().detach()), draws()[0]), (leaf() * 2, draws()[0]), (leaf(), torch.arange(N))],
    ids=["a parameter", "not a leaf", "many rows"],
)
def test_other_tables_and_many_rows_take_the_usual_way(table, ids):
    assert type(lookup(table, ids).grad_fn).__name__ == "EmbeddingBackward0"


def test_a_constant_table_has_no_gradient():
    assert lookup(leaf().detach(), draws()[0]).grad_fn is None


def test_embeddings_that_are_cut_get_the_gradient_of_one_graph():
    def run(take):
        users, items = leaf(), leaf()
        made = Embeddings(users * 2, items.sin())
        losses = [
            lambda e, ids=ids: Loss((take(e.users, ids) * take(e.items, ids.flip(0))).square().sum(), {})
            for ids in draws()
        ]
        loss = backward(made, losses)
        return loss.total, users.grad, items.grad

    for found, expected in zip(run(lookup), run(lambda table, ids: functional.embedding(ids, table)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
