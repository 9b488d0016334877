"""Which rows of the user's interactions are used: a split of their own, a minimum rating, kinds of events."""

import logging
from pathlib import Path
from typing import Any

import pytest
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.common.tables import INTERACTIONS, read_table
from cm3.datasets.reader import RATINGS
from cm3.datasets.registry import parse_dataset
from cm3.datasets.splits import split_ratings


def prepared(folder: Path, text: str, columns: dict[str, str], **table: Any) -> dict[str, Any]:
    (folder / "buys.csv").write_text(text)
    entry = {"path": str(folder / "buys.csv"), "columns": columns, **table}
    return run_prepare(
        folder, {"source": "files", "interactions": entry} | ({} if "split" in columns else {"kcore": 0})
    )


@pytest.mark.parametrize("words", [("train", "valid", "test"), ("Training", "val", "testing"), ("0", "1", "2")])
def test_a_split_of_ones_own_is_used(tmp_path: Path, words: tuple[str, str, str]):
    rows = [f"u{n % 4},i{n},{words[0 if n < 8 else 1 if n < 10 else 2]}" for n in range(12)]
    prepared(tmp_path, "\n".join(["user,item,part", *rows, ""]), {"split": "part"})
    assert len(read_table(tmp_path / "ratings.parquet", RATINGS)) == 12  # no k-core
    facts = split_ratings(tmp_path / "ratings.parquet", tmp_path / "interactions.parquet", "published", 0)
    assert facts["split"] == {"train": 8, "valid": 2, "test": 2}
    assert len(read_table(tmp_path / "interactions.parquet", INTERACTIONS)) == 12
    data = {"source": "files", "interactions": {"path": "a.csv", "columns": {"split": "part"}}}
    assert parse_dataset("mine", data, "mine").split_spec()["strategy"] == "published"


def test_another_word_is_an_error_with_its_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"line 3: part = 'holdout' is not a split; write train, valid or test"):
        prepared(tmp_path, "user,item,part\nu,i,train\nu,j,holdout\n", {"split": "part"})


def test_rows_are_kept_by_rating_and_event(tmp_path: Path):
    text = "user,item,stars,kind\nu,a,5,buy\nu,b,2,buy\nu,c,4,view\nu,d,4,cart\n"
    columns = {"rating": "stars", "event": "kind"}
    facts = prepared(tmp_path, text, columns, min_rating=4, events=["buy", "cart"])
    assert [row["rating"] for row in read_table(tmp_path / "ratings.parquet", RATINGS).to_pylist()] == [5.0, 4.0]
    assert facts["reading"] == {"left out: rating below min_rating": 1, "left out: event not in events": 1}


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"min_rating": 3}, "min_rating needs columns.rating"),
        ({"events": ["buy"]}, "need each other"),
        ({"columns": {"event": "kind"}}, "need each other"),
    ],
)
def test_a_filter_needs_its_column(table: dict[str, Any], complaint: str):
    with pytest.raises(UserError, match=complaint):
        parse_dataset("mine", {"source": "files", "interactions": {"path": "a.csv", **table}}, "mine")


def test_a_random_split_of_rows_with_times_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    lines = [f"u{n % 4},i{n},{1_600_000_000 + n}" for n in range(40)]
    prepared(tmp_path, "\n".join(["user,item,time", *lines, ""]), {"timestamp": "time"})
    with caplog.at_level(logging.WARNING):
        split_ratings(tmp_path / "ratings.parquet", tmp_path / "interactions.parquet", "user-time", 0)
        assert "the split is random" not in caplog.text
        split_ratings(tmp_path / "ratings.parquet", tmp_path / "interactions.parquet", "random", 0)
    assert "have times, but the split is random" in caplog.text and "split.strategy" in caplog.text
