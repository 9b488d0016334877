"""Statistics of a comparison: paired bootstrap, signed-rank test, Holm's correction, variation over seeds."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

_BLOCK_ENTRIES = 8_000_000
_DECIMALS = 12


class SignedRank(NamedTuple):
    """Two-sided p-value and standardised signed-rank statistic; the sign of `z` is the direction of the ranks."""

    p: float
    z: float


def bootstrap_means(values: np.ndarray, resamples: int, seed: int, block_entries: int = _BLOCK_ENTRIES) -> np.ndarray:
    """Return the mean of each column over users drawn with replacement, (resamples, C) float64.

    A resample has the same users for all columns, so that differences of columns are paired differences. It is
    represented by counts, a draw of Multinomial(n; 1/n, ..., 1/n), and a block of resamples is one matrix product.
    Memory is bounded by `block_entries` counts; the draws do not depend on the block size.

    Args:
        values: (n, C), one row per user.
        resamples: number of resamples.
        seed: seed of the draws.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13.
    """
    n = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    size = max(1, min(resamples, block_entries // max(n, 1)))
    counts = np.empty((size, n))
    drawn = np.empty(n, np.int64)  # what bincount counts without a copy
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        for row in range(rows):
            drawn[:] = rng.integers(0, n, n, dtype=np.int32)
            counts[row] = np.bincount(drawn, minlength=n)
        means[start : start + rows] = counts[:rows] @ values
    return means / n


def resampled_splits(n_splits: int, resamples: int, seed: int) -> np.ndarray:
    """Return the share of each split in each resample, (resamples, n_splits): as many splits as there are, with replacement.

    With the resampled users of `bootstrap_means`, both are drawn independently: the bootstrap of two crossed samples.

    Source: Owen, The pigeonhole bootstrap (2007).
    """
    rng = np.random.default_rng([seed, n_splits])
    return rng.multinomial(n_splits, np.full(n_splits, 1 / n_splits), resamples) / n_splits


def interval(draws: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile interval (low, high) of (B, ...) draws along the first axis."""
    outside = (1 - confidence) / 2
    low, high = np.quantile(draws, [outside, 1 - outside], axis=0)
    return low, high


def paired_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a - b of each user, rounded to 12 decimals.

    Means of the same values summed in another order differ in the last bit; without rounding, such a user would count
    as one for whom a model is better.
    """
    found: np.ndarray = np.round(a - b, _DECIMALS) + 0.0
    return found


def signed_rank(differences: np.ndarray) -> SignedRank:
    """Test whether (n,) paired differences are symmetric about 0: Wilcoxon's signed-rank test with Pratt's zeros.

    Zeros take part in the ranking of |d| and are then dropped. The distribution is exact for up to 50 users without
    zeros or ties and up to 13 users with them; otherwise it is the normal approximation with ties accounted for,
    without continuity correction. p is 1 if all differences are 0.

    Source: Wilcoxon (1945); Pratt (1959); Cureton (1967) for the approximation with zeros.
    """
    if not np.any(differences):
        return SignedRank(1.0, 0.0)
    # One-sided, because SciPy's two-sided statistic has no sign.
    z = float(stats.wilcoxon(differences, zero_method="pratt", method="asymptotic", alternative="greater").zstatistic)
    if len(differences) > 50:
        return SignedRank(float(2 * stats.norm.sf(abs(z))), z)
    return SignedRank(float(stats.wilcoxon(differences, zero_method="pratt", method="auto").pvalue), z)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return Holm's step-down adjusted p-values of a family of m tests, in the given order.

    With p sorted ascending, adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)). Rejecting where it is below alpha
    keeps the probability of any false rejection in the family below alpha, whatever the dependence between the tests.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def distribution(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (n - 1; null for one value) and the values."""
    numbers = np.asarray(values, np.float64)
    sd = float(np.sqrt(_variance(numbers))) if len(numbers) > 1 else None
    return {"mean": float(numbers.mean()), "sd": sd, "values": numbers.tolist()}


def seed_noise(a: Sequence[float], b: Sequence[float], confidence: float) -> dict[str, Any]:
    """Compare the difference of two models' means over seeds with the noise of training.

    `low` and `high` are Welch's interval for mean(a) - mean(b), with runs as the sample; `sd` is the standard deviation
    of the difference of one run of each; `exceeds` is whether the interval excludes 0. All are None if either model has
    one run only, because its noise is unknown.

    Source: Welch (1947); Satterthwaite (1946) for the degrees of freedom; `scipy.stats.ttest_ind`.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(len(x), len(y)) < 2:
        return {"low": None, "high": None, "sd": None, "exceeds": None}
    sd = float(np.sqrt(_variance(x) + _variance(y)))
    difference = float(x.mean() - y.mean())
    interval = (difference, difference)
    if sd > 0:
        with warnings.catch_warnings():  # SciPy warns of runs that are all equal
            warnings.simplefilter("ignore", RuntimeWarning)
            interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval(confidence)
    low, high = (float(end) for end in interval)
    return {"low": low, "high": high, "sd": sd, "exceeds": low > 0 or high < 0}


def split_noise(a: Sequence[float], b: Sequence[float], test_share: float, confidence: float) -> dict[str, Any]:
    """Compare the difference of two models with its variation between random splits.

    The difference on each split is one value of the sample; both models have the same splits. `low` and `high` are the
    interval of the corrected resampled t-test: the training interactions of the splits overlap, so the variance of the
    mean is (1 / n + `test_share`) times that of the differences, and not 1 / n times. `sd` is the standard deviation of
    the differences; `exceeds` is whether the interval excludes 0.

    Args:
        a, b: (n,) mean of each split, n at least 2.
        test_share: test interactions per training interaction.
        confidence: of the interval.

    Source: Nadeau and Bengio, Inference for the generalization error (2003).
    """
    differences = paired_differences(np.asarray(a, np.float64), np.asarray(b, np.float64))
    n, sd = len(differences), float(np.sqrt(_variance(differences)))
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd * float(np.sqrt(1 / n + test_share))
    low, high = float(differences.mean()) - reach, float(differences.mean()) + reach
    return {"low": low, "high": high, "sd": sd, "exceeds": low > 0 or high < 0}


def _variance(values: np.ndarray) -> float:
    # Equal values (a closed form's) have variance 0, without the rounding error of their mean.
    return 0.0 if np.all(values == values[0]) else float(values.var(ddof=1))
