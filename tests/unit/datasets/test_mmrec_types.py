"""MMRec folders written by pandas: times, whole floats and mappings are checked like those of other sources."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.common.tables import USERS, read_table
from cm3.datasets.mmrec.reader import Reader
from cm3.datasets.reader import RATINGS
from extractors.precomputed.row_ids import read_row_ids

HEADER = "userID\titemID\trating\ttimestamp\n"


def read(folder: Path, text: str, mapping: str | None = None) -> list[dict[str, Any]]:
    (folder / "shop.inter").write_text(text)
    inputs = {"interactions": folder / "shop.inter"}
    if mapping is not None:
        (folder / "i_id_mapping.csv").write_text(mapping)
        inputs["item_ids"] = folder / "i_id_mapping.csv"
    rows: list[dict[str, Any]] = pa.concat_tables(Reader({}, inputs).interactions()).to_pylist()
    return rows


@pytest.mark.parametrize("time", ["1400000000000000", "1400000000000000000", "-5", "4102444801"])
def test_a_time_outside_of_1970_to_2099_is_refused(tmp_path: Path, time: str):
    with pytest.raises(UserError, match=rf"shop\.inter, line 3: timestamp = '{time}' is not between 1970 and 2099"):
        read(tmp_path, f"{HEADER}0\t1\t5.0\t1400000000\n0\t2\t5.0\t{time}\n")


def test_dates_and_months_are_read_as_such(tmp_path: Path):
    assert [row["timestamp"] for row in read(tmp_path, f"{HEADER}0\t1\t5.0\t20140513\n0\t2\t5.0\t\n")] == [
        1_399_939_200,
        None,
    ]
    assert read(tmp_path, f"{HEADER}0\t1\t5.0\t201405\n")[0]["timestamp"] == 1_398_902_400


def test_numbers_written_as_floats_are_numbers(tmp_path: Path):
    rows = read(
        tmp_path, f"{HEADER}0.0\t1.0\t5.0\t1400000000\n1\t2\t5.0\t1400000000\n", "asin\titemID\nA\t1.0\nB\t2.0\n"
    )
    assert [(row["user"], row["item"]) for row in rows] == [("0", "A"), ("1", "B")]
    for user, complaint in (("0.5", "is not a number"), ("nan", "is not a number"), ("-1.0", "is negative")):
        with pytest.raises(UserError, match=rf"line 3: userID = '{user}' {complaint}"):
            read(tmp_path, f"{HEADER}0.0\t1.0\t5.0\t1400000000\n{user}\t1.0\t5.0\t1400000000\n")
    with pytest.raises(UserError, match=r"line 3: userID = 'x' is not a number"):
        read(tmp_path, f"{HEADER}0.0\t1.0\t5.0\t1400000000\nx\t1.0\t5.0\t1400000000\n")


def test_a_rating_beyond_float32_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"line 2: rating = '1e300' is not a finite number"):
        read(tmp_path, f"{HEADER}0\t1\t1e300\t1400000000\n")


@pytest.mark.parametrize("index", ["", "Unnamed: 0"])
def test_the_row_index_of_pandas_is_not_the_id(tmp_path: Path, index: str):
    mapping = f"{index}\tasin\titemID\n0\tA\t0\n1\tB\t1\n"
    assert read(tmp_path, f"{HEADER}0\t1\t5.0\t1400000000\n", mapping)[0]["item"] == "B"
    assert read_row_ids(tmp_path / "i_id_mapping.csv").names == [b"A", b"B"]
    with pytest.raises(UserError, match="has no id next to itemID"):
        read(tmp_path, f"{HEADER}0\t1\t5.0\t1400000000\n", f"{index}\titemID\n0\t0\n1\t1\n")
    with pytest.raises(UserError, match="has no column of ids next to itemID"):
        read_row_ids(tmp_path / "i_id_mapping.csv")


def test_a_missing_id_in_a_mapping_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="line 3: has no id next to itemID"):
        read(tmp_path, f"{HEADER}0\t0\t5.0\t1400000000\n", "asin\titemID\nA\t0\nnan\t1\n")
    with pytest.raises(UserError, match="line 3: 'nan' is the text of a missing value"):
        read_row_ids(tmp_path / "i_id_mapping.csv")


def prepared(folder: Path, lines: list[str]) -> tuple[dict[str, Any], pa.Table]:
    (folder / "shop").mkdir()
    (folder / "shop/shop.inter").write_text(HEADER + "\n".join(lines) + "\n")
    stats = run_prepare(folder, {"source": "mmrec", "folder": str(folder / "shop"), "kcore": 0})
    return stats, read_table(folder / "ratings.parquet", RATINGS)


def test_one_interaction_without_a_time_leaves_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    stats, table = prepared(tmp_path, ["0\t1\t4\t1400000000", "0\t2\t\t", "1\t1\t2\t1400000007"])
    assert sorted(table.column("timestamp").to_pylist()) == [0, 1_400_000_000, 1_400_000_007]
    assert sorted(table.column("rating").to_pylist(), key=str) == [2, 4, None]
    assert stats["has_timestamps"] and stats["ratings"]["mean"] == 3
    assert (
        "1 of 3 interactions have no timestamp" in caplog.text and "1 of 3 interactions have no rating" in caplog.text
    )
    assert read_table(tmp_path / "users.parquet", USERS).num_rows == 2


def test_a_column_without_any_time_is_absent(tmp_path: Path):
    stats, table = prepared(tmp_path, ["0\t1\t\t", "0\t2\t\t"])
    assert not stats["has_timestamps"] and not stats["has_ratings"]
    assert table.column("timestamp").null_count == table.column("rating").null_count == 2


@pytest.mark.parametrize("item", ["1.5", "-1", str(2**31)])
def test_an_item_number_of_an_array_is_checked(tmp_path: Path, item: str):
    (tmp_path / "shop.inter").write_text(f"userID\titemID\n0\t0.0\n0\t{item}\n")
    with pytest.raises(UserError, match=r"shop\.inter: itemID = .* is not a number of an item"):
        read_row_ids(tmp_path / "shop.inter")
    (tmp_path / "shop.inter").write_text("userID\titemID\n0\t0.0\n0\t2\n")
    assert np.asarray(read_row_ids(tmp_path / "shop.inter").names).tolist() == [b"0", b"1", b"2"]


def test_lines_of_white_space_are_no_rows(tmp_path: Path):
    rows = read(tmp_path, f"{HEADER}0\t1\t5.0\t1400000000\n   \n \r\n", "asin\titemID\nA\t1\n  \n")
    assert [(row["user"], row["item"]) for row in rows] == [("0", "A")]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("user_id:token\titem_id:token\nu\ti\n", "has the header of a RecBole file, .* set source: recbole"),
        ("userID\titemID\r0\t1\r", "its lines end with a carriage return alone"),
    ],
)
def test_files_of_other_programs_are_named(tmp_path: Path, text: str, complaint: str):
    with pytest.raises(UserError, match=rf"shop\.inter\b.* ?{complaint}"):
        read(tmp_path, text)


def test_a_mapping_with_commas_says_which_separator_is_expected(tmp_path: Path):
    with pytest.raises(UserError, match=r"i_id_mapping\.csv: has no column 'itemID' .* separated by a tab"):
        read(tmp_path, f"{HEADER}0\t1\t5.0\t1400000000\n", "asin,itemID\nA,1\n")


def test_a_duplicate_row_of_metadata_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "shop.inter").write_text(f"{HEADER}0\t1\t5.0\t1400000000\n")
    (tmp_path / "meta-shop.csv").write_text("itemID,title\n1,Old\n1,New\n")
    inputs = {"interactions": tmp_path / "shop.inter", "meta": tmp_path / "meta-shop.csv"}
    assert Reader({}, inputs).items({"1"})["1"].title == "New"
    assert "meta-shop.csv, line 3: duplicate itemID 1; the last row is used (1 such rows)" in caplog.text
