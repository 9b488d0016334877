"""Other models next to an experiment's metrics: MostPop, and those that studies have compared it with."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.common.interactions import Interactions
from cm3.reports.pages.popularity import popularity_metrics

log = logging.getLogger(__name__)


def rivals(
    metrics: Mapping[str, Any],
    data: Interactions,
    shown: Sequence[str],
    studies: Mapping[str, Mapping[str, Sequence[str]]],
) -> list[dict[str, Any]]:
    """Return other models with their test metrics, best first by the first metric.

    Args:
        metrics: metrics.json of the experiment.
        data: its interactions.
        shown: names of the metrics, such as "recall@20".
        studies: study -> other experiment -> keys of its runs by the configuration, on the dataset's own split; a
            comparison of other runs, of another split for example, or with another mask is not shown, nor one that does
            not exist. Of a study over several splits, the runs on the first one are shown, which is the dataset's own.

    Returns:
        Dicts of name, study (None for MostPop computed here) and values by metric, None where it was not measured.
    """
    found: list[dict[str, Any]] = []
    for study, experiments in studies.items():
        known = {one["name"] for one in found}
        found += [one for one in _of_study(study, experiments, metrics["mask"], shown) if one["name"] not in known]
    if metrics["config"]["model"].get("name") != "mostpop" and not any(one["model"] == "mostpop" for one in found):
        ks = sorted({int(name.partition("@")[2]) for name in shown})
        popular = popularity_metrics(data, ks, metrics["mask"])
        values = {name: popular[name] for name in shown}
        found.append({"name": "MostPop", "model": "mostpop", "study": None, "values": values})
    return sorted(found, key=lambda one: -(one["values"][shown[0]] or 0.0))


def _of_study(
    study: str, experiments: Mapping[str, Sequence[str]], mask: str, shown: Sequence[str]
) -> list[dict[str, Any]]:
    path = Path(f"results/{study}/comparison.json")
    if not path.is_file():
        return []
    try:
        compared = read_json(path)
    except UserError as error:
        log.warning("%s: its models are not shown: %s", path, error)
        return []
    if compared["settings"]["mask"] != mask:
        return []
    rows = []
    for name, runs in experiments.items():
        entry = compared["experiments"].get(name)
        if entry is not None and _runs_on_first_split(entry) <= set(runs):
            values = {metric: _mean_on_first_split(entry, metric) for metric in shown}
            if values[shown[0]] is not None:
                rows.append({"name": name, "model": entry["model"], "study": study, "values": values})
    return rows


def _runs_on_first_split(entry: Mapping[str, Any]) -> set[str]:
    splits = entry.get("splits") or [None] * len(entry["runs"])
    return {run for run, split in zip(entry["runs"], splits, strict=True) if split == splits[0]}


def _mean_on_first_split(entry: Mapping[str, Any], metric: str) -> float | None:
    """Return the mean of a metric over the seeds on the first split, None where it was not measured."""
    found = entry["metrics"].get(metric)
    splits = entry.get("splits")
    if found is None:
        return None
    if splits is None:
        return float(found["mean"])
    return fmean(value for value, split in zip(found["values"], splits, strict=True) if split == splits[0])
