"""Tables as other programs leave them: other kinds of files, layouts of spreadsheets, ids and times that look alike."""

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from oracles_sources import dataset, run_prepare

from cm3.common.errors import UserError
from cm3.datasets.registry import parse_dataset

PAIRS = [(f"u{user}", f"i{(user + step) % 5}") for user in range(5) for step in range(4)]
ROWS = "".join(f"{user},{item}\n" for user, item in PAIRS)


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("xl/workbook.xml", "<x/>")
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"user": ["u"], "item": ["i"]}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (archive, r"is an Excel file or a zip archive, not text; save the table as CSV"),
        (parquet, r"is a Parquet file, not text; .* set format: parquet"),
        (lambda: b"SQLite format 3\0" + bytes(100), "is an SQLite database"),
        (lambda: b"BZh91AY&SY" + bytes(50), "is compressed with bzip2, not text; unpack it"),
        (lambda: b"\n <!DOCTYPE html><html>", "is an HTML page"),
        (lambda: f"user,item\n{ROWS}".encode("utf-16"), "is UTF-16 text; .* set encoding: utf-16"),
        (
            lambda: b"sep=;\nuser;item\nu;i\n",
            r".* a note of Excel on the delimiter; remove it, and set delimiter: \";\"",
        ),
        (lambda: b"My shop,,\nuser,item,\nu,i,\n", r"has no column 'user' \(valid: .*My shop"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: Callable[[], bytes], complaint: str):
    (tmp_path / "shop.csv").write_bytes(content())
    with pytest.raises(UserError, match=r"shop\.csv: " + complaint):
        run_prepare(tmp_path, {"source": "files", "interactions": {"path": str(tmp_path / "shop.csv")}})


def test_words_that_begin_like_another_kind_are_text(tmp_path: Path):
    for start in ("PAR1", "BZh", "Obj"):
        text = f"{start},user,item,,\n" + "".join(f"x,{user},{item},,\n" for user, item in PAIRS)
        assert dataset(tmp_path, text, kcore=0)()["interactions"] == 20


@pytest.mark.parametrize(
    ("name", "advice"), [("a.xlsx", "save the sheet as CSV"), ("a.csv.zst", "unpack it"), ("a.feather", "as Parquet")]
)
def test_a_suffix_that_is_not_read_says_what_to_do(name: str, advice: str):
    with pytest.raises(UserError, match=f"{name}' is .*{advice}"):
        parse_dataset("shop", {"source": "files", "interactions": {"path": name}}, "datasets.shop")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"events": ["view"]}, r"no row of 20 is left; correct events = \['view'\] \(the file has 'Cart', 'View'\)"),
        ({"min_rating": 9}, r"no row of 20 is left; correct min_rating = 9\.0"),
    ],
)
def test_filters_that_leave_nothing_are_named(tmp_path: Path, settings: dict[str, Any], complaint: str):
    rows = "".join(f"{user},{item},5,{['View', 'Cart'][n % 2]}\n" for n, (user, item) in enumerate(PAIRS))
    (tmp_path / "shop.csv").write_text(f"user,item,stars,kind\n{rows}")
    columns = {"rating": "stars"} | ({"event": "kind"} if "events" in settings else {})
    table = {"path": str(tmp_path / "shop.csv"), "columns": columns, **settings}
    with pytest.raises(UserError, match=complaint):
        run_prepare(tmp_path, {"source": "files", "interactions": table, "kcore": 0})


@pytest.mark.parametrize(
    ("items", "hint"),
    [
        ("I0 I1 I2 I3 I4", "5 of them differ .* such as 'i0' and 'I0'"),
        ("i0 i1 i2 i3 i4 ", "differ .* such as 'i4' and 'i4 '"),
        ("i0 i1 i2 i3 i4\xa0", r"1 of them differ .* such as 'i4' and 'i4\\xa0'"),
        ("00i0 00i1 00i2 00i3 00i4", "5 of them differ .* such as 'i0' and '00i0'"),
        ("u0 u1 u2", "3 ids of users are in it: are the columns of user and item exchanged"),
        ("a b c", None),
    ],
)
def test_ids_that_are_written_differently_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, items: str, hint: str
):
    names = items.split(" ")
    if not names[-1]:
        names[-2:] = [f"{names[-2]} "]
    (tmp_path / "shop.csv").write_text(f"user,item\n{ROWS}")
    (tmp_path / "items.csv").write_text("item_id\n" + "".join(f"{name}\n" for name in names))
    tables = {"interactions": {"path": str(tmp_path / "shop.csv")}, "items": {"path": str(tmp_path / "items.csv")}}
    run_prepare(tmp_path, {"source": "files", **tables, "kcore": 0, "unknown_items": "keep"})
    found = re.search(hint or "differ|exchanged", caplog.text)
    assert (found is not None) == (hint is not None), caplog.text


def test_ids_that_a_spreadsheet_has_shortened_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    dataset(tmp_path, "user,item\n" + "".join(f"1.2E+{9 + n % 2},E+{n}\n" for n in range(8)), kcore=0)()
    assert "8 of the first 8 values of user, such as '1.2E+9', look like long numbers" in caplog.text
    assert "values of item" not in caplog.text


def test_days_of_a_spreadsheet_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = "".join(f"{user},{item},{43934 + n}.5\n" for n, (user, item) in enumerate(PAIRS))
    dataset(tmp_path, f"user,item,timestamp\n{rows}", kcore=0)()
    assert "all times are between 43934 and 43953 seconds after 1970-01-01" in caplog.text


def test_empty_times_are_counted(tmp_path: Path):
    rows = "".join(f"{user},{item},{'' if n % 3 == 0 else 1_600_000_000}\n" for n, (user, item) in enumerate(PAIRS))
    with pytest.raises(UserError, match=r"line 2: timestamp = '' is empty; .* 0 where it is unknown \(7 such rows\)"):
        dataset(tmp_path, f"user,item,timestamp\n{rows}", kcore=0)()
