"""Each statistic against a plain recomputation, SciPy's exact distribution, or an example worked by hand."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cm3.reports.analysis.statistics import (
    bootstrap_means,
    distribution,
    holm,
    interval,
    paired_differences,
    seed_noise,
    signed_rank,
)

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)
DIFFERENCES = st.lists(st.integers(-4, 4), min_size=1, max_size=80)


def test_a_resample_is_the_same_drawn_users_for_every_column():
    values = np.random.default_rng(1).random((37, 3))
    rng = np.random.default_rng(9)
    plain = [values[rng.integers(0, 37, 37, dtype=np.int32)].mean(0) for _ in range(50)]
    assert np.allclose(bootstrap_means(values, 50, seed=9), plain, rtol=0, atol=1e-14)


def test_the_interval_of_a_mean_is_the_analytic_one_where_that_holds():
    x = np.random.default_rng(2).normal(0.3, 1.0, (2000, 1))
    low, high = interval(bootstrap_means(x, 10_000, seed=0)[:, 0], 0.95)
    error = x.std() / math.sqrt(2000)
    assert low == pytest.approx(x.mean() - 1.96 * error, abs=0.04 * error * 1.96)
    assert high == pytest.approx(x.mean() + 1.96 * error, abs=0.04 * error * 1.96)


def test_the_interval_of_a_paired_difference_ignores_what_users_share():
    # Users differ a hundredfold more than models do; the pairs' interval does not see it.
    rng = np.random.default_rng(3)
    user, gain = rng.normal(0, 10, 1500), rng.normal(0.05, 0.1, 1500)
    means = bootstrap_means(np.column_stack([user + gain, user]), 5000, seed=1)
    low, high = interval(means[:, 0] - means[:, 1], 0.95)
    error = gain.std() / math.sqrt(1500)
    assert low == pytest.approx(gain.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(gain.mean() + 1.96 * error, abs=0.1 * error)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(400):
        low, high = interval(bootstrap_means(rng.normal(0, 1, (120, 1)), 400, seed=trial)[:, 0], 0.95)
        covered += low <= 0 <= high
    # 0.945 expected at 120 users; 400 trials have a standard deviation of 0.0114.
    assert 0.945 - 4 * 0.0114 < covered / 400 < 0.945 + 4 * 0.0114


@pytest.mark.parametrize("block", [1, 37, 37 * 7, 10**9])
def test_the_draws_do_not_depend_on_the_block(block):
    values = np.random.default_rng(1).random((37, 2))
    whole = bootstrap_means(values, 20, seed=3)
    assert np.allclose(bootstrap_means(values, 20, seed=3, block_entries=block), whole, rtol=0, atol=1e-15)


def test_memory_is_that_of_a_block_and_not_of_all_resamples():
    values = np.random.default_rng(1).random((5000, 4))
    tracemalloc.start()
    bootstrap_means(values, 2000, seed=0, block_entries=100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 100_000 * 8, "all counts at once would take 80 MB"


@pytest.mark.parametrize("n", [4, 7, 10])
def test_signed_ranks_of_few_users_have_the_exact_distribution(n):
    differences = np.random.default_rng(n).permutation(np.arange(1, n + 1)) * np.where(np.arange(n) % 3, 1.0, -1.0)
    ranks = stats.rankdata(np.abs(differences))
    observed = abs((np.sign(differences) * ranks).sum())
    # Every assignment of signs is equally likely if differences lie evenly about 0.
    sums = [abs(np.dot(signs, ranks)) for signs in itertools.product((-1, 1), repeat=n)]
    assert signed_rank(differences).p == pytest.approx(np.mean(np.array(sums) >= observed - 1e-9))


def test_zeros_of_few_users_are_ranked_and_left_out():
    differences = np.array([0.0, 0.0, 0.1, 0.2, -0.05, 0.4, 0.7, 0.3, 0.0])
    ranks = stats.rankdata(np.abs(differences))[differences != 0]
    signs = np.sign(differences[differences != 0])
    sums = [abs(np.dot(s, ranks)) for s in itertools.product((-1, 1), repeat=len(ranks))]
    assert signed_rank(differences).p == pytest.approx(np.mean(np.array(sums) >= abs(signs @ ranks) - 1e-9))


def test_many_users_have_the_normal_approximation_with_pratts_zeros():
    rng = np.random.default_rng(5)
    differences = rng.integers(-3, 5, 3000) * (rng.random(3000) < 0.3) / 4
    ranks = stats.rankdata(np.abs(differences)) * (differences != 0)
    z = (np.sign(differences) * ranks).sum() / math.sqrt((ranks**2).sum())
    found = signed_rank(differences)
    assert found.z == pytest.approx(z, rel=1e-10)
    assert found.p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=1e-9)
    assert found.p == pytest.approx(stats.wilcoxon(differences, zero_method="pratt").pvalue, rel=1e-12)


def test_the_approximation_is_near_the_exact_distribution():
    differences = np.random.default_rng(6).normal(0.25, 1, 60)
    exact = stats.wilcoxon(differences, method="exact").pvalue
    assert signed_rank(differences).p == pytest.approx(exact, abs=0.002)


@settings(max_examples=25, deadline=None)
@given(DIFFERENCES)
def test_swapped_models_have_the_same_p_and_the_opposite_lean(found):
    differences = np.array(found) / 8
    there, back = signed_rank(differences), signed_rank(-differences)
    assert 0 <= there.p <= 1
    assert back.p == pytest.approx(there.p, abs=1e-12) and back.z == pytest.approx(-there.z, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(DIFFERENCES, st.randoms(use_true_random=False))
def test_the_order_of_users_changes_no_test(found, random):
    shuffled = random.sample(found, len(found))
    first, second = signed_rank(np.array(found) / 8), signed_rank(np.array(shuffled) / 8)
    assert first.p == pytest.approx(second.p, abs=1e-12) and first.z == pytest.approx(second.z, abs=1e-12)


def test_equal_models_differ_for_no_user():
    assert signed_rank(np.zeros(500)) == (1.0, 0.0)
    # 0.1 + 0.2 and 0.3 are the same mean over seeds in another order.
    a = np.full(100, (0.1 + 0.2 + 0.3) / 3)
    b = np.full(100, (0.3 + 0.2 + 0.1) / 3)
    assert (a != b).all() and not paired_differences(a, b).any()


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.04; then never below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.03]) == pytest.approx([0.03])


@given(P_VALUES, st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_stepping_down_rejects(p, alpha):
    rejected = set()
    for step, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[index] * (len(p) - step) > alpha:
            break
        rejected.add(index)
    assert {i for i, adjusted in enumerate(holm(p)) if adjusted <= alpha} == rejected


@given(P_VALUES)
def test_holm_lies_between_no_correction_and_bonferronis_and_keeps_the_order(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-15).all()
    assert (adjusted <= np.minimum(np.array(p) * len(p), 1) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_the_spread_is_the_sample_standard_deviation():
    found = distribution([0.1, 0.2, 0.6])
    assert found["mean"] == pytest.approx(0.3)
    assert found["sd"] == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    assert found["values"] == [0.1, 0.2, 0.6]
    assert distribution([0.1])["sd"] is None
    assert distribution([0.1] * 3)["sd"] == 0, "equal runs have no distribution, not that of rounding"


def test_the_noise_of_seeds_is_welchs_interval():
    a, b = [0.31, 0.29, 0.35, 0.30, 0.28], [0.27, 0.26, 0.30]
    reference = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    found = seed_noise(a, b, 0.95)
    assert (found["low"], found["high"]) == pytest.approx((reference.low, reference.high))
    assert found["sd"] == pytest.approx(math.sqrt(np.var(a, ddof=1) + np.var(b, ddof=1)))
    assert found["exceeds"] == (reference.low > 0 or reference.high < 0)


def test_noise_is_unknown_from_one_seed_and_none_for_closed_forms():
    assert seed_noise([0.3], [0.2, 0.1], 0.95) == {"low": None, "high": None, "sd": None, "exceeds": None}
    assert seed_noise([0.3] * 5, [0.2] * 5, 0.95)["exceeds"] is True
    assert seed_noise([0.3] * 5, [0.3] * 5, 0.95)["exceeds"] is False
    one_sided = seed_noise([0.3] * 5, [0.29, 0.31, 0.30, 0.28, 0.32], 0.95)
    assert one_sided["exceeds"] is False and one_sided["sd"] == pytest.approx(
        np.std([0.29, 0.31, 0.3, 0.28, 0.32], ddof=1)
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30))
def test_swapping_models_turns_the_interval_round(rows):
    values = np.array(rows)
    there, back = (bootstrap_means(x, 200, seed=5) for x in (values, values[:, ::-1]))
    low, high = interval(there[:, 0] - there[:, 1], 0.95)
    turned_low, turned_high = interval(back[:, 0] - back[:, 1], 0.95)
    assert turned_low == pytest.approx(-high, abs=1e-12) and turned_high == pytest.approx(-low, abs=1e-12)
