"""Quotes in csv and tsv: cells that hold anything come back, and one that is not closed swallows no line."""

import csv
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.datasets.files.tabular import read_columns, read_rows
from cm3.datasets.mmrec.tables import read_table

CELLS = st.text('ab",\t\n é', max_size=12)


def pairs(path: Path, format: str = "csv") -> list[tuple[str, str]]:
    parts = [part.values for part in read_columns(path, format, ["user", "item"])]
    return [(u.as_py(), i.as_py()) for p in parts for u, i in zip(p["user"], p["item"], strict=True)]


@pytest.mark.parametrize("format", ["csv", "tsv"])
@settings(deadline=None, max_examples=150)
@given(table=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=30))
def test_every_cell_comes_back(format: str, table: list[tuple[str, str]]):
    text = io.StringIO()
    csv.writer(text, delimiter={"csv": ",", "tsv": "\t"}[format]).writerows([("user", "item"), *table])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("cm3.datasets.files.tabular._PART_BYTES", 120)
        patch.setattr("cm3.datasets.files.delimited._BLOCK", 7)
        path = Path(folder) / "table"
        path.write_bytes(text.getvalue().encode())
        assert pairs(path, format) == table
        assert [tuple(row.values()) for _, row in read_rows(path, format, ["user", "item"])] == table


LINES = [f"u{n}\ti{n}" for n in range(2, 202)]
OPEN = {
    "to the end": ({101: 'u\t"i'}, 101),
    "in the last line": ({201: 'u\t"i'}, 201),
    "to another one": ({101: 'u\t"i', 151: '"u\ti'}, 101),
    "to a letter": ({101: 'u\t"i', 151: 'u\ti"x'}, 101),
    "to a closed one": ({101: 'u\t"i', 151: 'u\t"i"'}, 101),
}


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("small", [False, True])
def test_an_open_quote_swallows_no_line(tmp_path: Path, kind: str, small: bool, monkeypatch: pytest.MonkeyPatch):
    if small:
        monkeypatch.setattr("cm3.datasets.files.tabular._PART_BYTES", 64)
    spoilt, line = OPEN[kind]
    lines = ["user\titem", *(spoilt.get(n, text) for n, text in enumerate(LINES, 2))]
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n")
    columns = {"user": "user", "item": "item"}
    with pytest.raises(UserError, match=rf"pairs\.tsv, line {line}: .*quotes within it are doubled"):
        run_prepare(tmp_path, {"source": "files", "kcore": 0, "interactions": {"path": str(path), "columns": columns}})
    for read in (lambda: read_rows(path, "tsv", ["user"]), lambda: read_table(path, "\t", ["user"])):
        with pytest.raises(UserError, match=rf"pairs\.tsv, line {line}: .*quotes within it are doubled"):
            list(read())
    assert not (tmp_path / "ratings.parquet").exists()


@pytest.mark.parametrize("title", ['"Big" screen', '"a "big" one"', '"24"" screen', '"open'])
def test_an_item_whose_quotes_hold_half_a_cell_is_named(tmp_path: Path, title: str):
    pair, path = tmp_path / "pairs.tsv", tmp_path / "items.tsv"
    pair.write_text("user\titem\nu\ta\nu\tb\n")
    path.write_text(f"item_id\ttitle\na\tplain\n\nb\t{title}\nc\tplain\n")
    columns = {"item_id": "item_id", "title": "title"}
    data = {
        "source": "files",
        "kcore": 0,
        "interactions": {"path": str(pair)},
        "items": {"path": str(path), "columns": columns},
    }
    with pytest.raises(UserError, match=r'items\.tsv, line 4: .*doubled, as in "a 5"" mug"; fix the cell'):
        run_prepare(tmp_path, data)


def test_a_quote_within_a_cell_is_a_letter(tmp_path: Path):
    path = tmp_path / "items.tsv"
    path.write_text('user\titem\n1\t24" screen\n2\t7"\n\n3\tplain\n')
    assert pairs(path, "tsv") == [("1", '24" screen'), ("2", '7"'), ("3", "plain")]
    assert [row["item"] for _, row in read_rows(path, "tsv", ["item"])] == ['24" screen', '7"', "plain"]


def test_rows_over_several_lines_are_named_by_their_first(tmp_path: Path):
    path = tmp_path / "items.csv"
    path.write_text('user,item\n1,"a\nb\n\nc"\n\n2,d\n')
    assert [place for place, _ in read_rows(path, "csv", ["item"])] == [f"{path}, line 2", f"{path}, line 7"]
    assert pairs(path) == [("1", "a\nb\n\nc"), ("2", "d")]


@pytest.mark.parametrize("format", ["csv", "tsv"])
def test_a_cell_may_be_long(tmp_path: Path, format: str):
    path = tmp_path / "items"
    path.write_text({"csv": "user,item\n1,", "tsv": "user\titem\n1\t"}[format] + "x" * 500_000 + "\n")
    csv.field_size_limit(131_072)
    ((_, row),) = read_rows(path, format, ["item"])
    assert len(row["item"]) == 500_000
