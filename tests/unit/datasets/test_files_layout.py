"""Tables of the user's that are written in another way: delimiter, encoding, header, decimal comma, JSON array."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.common.tables import USERS, read_table
from cm3.datasets.reader import RATINGS
from cm3.datasets.registry import parse_dataset


def prepared(folder: Path, content: bytes, name: str = "buys.csv", columns: Any = None, **table: Any) -> list[dict]:
    (folder / name).write_bytes(content)
    entry = {"path": str(folder / name), "columns": columns or {"rating": "rating"}, **table}
    run_prepare(folder, {"source": "files", "kcore": 0, "interactions": entry})
    users = read_table(folder / "users.parquet", USERS).column("user_id").to_pylist()
    rows = read_table(folder / "ratings.parquet", RATINGS).to_pylist()
    return [(users[row["user"]], row["rating"]) for row in rows]


LAYOUTS = [
    (b"user;item;rating\nann;tea;4\nbob;cup;5\n", 'set delimiter: ";"', {"delimiter": ";"}),
    (b"user|item|rating\nann|tea|4\nbob|cup|5\n", 'set delimiter: "|"', {"delimiter": "|"}),
    (b"user\titem\trating\nann\ttea\t4\nbob\tcup\t5\n", r"set delimiter: \"\\t\"", {"delimiter": "\t"}),
    (b"ann,tea,4\nbob,cup,5\n", "set header to the names of its 3 columns", {"header": ["user", "item", "rating"]}),
    (
        b'\xef\xbb\xbfann,"t\n",4\nbob,cup,5\n',
        "set header to the names of its 3 columns",
        {"header": ["user", "item", "rating"]},
    ),
]


@pytest.mark.parametrize(("content", "complaint", "table"), LAYOUTS)
def test_another_layout_is_named_with_its_key_and_read_with_it(
    tmp_path: Path, content: bytes, complaint: str, table: dict[str, Any]
):
    with pytest.raises(UserError, match=r"set (delimiter|header)") as error:
        prepared(tmp_path, content)
    assert complaint.replace("\\\\", "\\").replace('\\"', '"') in str(error.value)
    assert prepared(tmp_path, content, **table) == [("ann", 4.0), ("bob", 5.0)]


def test_lines_of_a_file_without_a_header_are_counted_from_its_first(tmp_path: Path):
    header = ["user", "item", "rating"]
    with pytest.raises(UserError, match=r"buys\.csv, line 2: rating = 'x' is not a finite number"):
        prepared(tmp_path, b"ann,tea,4\nbob,cup,x\n", header=header)
    with pytest.raises(UserError, match=r"buys\.csv, line 3: has 2 values, the header has 3"):
        prepared(tmp_path, b"ann,tea,4\nbob,cup,5\nbob,cup\n", header=header)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16"])
def test_another_encoding_is_named_with_its_key_and_read_with_it(tmp_path: Path, encoding: str):
    content = "user,item,rating\nJürgen,tea,4\n".encode(encoding)
    named = "not UTF-8 text; convert the file to UTF-8, or set its encoding, such as encoding: cp1252"
    if encoding == "utf-16":
        named = "is UTF-16 text; save it as UTF-8, or set encoding: utf-16"
    with pytest.raises(UserError, match=named):
        prepared(tmp_path, content)
    assert prepared(tmp_path, content, encoding=encoding) == [("Jürgen", 4.0)]


def test_a_decimal_comma_is_named_with_its_key_and_read_with_it(tmp_path: Path):
    content = b"user;item;rating\nann;tea;4,5\nbob;cup;3\n"
    with pytest.raises(UserError, match=r"line 2: rating = '4,5' is not a finite number; .*set decimal: ','"):
        prepared(tmp_path, content, delimiter=";")
    assert prepared(tmp_path, content, delimiter=";", decimal=",") == [("ann", 4.5), ("bob", 3.0)]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read_like_json_lines(tmp_path: Path, indent: int | None):
    rows = [{"user": "ann", "item": "tea", "rating": 4}, {"user": "bob", "item": "cup", "rating": 5}]
    assert prepared(tmp_path, json.dumps(rows, indent=indent).encode(), "buys.json") == [("ann", 4.0), ("bob", 5.0)]
    rows[1]["rating"] = "good"  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"buys\.json, entry 2: rating = 'good' is not a finite number"):
        prepared(tmp_path, json.dumps(rows, indent=indent).encode(), "buys.json")
    with pytest.raises(UserError, match=r"buys\.json, line 1: not a JSON object"):
        prepared(tmp_path, b"[1, 2]\n", "buys.json")


def test_keys_of_ordinary_tables_do_not_change():
    def spec(**table: Any) -> dict[str, Any]:
        entry = {"path": "a.csv", **table}
        return parse_dataset("mine", {"source": "files", "interactions": entry}, "mine").prepare_spec()["interactions"]

    assert set(spec()) == {"format", "columns"}
    assert spec(delimiter=";", decimal=",")["delimiter"] == ";"
    with pytest.raises(UserError, match="delimiter is for csv and tsv only"):
        spec(path="a.jsonl", delimiter=";")


def test_ids_that_do_not_meet_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "buys.csv").write_text("user,item\nann,SKU-1\nbob,SKU-2\n")
    (tmp_path / "items.csv").write_text("item_id,title\n1,tea\n2,cup\n3,pot\n4,mug\n")
    data = {
        "source": "files",
        "kcore": 0,
        "interactions": {"path": str(tmp_path / "buys.csv")},
        "items": {"path": str(tmp_path / "items.csv"), "columns": {"title": "title"}},
    }
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match="check that both files use the same item ids"),
    ):
        run_prepare(tmp_path, data)
    assert "Ids of the interactions: 'SKU-1', 'SKU-2'; of the item table: '1', '2', '3'" in caplog.text
