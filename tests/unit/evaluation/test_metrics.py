"""Top-k, full ranking and metrics against set arithmetic."""

import re
import subprocess
import sys

import numpy as np
import oracles_cm3 as oracle
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import ROOT

import cm3.evaluation.ranking
from cm3.common.topk import top_k
from cm3.evaluation.metrics import per_user
from cm3.evaluation.products import ProductScores
from cm3.evaluation.ranking import Ranking, Validation, block_users
from cm3.evaluation.registry import METRICS, metric_class

KS = [1, 3, 5, 10]


def random_case(seed: int, n_users: int = 30, n_items: int = 25) -> tuple[np.ndarray, list[set[int]]]:
    rng = np.random.default_rng(seed)
    recommended = np.stack([rng.permutation(n_items)[:10] for _ in range(n_users)])
    truth = [set(rng.permutation(n_items)[: rng.integers(0, 15)].tolist()) for _ in range(n_users)]
    return recommended, truth


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_per_user_is_the_definition(seed):
    recommended, truth = random_case(seed)
    found = per_user(recommended, oracle.csr([sorted(t) for t in truth], 25), KS)
    assert set(found) == {f"{name}@{k}" for name in METRICS for k in KS}
    for k in KS:
        for user, relevant in enumerate(truth):
            for name, value in oracle.metrics_of(recommended[user].tolist(), relevant, k).items():
                got = found[f"{name}@{k}"][user]
                assert got == pytest.approx(value, abs=1e-14), (name, k, user)
                assert 0 <= got <= 1


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_metrics_ignore_the_order_of_users_and_item_numbers(seed):
    recommended, truth = random_case(seed)
    matrix = oracle.csr([sorted(t) for t in truth], 25)
    rng = np.random.default_rng(seed)
    order, names = rng.permutation(len(truth)), rng.permutation(25)
    back = np.argsort(names)
    base, moved = per_user(recommended, matrix, KS), per_user(names[recommended][order], matrix[order][:, back], KS)
    for name, values in base.items():
        np.testing.assert_array_equal(values[order], moved[name])


def test_a_perfect_list_scores_one_and_no_item_scores_nothing():
    truth = oracle.csr([[0, 1, 2], [3]], 5)
    perfect = per_user(np.array([[2, 0, 1], [3, -1, -1]]), truth, [3])
    one = {name for name, value in perfect.items() if (value == 1).all()}
    assert one & {f"{name}@3" for name in oracle.metrics_of([], {0}, 3)} == {
        "recall@3",
        "ndcg@3",
        "map@3",
        "hitrate@3",
        "mrr@3",
    }
    nothing = per_user(np.full((2, 3), -1), truth, [3])
    assert not any(value.any() for value in nothing.values())


def test_stored_zeros_are_not_relevant():
    truth = sp.csr_matrix((np.array([1.0, 0.0]), np.array([0, 1]), np.array([0, 2])), (1, 3))
    found = per_user(np.array([[1, 0, 2]]), truth, [1, 3])
    assert found["recall@1"][0] == 0 and found["recall@3"][0] == 1


@pytest.mark.parametrize("k", [0, 11])
def test_a_cut_off_that_the_lists_do_not_reach_is_refused(k):
    recommended, truth = random_case(0)
    with pytest.raises(ValueError, match=f"k = {k}"):
        per_user(recommended, oracle.csr([sorted(t) for t in truth], 25), [k])


def test_an_item_outside_the_matrix_is_refused():
    with pytest.raises(ValueError, match="item 5"):
        per_user(np.array([[5]]), oracle.csr([[0]], 5), [1])


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 12),
    n=st.integers(12, 70),
    levels=st.integers(1, 99),
    group=st.integers(2, 4),
)
def test_top_k_orders_ties_by_lower_index(device, seed, k, n, levels, group):
    scores = np.random.default_rng(seed).integers(0, levels, (7, n)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cm3.common.topk.GROUP", group)
        indices, values = (found.cpu() for found in top_k(torch.from_numpy(scores).to(device), k))
    for row, found in zip(scores, indices.tolist(), strict=True):
        assert found == oracle.ranked(row, set(), k)
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(scores, indices.numpy(), 1))


@pytest.mark.parametrize("block", [1, 60, 10**6])
def test_ranking_masks_ties_and_runs_out_of_items(block, monkeypatch, device):
    for name in ("BLOCK_ENTRIES", "CUDA_BLOCK_ENTRIES"):
        monkeypatch.setattr(cm3.evaluation.ranking, name, block)
    rng = np.random.default_rng(3)
    users, items = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (9, 15))
    masked = [sorted(rng.permutation(15)[: rng.integers(0, 13)].tolist()) for _ in range(9)]
    chosen = np.array([0, 2, 3, 5, 8])
    vectors = (torch.from_numpy(x).to(device) for x in (users, items))
    found, scores = Ranking(chosen, oracle.csr(masked, 15), device).top(*vectors, 20)
    for row, user in enumerate(chosen):
        expected = oracle.ranked(users[user] @ items.T, set(masked[user]), 20)
        assert found[row].tolist() == expected
        assert np.isneginf(scores[row]).tolist() == [item < 0 for item in expected]


