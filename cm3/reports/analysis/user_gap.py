"""The gap between groups of users: how much better a model serves the best served group than the worst."""

from collections.abc import Sequence

import numpy as np

from cm3.reports.analysis.slices import history_bins

THIRDS = (1 / 3, 2 / 3, 1.0)


def activity_groups(lengths: np.ndarray) -> list[np.ndarray]:
    """Return the thirds of (R,) test users by their number of training items, as (R,) masks; see `history_bins`."""
    return [mask for _, mask in history_bins(lengths, THIRDS)]


def gap_name(metric: str, column: str = "") -> str:
    """Return the name of the gap of a metric such as recall@20: recall_gap@20, or recall_gap_{column}@20."""
    name, _, k = metric.partition("@")
    return f"{name}_gap{column and f'_{column}'}@{k}"


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
