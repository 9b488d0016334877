"""The gap between groups of users: how much better a model serves the best served group than the worst."""

from collections.abc import Sequence

import numpy as np

from cm3.reports.analysis.slices import history_bins

THIRDS = (1 / 3, 2 / 3, 1.0)


def activity_groups(lengths: np.ndarray) -> list[np.ndarray]:
    """Return the thirds of (R,) test users by their number of training items, as (R,) masks; see `history_bins`."""
    return [mask for _, mask in history_bins(lengths, THIRDS)]


CHANCE = 0.95
"""Share of the gaps between random groups that are below `chance_gaps`."""

_DRAWS = 10_000


def gap_name(metric: str, column: str = "") -> str:
    """Return the name of the gap of a metric such as recall@20: recall_gap@20, or recall_gap_{column}@20."""
    name, _, k = metric.partition("@")
    return f"{name}_gap{column and f'_{column}'}@{k}"


def chance_name(metric: str, column: str) -> str:
    """Return the name of what `chance_gaps` returns of a metric such as recall@20: recall_gap_{column}_chance@20."""
    return gap_name(metric, f"{column}_chance")


def chance_gaps(
    values: np.ndarray, metrics: Sequence[str], groups: Sequence[np.ndarray], column: str
) -> dict[str, float]:
    """Return by `chance_name` what the gap of random groups of the same sizes stays below in 95 % of cases.

    The range of means is never negative, so that groups that do not differ have a gap as well. For users of standard
    deviation s it is s times the 95 % quantile of the range of independent normal values of variance 1 / n_g, for groups of
    n_g users; 10,000 drawn with a fixed seed. Empty for fewer than two groups.

    Args:
        values, metrics, groups, column: as `group_gaps`.
    """
    if len(groups) < 2:
        return {}
    sizes = np.array([mask.sum() for mask in groups])
    means = np.random.default_rng(0).standard_normal((_DRAWS, len(groups))) / np.sqrt(sizes)
    quantile = np.quantile(np.ptp(means, axis=1), CHANCE)
    spread = values[np.logical_or.reduce(groups)].std(0)
    return {chance_name(m, column): float(s * quantile) for m, s in zip(metrics, spread, strict=True)}


def group_gaps(
    values: np.ndarray, metrics: Sequence[str], groups: Sequence[np.ndarray], column: str = ""
) -> dict[str, float]:
    """Return by `gap_name` the largest mean of a metric over a group minus the smallest; empty for fewer than two groups.

    Args:
        values: (R, M) metrics of each user.
        metrics: their M names, such as recall@20.
        groups: (R,) masks, none of them empty.
        column: of the users' table, by which the groups are; empty for groups by activity.

    Source: Li et al., User-oriented fairness in recommendation (WWW 2021), equation 2, there of two groups.
    """
    if len(groups) < 2:
        return {}
    means = np.stack([values[mask].mean(0) for mask in groups])
    gaps = means.max(0) - means.min(0)
    return {gap_name(metric, column): float(gap) for metric, gap in zip(metrics, gaps, strict=True)}
