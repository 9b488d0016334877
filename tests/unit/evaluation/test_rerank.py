"""Re-ranking against a loop over users, and the choice of weights."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cm3.evaluation import rerank as module
from cm3.evaluation.ranking import Ranking
from cm3.evaluation.rerank import Candidates, Reranker, choose_weights, standardised

USERS, ITEMS = 37, 50


def scores(seed: int) -> torch.Tensor:
    return torch.randn(USERS, ITEMS, generator=torch.Generator().manual_seed(seed))


def scorer(table: torch.Tensor) -> module.Score:
    return lambda rows: table[rows].clone()


@pytest.fixture
def masked() -> sp.csr_matrix:
    return sp.random_array((USERS, ITEMS), density=0.2, rng=np.random.default_rng(1), format="csr")


def reference(
    base: np.ndarray, parts: dict[str, np.ndarray], seen: np.ndarray, top: int, weights: dict[str, float]
) -> list:
    """The items of one user, best first, by the definition."""
    ranked = [int(item) for item in np.argsort(-base, kind="stable") if not seen[item]]
    first = ranked[:top]

    def z(values: np.ndarray) -> np.ndarray:
        chosen = values[first].astype(np.float64)
        return (chosen - chosen.mean()) / chosen.std() if len(first) > 1 else np.zeros(len(first))

    total = z(base) + sum(weights[name] * z(values) for name, values in parts.items())
    return [first[at] for at in np.argsort(-total, kind="stable")] + ranked[top:]


@pytest.mark.parametrize("top", [1, 5, 30, 500])
@pytest.mark.parametrize("k", [3, 20, 60])
def test_lists_are_those_of_the_definition(masked: sp.csr_matrix, top: int, k: int):
    base, parts, weights = scores(1), {"a": scores(2), "b": scores(3)}, {"a": 0.8, "b": 0.3}
    reranker = Reranker(scorer(base), {name: scorer(table) for name, table in parts.items()}, top, weights)
    users = np.arange(0, USERS, 2)
    items, values = reranker(Ranking(users, masked), k)
    assert items.shape == values.shape == (len(users), k)
    for row, user in enumerate(users):
        wanted = reference(
            base[user].numpy(),
            {n: t[user].numpy() for n, t in parts.items()},
            masked[[user]].toarray()[0] > 0,
            top,
            weights,
        )
        length = min(k, len(wanted))
        assert items[row, :length].tolist() == wanted[:length]
        assert (items[row, length:] == -1).all() and np.isinf(values[row, length:]).all()
        assert (np.diff(values[row, :length]) <= 0).all()


def test_weights_of_zero_keep_the_lists_of_the_base_model(masked: sp.csr_matrix):
    ranking = Ranking(np.arange(USERS), masked)
    items, _ = Reranker(scorer(scores(1)), {"a": scorer(scores(2))}, 20, {"a": 0.0})(ranking, 10)
    assert np.array_equal(items, ranking.top_by(scorer(scores(1)), 10)[0])


def test_small_blocks_give_the_same(masked: sp.csr_matrix, monkeypatch: pytest.MonkeyPatch):
    reranker = Reranker(scorer(scores(1)), {"a": scorer(scores(2))}, 20, {"a": 1.0})
    whole = reranker(Ranking(np.arange(USERS), masked), 10)
    monkeypatch.setattr(module, "block_users", lambda n_items, device: 16)
    assert all(map(np.array_equal, reranker(Ranking(np.arange(USERS), masked), 10), whole))


def test_equal_scores_and_short_lists_are_standardised_to_zero():
    there = np.array([[True, True, True], [True, False, False], [False, False, False]])
    values = np.array([[0.1, 0.1, 0.1], [5, 9, 9], [1, 2, 3]], np.float32)
    assert np.array_equal(standardised(values, there), np.zeros((3, 3)))


def test_the_weight_that_finds_the_truth_is_chosen(masked: sp.csr_matrix):
    base, good, bad = scores(1), scores(2), scores(3)
    empty = sp.csr_matrix(masked.shape)
    ranking = Ranking(np.arange(USERS), empty)
    items, found = ranking.top_by(scorer(base), 20)
    best = np.argsort(-np.take_along_axis(good.numpy(), items, 1), axis=1)[:, :3]
    rows = np.repeat(np.arange(USERS), 3)
    truth = sp.csr_matrix((np.ones(len(rows)), (rows, np.take_along_axis(items, best, 1).ravel())), masked.shape)
    candidates = Candidates.of(ranking, items, found, {"good": scorer(good), "bad": scorer(bad)})
    weights, tried = choose_weights(candidates, items, truth, "recall@3", [0, 0.5, 20], {})
    assert weights["good"] == 20 and weights["bad"] < 20
    assert len(tried) == 9 and max(row["recall@3"] for row in tried) > 0.9
    given, _ = choose_weights(candidates, items, truth, "recall@3", [0, 0.5, 20], {"bad": 0.5})
    assert given["bad"] == 0.5


def test_of_equal_values_the_smallest_weights_are_chosen():
    candidates = Candidates(np.zeros((1, 2), np.float32), {"a": np.zeros((1, 2), np.float32)})
    weights, _ = choose_weights(
        candidates, np.array([[0, 1]]), sp.csr_matrix(np.ones((1, 2))), "recall@2", [0.5, 0, 1], {}
    )
    assert weights == {"a": 0}
