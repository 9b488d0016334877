"""comparison.csv: one row per experiment, slice and metric."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cm3.common.files import atomic
from cm3.evaluation.registry import larger_is_better
from cm3.reports.analysis.pairs import find_pair

_OF_SPLITS = ("splits", "exceeds_split_noise")
"""Columns of studies over several splits alone."""
_COLUMNS = (
    "study",
    "experiment",
    "model",
    "control",
    "control_of",
    "slice",
    "metric",
    "users",
    "seeds",
    "splits",
    "mean",
    "sd",
    "low",
    "high",
    "best",
    "against",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "p_holm",
    "significant",
    "exceeds_seed_noise",
    "exceeds_split_noise",
    "point",
    "runs",
    "command",
)


def write_csv(path: Path, result: Mapping[str, Any]) -> None:
    """Write the content of comparison.json as a tidy table: a row per experiment, slice and metric, atomically."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        columns = [column for column in _COLUMNS if "splits" in result["settings"] or column not in _OF_SPLITS]
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        for name in result["experiments"]:
            writer.writerows(_table_rows(name, result))


def _table_rows(name: str, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    entry = result["experiments"][name]
    same = {
        "study": result["study"],
        "experiment": name,
        "model": entry["model"],
        "control": json.dumps(entry["control"]) if entry["control"] else "",
        "control_of": entry["control_of"] or "",
        "seeds": entry["n_seeds"],
        **({"splits": entry["n_splits"]} if "n_splits" in entry else {}),
        "point": json.dumps(entry["point"]),
        "runs": " ".join(dict.fromkeys(entry["runs"])),
        "command": entry["command"],
    }
    rows = []
    for metric, numbers in entry["metrics"].items():
        row = {**same, "slice": "all", "metric": metric, "users": result["counts"]["test_users"]}
        row |= {key: numbers[key] for key in ("mean", "sd", "low", "high", "best")}
        rows.append(row | _against(name, metric, result))
    for part in result["slices"]:
        for metric, numbers in part["metrics"].get(name, {}).items():
            values = {"slice": f"{part['kind']}: {part['name']}", "metric": metric, "users": part["users"]}
            rows.append({**same, **values, "mean": numbers["mean"], "sd": numbers["sd"]})
    for metric, numbers in {**entry["beyond"], **(entry["geometry"] or {}), **entry["cost"]}.items():
        if isinstance(numbers, dict):
            rows.append({**same, "slice": "all", "metric": metric, "mean": numbers["mean"], "sd": numbers["sd"]})
    return rows


def _against(name: str, metric: str, result: Mapping[str, Any]) -> dict[str, Any]:
    # Against the reference; without one, against the best other experiment.
    others = [other for other in result["experiments"] if other != name]
    best_of = max if larger_is_better(metric) else min
    best = best_of(others, key=lambda other: result["experiments"][other]["metrics"][metric]["mean"], default=None)
    against = result["reference"] or best
    pair = find_pair(result["pairs"], name, against, metric) if against not in (None, name) else None
    if pair is None:
        return {}
    return {
        "against": against,
        "difference": pair["difference"],
        "difference_low": pair["low"],
        "difference_high": pair["high"],
        "p": pair["p"],
        "p_holm": pair["p_holm"],
        "significant": pair["significant"],
        "exceeds_seed_noise": pair["seeds"]["exceeds"],
        **({"exceeds_split_noise": pair["splits"]["exceeds"]} if "splits" in pair else {}),
    }
