"""Alignment and uniformity against loops over pairs."""

import numpy as np
import oracles_cm3 as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.model.losses import alignment, calibrated_uniformity, uniformity
from cm3.model.pair_potential import tiled_calibrated_uniformity, tiled_uniformity


@pytest.fixture
def rows() -> np.ndarray:
    return oracle.unit_rows(np.random.default_rng(0).standard_normal((23, 6)))


def test_alignment(rows, device):
    other = rows[::-1].copy()
    expected = np.mean([((a - b) ** 2).sum() for a, b in zip(rows, other, strict=True)])
    found = alignment(torch.from_numpy(rows).to(device), torch.from_numpy(other).to(device))
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("t", [0.5, 2.0])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_uniformity(rows, t, scale, device):
    expected = pytest.approx(oracle.log_mean_potential(rows * scale, None, t), rel=1e-12)
    x = torch.from_numpy(rows * scale).to(device)
    assert float(uniformity(x, t)) == expected
    assert float(tiled_uniformity(x, t)) == expected and float(tiled_uniformity(x, t, block_rows=5)) == expected


@pytest.mark.parametrize("symmetric", [True, False])
def test_calibrated_uniformity(rows, symmetric, device):
    similarity = np.random.default_rng(2).uniform(-0.2, 1, (len(rows), len(rows)))
    if symmetric:
        similarity = (similarity + similarity.T) / 2
    found = calibrated_uniformity(torch.from_numpy(rows).to(device), torch.from_numpy(similarity).to(device))
    assert float(found) == pytest.approx(oracle.log_mean_potential(rows, similarity), rel=1e-12)


def test_tiled_calibrated_uniformity(rows, device):
    similarity = (rows @ rows.T).clip(0, 0.9)
    x = torch.from_numpy(rows).to(device)
    found = tiled_calibrated_uniformity(x, x, (0, 0.9), block_rows=5)
    assert float(found) == pytest.approx(oracle.log_mean_potential(rows, similarity), rel=1e-12)


def test_counts_are_repetitions_without_the_pairs_of_equal_ids(rows):
    rng = np.random.default_rng(3)
    ids = rng.integers(0, len(rows), 60)
    present, counts = np.unique(ids, return_counts=True)
    similarity = rng.uniform(0, 1, (len(rows), len(rows)))
    similarity = (similarity + similarity.T) / 2
    x, n = torch.from_numpy(rows[present]), torch.from_numpy(counts)
    assert float(uniformity(x, 2.0, n)) == pytest.approx(oracle.log_mean_potential(rows[ids], ids=ids), rel=1e-12)
    found = calibrated_uniformity(x, torch.from_numpy(similarity[np.ix_(present, present)]), 2.0, n)
    expected = oracle.log_mean_potential(rows[ids], similarity[np.ix_(ids, ids)], ids=ids)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    # Kept, the pairs of equal ids lie at distance zero and weigh on the loss.
    assert float(uniformity(torch.from_numpy(rows[ids]))) > float(uniformity(x, 2.0, n))


def test_gradients_match_finite_differences(rows):
    x = torch.from_numpy(rows[:7].copy()).requires_grad_()
    similarity = torch.rand(7, 7, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([1, 2, 1, 5, 1, 1, 3])
    assert torch.autograd.gradcheck(lambda a: uniformity(a, 2.0), x)
    assert torch.autograd.gradcheck(lambda a, s: calibrated_uniformity(a, s, 2.0, counts), (x, similarity))
    assert torch.autograd.gradgradcheck(lambda a: uniformity(a, 2.0, counts), x)


@pytest.mark.parametrize("counts", [None, 3])
@pytest.mark.parametrize("n", [0, 1])
def test_no_pair_gives_zero_and_no_gradient(n, counts):
    x = torch.ones(n, 3, dtype=torch.float64, requires_grad=True)
    value = uniformity(x, counts=None if counts is None else torch.full((n,), counts))
    value.backward()
    assert float(value.detach()) == 0 and x.grad is not None and not x.grad.any()


def test_far_apart_rows_do_not_underflow():
    x = torch.tensor([[0.0], [100.0], [250.0]])
    # exp(-20000) is 0 in any float; the log of the mean is not.
    assert float(uniformity(x)) == pytest.approx(-20000 - np.log(3), rel=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 12))
def test_uniformity_is_between_the_poles_and_blind_to_order(seed, n):
    x = oracle.unit_rows(np.random.default_rng(seed).standard_normal((n, 4)))
    value = float(uniformity(torch.from_numpy(x)))
    assert -8 - 1e-9 <= value <= 1e-9
    shuffled = x[np.random.default_rng(seed + 1).permutation(n)]
    assert float(uniformity(torch.from_numpy(shuffled))) == pytest.approx(value, abs=1e-12)


def test_similarity_one_removes_the_calibration_offset(rows):
    x = torch.from_numpy(rows)
    ones = torch.ones(len(rows), len(rows), dtype=torch.float64)
    torch.testing.assert_close(calibrated_uniformity(x, ones), uniformity(x))
    torch.testing.assert_close(calibrated_uniformity(x, 0 * ones), uniformity(x) + 4.0)