@pytest.mark.parametrize("n_users", [1, 15, 16, 17, 100])
def test_blocks_are_padded_to_whole_tiles_of_a_product(n_users):
    rng = np.random.default_rng(6)
    users, items = (torch.from_numpy(rng.standard_normal((n, 4)).astype(np.float32)) for n in (n_users, 30))
    sizes = []

    def score(rows):
        sizes.append(len(rows))
        return users[rows] @ items.T

    found, _ = Ranking(np.arange(n_users), sp.csr_matrix((n_users, 30))).top_by(score, 3)
    assert found.tolist() == [oracle.ranked(row, set(), 3) for row in (users @ items.T).numpy()]
    assert sizes == [-(-n_users // 16) * 16]


def test_the_registry_lists_each_metric_under_its_name():
    for name in METRICS:
        found = metric_class(name)
        assert found.name == name and found.version and found.title


def test_the_registry_imports_nothing_heavy():
    code = "import sys, cm3.evaluation.registry; assert not {'torch', 'scipy', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_docs_have_the_formula_of_each_metric():
    rows = re.findall(r"^\| (\w+) \| (.+) \|$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert [(name, metric_class(name).formula) for name in METRICS] == [row for row in rows if row[0] in METRICS]


@pytest.mark.parametrize("monitor", ["recall@5", "ndcg@5"])
def test_validation_averages_over_users_with_truth(monitor, device):
    rng = np.random.default_rng(4)
    users, items = (torch.from_numpy(rng.standard_normal((n, 4)).astype(np.float32)) for n in (20, 30))
    masked = [sorted(rng.permutation(30)[:6].tolist()) for _ in range(20)]
    truth = [sorted(set(rng.permutation(30)[: rng.integers(0, 5)].tolist()) - set(masked[u])) for u in range(20)]
    validation = Validation(oracle.csr(truth, 30), oracle.csr(masked, 30), monitor, device)
    score = validation.score(users.to(device), items.to(device))
    name = monitor.split("@")[0]
    expected = [
        oracle.metrics_of(oracle.ranked((users @ items.T)[u].numpy(), set(masked[u]), 5), set(truth[u]), 5)[name]
        for u in range(20)
        if truth[u]
    ]
    assert score == pytest.approx(np.mean(expected), rel=1e-12)


def test_validation_needs_someone_to_score():
    with pytest.raises(ValueError, match="no user"):
        Validation(oracle.csr([[], []], 4), oracle.csr([[], []], 4), "recall@2")


@pytest.mark.parametrize("monitor", ["recall@3", "ndcg@5", "precision@5", "ndcg@40"])
@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("levels", [2, 10**3])
def test_hits_that_are_counted_on_the_device(monitor, block, levels):
    """Few levels of scores give ties at the end of nearly every list."""
    rng = np.random.default_rng(block)
    truth, masked = (sp.csr_matrix(rng.random((60, 30)) < share) for share in (0.1, 0.2))
    users = torch.from_numpy(rng.integers(0, levels, (60, 3)).astype(np.float32))
    items = torch.from_numpy(rng.integers(0, levels, (30, 3)).astype(np.float32))
    on_host, counted = (Validation(truth, masked, monitor, on_device=value) for value in (False, True))
    counted.ranking.block = block
    assert counted.score(users, items) == pytest.approx(on_host.score(users, items), rel=1e-12)
    lists = counted.ranking.on_device(lambda rows: users[rows] @ items.T, 5)
    assert levels > 2 or lists.tied.any()
    counted.ranking.settle(lists, lists.tied.tolist(), lambda rows: users[rows] @ items.T)
    expected = on_host.ranking.top(users, items, 5)
    np.testing.assert_array_equal(lists.items, expected[0])
    np.testing.assert_array_equal(lists.scores, expected[1])


def test_lists_do_not_depend_on_the_size_of_a_block():
    users, items = torch.randn(700, 24), torch.randn(3000, 24)
    found = []
    for block in (16, 80, 320, 1000):
        ranking = Ranking(np.arange(700), sp.csr_matrix((700, 3000)))
        ranking.block = block
        found.append(ranking.top(users, items, 30))
    for ids, scores in found[1:]:
        np.testing.assert_array_equal(ids, found[0][0])
        np.testing.assert_array_equal(scores, found[0][1])


@pytest.mark.parametrize(("n_items", "expected"), [(7_050, 992), (100_000, 320), (1_000_000, 33), (10**8, 1)])
def test_blocks_of_users_by_the_number_of_items(n_items, expected):
    assert block_users(n_items, "cpu") == expected


@pytest.mark.parametrize("unit", [False, True])
def test_product_scores_reuse_their_memory(unit, device):
    users, items = torch.randn(9, 4, device=device), torch.randn(5, 4, device=device)
    score = ProductScores(users, items, unit)
    vectors = torch.nn.functional.normalize(users, dim=1) if unit else users
    for rows in (torch.tensor([8, 0, 8]), torch.tensor([2]), torch.arange(9)):
        rows = rows.to(device)
        torch.testing.assert_close(score(rows), vectors[rows] @ items.T)
    assert device != "cpu" or score(torch.tensor([1])).data_ptr() == score(torch.tensor([2])).data_ptr()


def test_additive_metrics_are_sums_over_hits():
    rng = np.random.default_rng(0)
    hits, n_truth = rng.random((50, 8)) < 0.3, rng.integers(1, 12, 50)
    for name in METRICS:
        metric = metric_class(name)
        summed = (hits * cm3.evaluation.ranking.hit_gains(metric, n_truth, 8)).sum(1)
        assert np.allclose(summed, metric.values(hits, n_truth, 8)) == metric.additive, name
