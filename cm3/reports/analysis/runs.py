"""The cells of a study: reading what each run left, and choosing each experiment's grid point by validation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.common.strict import nearest
from cm3.reports.analysis.spec import CellSpec, ExperimentSpec, StudySpec, describe_point

_AGREE = 1e-9
_GROUPS = 16  # of rows of lists, read at once
# Models without embeddings have no files of the last two kinds.
_FILES = ("evaluation", "per_user", "recommendations", "train", "user_embeddings", "item_embeddings")


@dataclass(frozen=True)
class Cell:
    """One run: what it is, the score it is chosen by, its evaluation, its training record, its files."""

    spec: CellSpec
    valid: float
    evaluation: dict[str, Any]
    record: dict[str, Any]
    files: dict[str, Path]

    @property
    def folder(self) -> str:
        """Where the run lies."""
        return f"results/{self.spec.experiment}/runs/{self.spec.run}"


@dataclass(frozen=True)
class Point:
    """One grid point: its settings and its cells, one a seed, by rising seed."""

    settings: dict[str, Any]
    cells: list[Cell]

    @property
    def valid(self) -> list[float]:
        """The validation score of each seed."""
        return [cell.valid for cell in self.cells]


@dataclass(frozen=True)
class Experiment:
    """One experiment of a study: every grid point, in the grid's order, and the chosen one."""

    name: str
    spec: ExperimentSpec
    monitor: str
    points: list[Point]
    chosen: Point


def read_experiments(study: StudySpec, inputs: Mapping[str, Path]) -> list[Experiment]:
    """Read every cell's evaluation and record, and choose each experiment's point by mean validation over seeds.

    Equal means: the first in the grid's order. Test scores play no part.

    Raises:
        UserError: a file is not given or unreadable, a cell has no validation score, or cells were chosen by
            different metrics or measured under different masks.
    """
    found = []
    for name, spec in study.experiments.items():
        cells = [_read_cell(cell, inputs) for cell in study.cells if cell.experiment == name]
        monitor = _one(cells, "training.monitor", lambda cell: cell.record.get("monitor"))
        points: dict[str, list[Cell]] = {}
        for cell in cells:
            points.setdefault(describe_point(cell.spec.point), []).append(cell)
        grid = [Point(group[0].spec.point, sorted(group, key=lambda c: c.spec.seed)) for group in points.values()]
        found.append(Experiment(name, spec, monitor, grid, choose(grid)))
    _one([point.cells[0] for e in found for point in e.points], "evaluation.mask", lambda c: c.evaluation.get("mask"))
    return found


def choose(points: Sequence[Point]) -> Point:
    """Return the point of the highest mean validation score over its seeds; of equal ones the first."""
    return max(points, key=lambda point: math.fsum(point.valid) / len(point.valid))


def _read_cell(spec: CellSpec, inputs: Mapping[str, Path]) -> Cell:
    files = {kind: inputs[name] for kind in _FILES if (name := f"{kind}.{spec.experiment}.{spec.run}") in inputs}
    for kind in _FILES[:4]:
        if kind not in files:
            raise UserError(f"{spec.experiment}, run {spec.run}: its {kind} is not among the inputs")
    evaluation, record = (_read_json(files[kind]) for kind in ("evaluation", "train"))
    valid = record.get("best_valid")
    if not isinstance(valid, int | float) or not math.isfinite(valid):
        raise UserError(
            f"{files['train']}: best_valid is {valid!r}; {spec.experiment} (seed {spec.seed}, "
            f"{describe_point(spec.point)}) has no validation score to be chosen by. Give the dataset a valid split "
            "and train again"
        )
    return Cell(spec, float(valid), evaluation, record, files)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); delete it and run again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; delete it and run again")
    return value


def _one(cells: Sequence[Cell], setting: str, get: Any) -> Any:
    first = cells[0]
    for cell in cells:
        if get(cell) != get(first):
            raise UserError(
                f"{setting} is {get(first)!r} in {first.folder}, but {get(cell)!r} in {cell.folder}; "
                "give both the same, or their numbers do not compare"
            )
    return get(first)


