"""Pairwise tests of models: paired over users, corrected over all tests of the study."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cm3.evaluation.registry import larger_is_better
from cm3.reports.analysis.statistics import holm, interval, paired_differences, seed_noise, signed_rank, split_noise

CONFIDENCE, ALPHA = 0.95, 0.05


def pairs_to_test(
    names: Sequence[str], reference: str | None, control_of: Mapping[str, str | None]
) -> list[tuple[str, str]]:
    """Return the pairs (a, b) to test; the reported difference is a - b.

    Without a reference: all pairs, in the order of the study. With one: each other experiment against it, and each
    experiment against its control.
    """
    if reference is None:
        return list(itertools.combinations(names, 2))
    pairs = [(name, reference) for name in names if name != reference]
    for name in names:
        own = control_of.get(name)
        if own is not None and (name, own) not in pairs and (own, name) not in pairs:
            pairs.append((own, name))
    return pairs


def compare_pairs(
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    metrics: Sequence[str],
    per_user: np.ndarray,
    resampled: np.ndarray,
    by_seed: Mapping[str, Mapping[str, Sequence[float]]],
    by_split: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    test_share: float = 0.0,
) -> list[dict[str, Any]]:
    """Test each pair in each metric and correct over all of these tests.

    A difference is significant if the corrected p-value is below 0.05, the interval excludes 0, and ranks and mean
    point in the same direction.

    Args:
        pairs: (a, b) names.
        names, metrics: the experiments and metrics, in the order of the arrays' axes.
        per_user: (n, E, M) values of each user, averaged over seeds and splits.
        resampled: (B, E, M) bootstrap means of the same.
        by_seed: experiment -> metric -> mean of each seed (over its splits).
        by_split: experiment -> metric -> mean of each split over its seeds; None in a study over one split.
        test_share: test interactions per training interaction.

    Returns:
        A dict per pair and metric, as `cm3.reports.analysis.compare` documents it.
    """
    place = {name: i for i, name in enumerate(names)}
    rows: list[dict[str, Any]] = []
    ranks = []
    for a, b in pairs:
        for m, metric in enumerate(metrics):
            x, y = per_user[:, place[a], m], per_user[:, place[b], m]
            differences = paired_differences(x, y)
            low, high = interval(resampled[:, place[a], m] - resampled[:, place[b], m], CONFIDENCE)
            ranks.append(signed_rank(differences))
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "metric": metric,
                    "mean_a": float(x.mean()),
                    "mean_b": float(y.mean()),
                    "difference": float(differences.mean()),
                    "low": float(low),
                    "high": float(high),
                    "p": ranks[-1].p,
                    "users_a": int((differences > 0).sum()),
                    "users_b": int((differences < 0).sum()),
                    "users_equal": int((differences == 0).sum()),
                    "seeds": seed_noise(by_seed[a][metric], by_seed[b][metric], CONFIDENCE),
                }
            )
            if by_split is not None:
                rows[-1]["splits"] = split_noise(by_split[a][metric], by_split[b][metric], test_share, CONFIDENCE)
    for row, rank, p in zip(rows, ranks, holm([row["p"] for row in rows]), strict=True):
        away = (row["low"] > 0 and rank.z > 0) or (row["high"] < 0 and rank.z < 0)
        row["p_holm"] = float(p)
        row["significant"] = bool(p < ALPHA and away)
        row["better"] = (
            None
            if not row["significant"]
            else "a"
            if (row["difference"] > 0) == larger_is_better(row["metric"])
            else "b"
        )
    return rows


def find_pair(rows: Sequence[Mapping[str, Any]], first: str, second: str, metric: str) -> dict[str, Any] | None:
    """Return the tested pair as first - second (better "a" is `first`), or None if it was not tested."""
    for row in rows:
        if row["metric"] == metric and (row["a"], row["b"]) == (first, second):
            return dict(row)
        if row["metric"] == metric and (row["a"], row["b"]) == (second, first):
            return _swapped(row)
    return None


def _swapped(row: Mapping[str, Any]) -> dict[str, Any]:
    noise = {
        kind: {**row[kind], "low": _minus(row[kind]["high"]), "high": _minus(row[kind]["low"])}
        for kind in ("seeds", "splits")
        if kind in row
    }
    return {
        **row,
        "a": row["b"],
        "b": row["a"],
        "mean_a": row["mean_b"],
        "mean_b": row["mean_a"],
        "difference": -row["difference"],
        "low": -row["high"],
        "high": -row["low"],
        "users_a": row["users_b"],
        "users_b": row["users_a"],
        **noise,
        "better": {"a": "b", "b": "a"}.get(row["better"]),
    }


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def best_of(
    names: Sequence[str], metric: str, means: Mapping[str, float], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the experiment with the best mean, and whether it is marked as best.

    It is marked if it is significantly better than every other experiment.
    """
    ordered = sorted(names, key=lambda name: means[name], reverse=larger_is_better(metric))
    best, others = ordered[0], ordered[1:]
    found = {"experiment": best, "next": others[0] if others else None}
    for other in others:
        pair = find_pair(rows, best, other, metric)
        if pair is None:
            return {**found, "marked": False, "reason": f"{best} was not tested against {other}"}
        if pair["better"] != "a":
            return {**found, "marked": False, "reason": f"{best} is not significantly better than {other}"}
    if not others:
        return {**found, "marked": False, "reason": "no other experiment to compare with"}
    return {**found, "marked": True, "reason": f"{best} is significantly better than every other experiment"}
