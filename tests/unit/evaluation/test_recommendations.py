"""Recommendations of a run: numbers of users and items, ids where they are published, and readers of both."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cm3.common.errors import UserError
from cm3.common.interactions import Interactions
from cm3.common.strict import validate
from cm3.common.tables import RECOMMENDATIONS, RUN_RECOMMENDATIONS, write_table
from cm3.evaluation.external import read_lists
from cm3.evaluation.external_config import External
from cm3.evaluation.recommendations import (
    Ids,
    has_numbers,
    ids_of,
    publish_recommendations,
    read_recommendations,
    write_recommendations,
)
from cm3.evaluation.results import RankedLists

# Ids of numbers, which can be mistaken for the numbers of rows.
USERS, ITEMS = [str(7 - n) for n in range(6)], [str(90 - n) for n in range(9)]


@pytest.fixture
def ids() -> Ids:
    return ids_of(USERS, ITEMS)


@pytest.fixture
def written(tmp_path: Path, ids: Ids) -> tuple[Path, list[tuple[int, int, int, float]]]:
    """The table of a run in two parts, with a list that ends early, and its rows."""
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(len(ITEMS))[:5] for _ in range(4)])
    items[1, 2:] = -1
    scores = -np.sort(-rng.random(items.shape, np.float32), 1)
    users = np.array([0, 2, 3, 5])
    lists = [RankedLists(users[rows], items[rows], scores[rows]) for rows in (slice(0, 3), slice(3, 4))]
    path = tmp_path / "recommendations.parquet"
    write_recommendations(path, lists, ids, 4)
    rows = [
        (int(user), int(item), rank, float(score))
        for user, of_user, values in zip(users, items, scores, strict=True)
        for rank, (item, score) in enumerate(zip(of_user[:4], values, strict=False), start=1)
        if item >= 0
    ]
    return path, rows


def as_before(path: Path, rows: list[tuple[int, int, int, float]]) -> Path:
    """The same table as earlier releases wrote it for a run, with ids."""
    users, items, ranks, scores = zip(*rows, strict=True)
    columns = [[USERS[user] for user in users], [ITEMS[item] for item in items], ranks, scores]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, RECOMMENDATIONS, strict=True)], RECOMMENDATIONS)
    write_table(path, table, RECOMMENDATIONS)
    return path


def test_a_run_has_numbers_in_a_row_group_for_each_part(written):
    path, rows = written
    file = pq.ParquetFile(path)
    assert file.schema_arrow.remove_metadata().equals(RUN_RECOMMENDATIONS) and file.num_row_groups == 2
    assert [tuple(row.values()) for row in file.read().to_pylist()] == rows


def test_published_are_the_ids_of_the_numbers(tmp_path: Path, written, ids: Ids):
    path, rows = written
    publish_recommendations(path, tmp_path / "published.parquet", ids)
    expected = as_before(tmp_path / "before.parquet", rows)
    found = pq.read_table(tmp_path / "published.parquet")
    assert found.schema.remove_metadata().equals(RECOMMENDATIONS) and found.equals(pq.read_table(expected))
    assert has_numbers(path) and not has_numbers(expected)


@pytest.mark.parametrize("release", ["this", "earlier"])
def test_one_function_reads_both(tmp_path: Path, written, ids: Ids, monkeypatch: pytest.MonkeyPatch, release: str):
    path, rows = written
    monkeypatch.setattr("cm3.evaluation.recommendations._GROUPS", 1)
    if release == "earlier":
        path = as_before(tmp_path / "before.parquet", rows)
    parts = list(read_recommendations(path, ids, ["rank", "score"]))
    assert len(parts) == (2 if release == "this" else 1)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == rows


@pytest.mark.parametrize(
    "other", [ids_of(USERS[::-1], ITEMS), ids_of(USERS, [*ITEMS, "new"]), ids_of([*USERS, ITEMS[0]], ITEMS[1:])]
)
def test_numbers_are_not_rows_of_other_tables(tmp_path: Path, written, other: Ids):
    path, _ = written
    for use in (
        lambda: list(read_recommendations(path, other)),
        lambda: publish_recommendations(path, tmp_path / "published.parquet", other),
    ):
        with pytest.raises(UserError, match="rows of other tables of users and items"):
            use()
    assert not (tmp_path / "published.parquet").exists()


@pytest.mark.parametrize("settings", [{}, {"score_column": "score"}, {"rank_column": "rank"}])
def test_lists_of_a_run_are_those_of_another_tool_with_ids(tmp_path: Path, written, settings: dict[str, str]):
    path, rows = written
    none = np.empty(0, np.int64)
    data = Interactions(none, none, none.astype(np.int8), USERS, ITEMS)
    found, expected = (
        read_lists(validate(External, {"recommendations": str(file), **settings}, "model"), data, file)
        for file in (path, as_before(tmp_path / "before.parquet", rows))
    )
    assert found.counts == expected.counts and found.counts["rows"] == len(rows)
    for name in ("offsets", "items", "scores"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    with pytest.raises(UserError, match="rows of other tables"):
        read_lists(
            validate(External, {"recommendations": str(path)}, "model"),
            Interactions(none, none, none.astype(np.int8), USERS[1:], ITEMS),
            path,
        )