def read_per_user(
    cell: Cell, metrics: Sequence[str], users: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a cell's test users (n,), sizes of their truth (n,) and values (n, M), by rising user.

    Args:
        cell: whose per_user.parquet to read.
        metrics: columns.
        users: the test users that other cells have, to be met exactly.

    Raises:
        UserError: unreadable, other users, a missing metric, values that are not finite or not those of
            evaluation.json.
    """
    path = cell.files["per_user"]
    try:
        present = pq.read_schema(path).names
        for metric in metrics:
            if metric not in present:
                raise UserError(
                    f"{path}: has no {metric}{nearest(metric, present)}; "
                    f"let evaluation.ks of experiment {cell.spec.experiment!r} hold its cut-off, or drop the metric"
                )
        table = pq.read_table(path, columns=["user", "n_test", *metrics], partitioning=None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); delete it and run again") from None
    found = table.column("user").to_numpy()
    order = np.argsort(found, kind="stable")
    found = found[order]
    if (found[1:] == found[:-1]).any():
        raise UserError(f"{path}: a user stands there twice; delete it and run again")
    if users is not None and not np.array_equal(found, users):
        alone = np.setxor1d(found, users)
        raise UserError(
            f"{path}: has {len(found)} test users, the study's first cell {len(users)}, and {len(alone)} are not in "
            f"both (first: user {alone[0]}); models are compared user by user, so evaluate all on the same split"
        )
    values = np.column_stack([table.column(metric).to_numpy() for metric in metrics])[order]
    for column, metric in enumerate(metrics):
        mean = values[:, column].mean()
        told = cell.evaluation.get("test", {}).get(metric)
        if not np.isfinite(mean) or told is None or abs(mean - told) > _AGREE:
            raise UserError(
                f"{path}: the mean of {metric} is {mean}, but {cell.files['evaluation']} has {told}; "
                "delete both and run again"
            )
    return found, table.column("n_test").to_numpy()[order], values


def read_lists(path: Path, user_ids: pa.Array, item_ids: pa.Array, users: np.ndarray, k: int) -> np.ndarray:
    """Return the first k recommendations of each of (R,) users as (R, k') item indices, -1 where a list ends.

    k' is the length of the longest list, at most k. The file is read by several row groups at a time, which bounds
    memory beside that of the result.

    Raises:
        UserError: unreadable, a user or an item that the data set lacks, a user who is not among `users`, or a rank
            below 1 or taken twice.
    """
    lists = np.full((len(users), k), -1, np.int32)
    row_of = np.full(len(user_ids), -1, np.int32)
    row_of[users] = np.arange(len(users))
    columns = ["user_id", "item_id", "rank"]
    filled = 0
    try:
        with pq.ParquetFile(path, read_dictionary=columns[:2]) as file:
            for first in range(0, file.num_row_groups, _GROUPS):
                groups = range(first, min(first + _GROUPS, file.num_row_groups))
                table = file.read_row_groups(groups, columns=columns)
                ranks = table.column("rank").to_numpy()
                if len(ranks) and ranks.min() < 1:
                    raise UserError(f"{path}: holds rank {ranks.min()}; ranks start at 1. Delete it and run again")
                user = _codes(table.column("user_id"), user_ids, path)
                item = _codes(table.column("item_id"), item_ids, path)
                if len(ranks) and ranks.max() > k:
                    near = ranks <= k
                    user, item, ranks = user[near], item[near], ranks[near]
                rows = row_of[user]
                if len(rows) and rows.min() < 0:
                    stranger = user_ids[int(user[rows.argmin()])]
                    raise UserError(f"{path}: user {stranger} is not a test user; delete it and run again")
                lists[rows, ranks - 1] = item
                filled += len(rows)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{path}: not a readable file of recommendations ({error}); delete it and run again") from None
    there = (lists >= 0).sum(0)
    if filled != there.sum():
        raise UserError(f"{path}: a user has two items at one rank; delete it and run again")
    return lists[:, : np.count_nonzero(there)]


def _codes(column: pa.ChunkedArray, known: pa.Array, path: Path) -> np.ndarray:
    # The few distinct ids are looked up, not each of the rows.
    if not len(column):
        return np.empty(0, np.int32)
    column = column.unify_dictionaries()
    ids = column.chunk(0).dictionary
    place = pc.index_in(ids, value_set=known)
    if place.null_count:
        stranger = ids.filter(pc.is_null(place))[0].as_py()
        raise UserError(f"{path}: {stranger!r} is not an id of the data set; delete it and run again")
    return place.to_numpy()[np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])]
