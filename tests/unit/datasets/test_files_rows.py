"""Which rows of the user's interactions are used: a split of their own, a minimum rating, kinds of events."""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.common.tables import INTERACTIONS, read_table
from cm3.datasets.files.review_texts import read_texts
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


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_a_random_split_of_rows_with_times_is_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture, level: int):
    lines = [f"u{n % 4},i{n},{1_600_000_000 + n}" for n in range(40)]
    prepared(tmp_path, "\n".join(["user,item,time", *lines, ""]), {"timestamp": "time"})
    ratings, interactions = tmp_path / "ratings.parquet", tmp_path / "interactions.parquet"
    with caplog.at_level(logging.INFO):
        split_ratings(ratings, interactions, "user-time", 0, level=level)
        assert "the split is random" not in caplog.text
        split_ratings(ratings, interactions, "random", 0, level=level)
    (found,) = [record for record in caplog.records if "have times, but the split is random" in record.message]
    assert found.levelno == level and "split.strategy" in found.message


@pytest.mark.parametrize(
    ("data", "warns"),
    [
        ({"source": "files", "interactions": {"path": "a.csv"}}, True),
        ({"source": "files", "interactions": {"path": "a.csv"}, "split": {"strategy": "random"}}, False),
        ({"source": "recbole", "folder": "ml-100k"}, True),
        ({"source": "amazon-2014", "category": "Baby"}, False),
    ],
)
def test_a_random_split_is_a_warning_for_own_data_without_a_strategy(data: dict[str, Any], warns: bool):
    dataset = parse_dataset("mine", data, "mine")
    assert dataset.split_spec()["strategy"] == "random" and dataset.split_runtime() == {"warn_of_random": warns}


def test_reviews_of_rows_that_are_left_out_are_not_read(tmp_path: Path):
    lines = ["anna;tee;2,5;view;früh", "anna;tee;4,5;buy;später", "anna;kanne;5;buy;schön"]
    (tmp_path / "parts.csv").write_bytes("\n".join([*lines, ""]).encode("cp1252"))
    entry = {
        "path": str(tmp_path / "parts.csv"),
        "delimiter": ";",
        "encoding": "cp1252",
        "header": ["user", "item", "stars", "kind", "words"],
        "decimal": ",",
        "min_rating": 3,
        "events": ["buy"],
        "columns": {"rating": "stars", "event": "kind", "review": "words"},
    }
    spec = parse_dataset("mine", {"source": "files", "interactions": entry}, "mine")
    inputs = {name: Path(path) for name, path in spec.review_inputs("mine").items()}
    rows = [row for table in read_texts(spec.reviews_spec(), inputs) for row in table.to_pylist()]
    assert [(row["item"], row["rating"], row["text"]) for row in rows] == [
        ("tee", 4.5, "später"),
        ("kanne", 5.0, "schön"),
    ]


def test_filters_hold_for_a_folder_of_parts(tmp_path: Path):
    (tmp_path / "buys").mkdir()
    for number, stars in enumerate(([5, 1], [2, 4, 3])):
        table = pa.table({"user": ["u"] * len(stars), "item": [f"{number}{n}" for n in stars], "stars": stars})
        pq.write_table(table, tmp_path / "buys" / f"part-{number}.parquet")
    entry = {"path": str(tmp_path / "buys"), "columns": {"rating": "stars"}, "min_rating": 3}
    facts = run_prepare(tmp_path, {"source": "files", "interactions": entry, "kcore": 0})
    assert len(read_table(tmp_path / "ratings.parquet", RATINGS)) == 3
    assert facts["reading"] == {"left out: rating below min_rating": 2}
    with pytest.raises(UserError, match="delimiter is for csv and tsv only"):
        parse_dataset("mine", {"source": "files", "interactions": {**entry, "delimiter": ";"}}, "mine")
