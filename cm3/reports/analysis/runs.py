"""The runs of a study: read their files, and select each experiment's grid point by validation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm3.common.errors import DamagedFileError, UserError
from cm3.common.files import read_json
from cm3.common.strict import nearest
from cm3.common.tables import open_parquet
from cm3.evaluation.recommendations import Ids, read_recommendations
from cm3.reports.analysis.spec import ExperimentSpec, RunSpec, StudySpec, describe_point

_AGREE = 1e-9
# Models without embeddings have no files of the last two kinds.
_FILES = ("evaluation", "per_user", "recommendations", "train", "user_embeddings", "item_embeddings")


@dataclass(frozen=True)
class Run:
    """One run: its specification, validation score, evaluation, training record and files."""

    spec: RunSpec
    valid: float
    evaluation: dict[str, Any]
    record: dict[str, Any]
    files: dict[str, Path]

    @property
    def folder(self) -> str:
        """The folder of the run."""
        return f"results/{self.spec.experiment}/runs/{self.spec.run}"


@dataclass(frozen=True)
class Point:
    """One grid point: its settings and its runs, in the order of splits and then by ascending seed."""

    settings: dict[str, Any]
    runs: list[Run]

    @property
    def valid(self) -> list[float]:
        """The validation score of each run."""
        return [run.valid for run in self.runs]


@dataclass(frozen=True)
class Experiment:
    """One experiment of a study: every grid point, in the order of the grid, and the selected one."""

    name: str
    spec: ExperimentSpec
    monitor: str
    points: list[Point]
    chosen: Point


def read_experiments(study: StudySpec, inputs: Mapping[str, Path]) -> list[Experiment]:
    """Read every run's evaluation and record, and select each experiment's point by mean validation over its runs.

    Of equal means, the first in the order of the grid is selected. Test scores have no influence.

    Raises:
        UserError: a file is missing or unreadable, a run has no validation score, or runs were selected by different
            metrics or evaluated with different masks.
    """
    found = []
    splits = list(dict.fromkeys(run.split for run in study.cells))
    for name, spec in study.experiments.items():
        runs = [_read_run(run, inputs) for run in study.cells if run.experiment == name]
        monitor = _one(runs, "training.monitor", lambda run: run.record.get("monitor"))
        points: dict[str, list[Run]] = {}
        for run in runs:
            points.setdefault(describe_point(run.spec.point), []).append(run)
        order = lambda run: (splits.index(run.spec.split), run.spec.seed)  # noqa: E731
        grid = [Point(group[0].spec.point, sorted(group, key=order)) for group in points.values()]
        found.append(Experiment(name, spec, monitor, grid, choose(grid)))
    _one([point.runs[0] for e in found for point in e.points], "evaluation.mask", lambda c: c.evaluation.get("mask"))
    return found


def choose(points: Sequence[Point]) -> Point:
    """Return the point with the highest mean validation score over its runs; of equal ones the first."""
    return max(points, key=lambda point: math.fsum(point.valid) / len(point.valid))


def _read_run(spec: RunSpec, inputs: Mapping[str, Path]) -> Run:
    files = {kind: inputs[name] for kind in _FILES if (name := f"{kind}.{spec.experiment}.{spec.run}") in inputs}
    for kind in _FILES[:4]:
        if kind not in files:
            raise UserError(f"{spec.experiment}, run {spec.run}: its {kind} is not among the inputs")
    evaluation, record = (_read_record(files[kind]) for kind in ("evaluation", "train"))
    valid = record.get("best_valid")
    if not isinstance(valid, int | float) or not math.isfinite(valid):
        raise UserError(
            f"{files['train']}: best_valid is {valid!r}; {spec.experiment} (seed {spec.seed}, "
            f"{describe_point(spec.point)}) has no validation score. Give the dataset a validation split "
            "and train again"
        )
    return Run(spec, float(valid), evaluation, record, files)


def _read_record(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DamagedFileError(path, "not a JSON object")
    return value


def _one(runs: Sequence[Run], setting: str, get: Any) -> Any:
    first = runs[0]
    for run in runs:
        if get(run) != get(first):
            raise UserError(
                f"{setting} is {get(first)!r} in {first.folder}, but {get(run)!r} in {run.folder}; "
                "set the same value for both: their numbers are not comparable"
            )
    return get(first)


def read_per_user(
    run: Run, metrics: Sequence[str], users: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a run's test users (n,), numbers of test items (n,) and metric values (n, M), by ascending user.

    Args:
        run: the run whose per_user.parquet to read.
        metrics: columns.
        users: the test users of the other runs, which must be equal.

    Raises:
        UserError: an unreadable file, other users, a missing metric, values that are not finite or differ from
            evaluation.json.
    """
    path = run.files["per_user"]
    with open_parquet(path) as file:
        present = file.schema_arrow.names
        for metric in metrics:
            if metric not in present:
                raise UserError(
                    f"{path}: no column {metric}{nearest(metric, present)}; "
                    f"add its cut-off to evaluation.ks of experiment {run.spec.experiment!r}, or remove the metric"
                )
        table = file.read(["user", "n_test", *metrics])
    found = table.column("user").to_numpy()
    order = np.argsort(found, kind="stable")
    found = found[order]
    if (found[1:] == found[:-1]).any():
        raise UserError(f"{path}: duplicate user; delete it and run again")
    if users is not None and not np.array_equal(found, users):
        unmatched = np.setxor1d(found, users)
        raise UserError(
            f"{path}: has {len(found)} test users, the study's first run {len(users)}; {len(unmatched)} users are in one "
            f"only (first: user {unmatched[0]}). Models are compared user by user: evaluate all on the same split"
        )
    values = np.column_stack([table.column(metric).to_numpy() for metric in metrics])[order]
    for column, metric in enumerate(metrics):
        mean = values[:, column].mean()
        expected = run.evaluation.get("test", {}).get(metric)
        if not np.isfinite(mean) or expected is None or abs(mean - expected) > _AGREE:
            raise UserError(
                f"{path}: the mean of {metric} is {mean}, but {run.files['evaluation']} has {expected}; "
                "delete both and run again"
            )
    return found, table.column("n_test").to_numpy()[order], values


def read_lists(path: Path, ids: Ids, users: np.ndarray, k: int) -> np.ndarray:
    """Return the first k recommendations of each of (R,) users as (R, k') item indices, -1 after the end of a list.

    k' is the length of the longest list, at most k.

    Raises:
        UserError: as `read_recommendations`; or a user who is not in `users`, or a rank that is below 1 or occurs twice.
    """
    lists = np.full((len(users), k), -1, np.int32)
    row_of = np.full(len(ids.users), -1, np.int32)
    row_of[users] = np.arange(len(users))
    filled = 0
    for user, item, ranks in read_recommendations(path, ids):
        if len(ranks) and ranks.min() < 1:
            raise UserError(f"{path}: invalid rank {ranks.min()}; ranks start at 1. Delete the file and run again")
        if len(ranks) and ranks.max() > k:
            near = ranks <= k
            user, item, ranks = user[near], item[near], ranks[near]
        rows = row_of[user]
        if len(rows) and rows.min() < 0:
            unknown = ids.users[int(user[rows.argmin()])]
            raise UserError(f"{path}: user {unknown} is not a test user; delete it and run again")
        lists[rows, ranks - 1] = item
        filled += len(rows)
    there = (lists >= 0).sum(0)
    if filled != there.sum():
        raise UserError(f"{path}: a user has two items at the same rank; delete it and run again")
    return lists[:, : np.count_nonzero(there)]
