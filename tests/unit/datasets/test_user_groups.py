"""The groups of users by columns of their own table: formats, groups by hand, and tables that cannot be used."""

import datetime as dt
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from golden import check_golden
from oracles_sources import jsonl, run_prepare

from cm3.common.errors import UserError
from cm3.common.stages import STAGES
from cm3.common.tables import read_metadata, read_parquet
from cm3.datasets.grouping import MOST_VALUES, group_values
from cm3.datasets.registry import parse_dataset
from cm3.datasets.user_groups import GROUPS, group_users

ROWS = [
    {"user_id": "u0", "country": "DE", "age": 34},
    {"user_id": "u1", "country": "FR", "age": 7},
    {"user_id": "elsewhere", "country": "IT", "age": 99},
    {"user_id": "u3", "country": "DE", "age": None},
]
"""Users of a dataset of u0 to u3 and of others; u2 has no row."""
EXPECTED = {"country": ["DE", "FR", "unknown", "DE"], "age": ["34", "7", "unknown", "unknown"]}


def as_csv(rows: list[dict[str, Any]], mark: str = ",", header: bool = True) -> str:
    lines = [mark.join("" if value is None else str(value) for value in row.values()) for row in rows]
    return "".join(f"{line}\n" for line in ([mark.join(rows[0])] if header else []) + lines)


def grouped(folder: Path, data: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Prepare a dataset and group its users; return the group of each by column, and what the stage returns."""
    run_prepare(folder, data)
    spec = parse_dataset("mine", data, "datasets.mine")
    inputs = {name: Path(path) for name, path in spec.user_groups_inputs("mine").items()}
    output = folder / "user_groups.parquet"
    facts = group_users(spec.user_groups_spec(), inputs, folder / "users.parquet", output)
    found = read_parquet(output).to_pydict()
    assert found.pop("user") == list(range(facts["users"]))
    return found, facts


def group(folder: Path, path: Path, users: int = 4, groups: Any = None, **layout: Any) -> dict[str, list[str]]:
    """Group the users u0, u1, ... of a small dataset by a table; return the group of each by column."""
    pairs = folder / "pairs.csv"
    pairs.write_text("user,item\n" + "".join(f"u{user},i{item}\n" for user in range(users) for item in range(2)))
    table = {"path": str(path), "columns": {"groups": groups or ["country", "age"]}, **layout}
    data = {"source": "files", "kcore": 0, "interactions": {"path": str(pairs)}, "users": table}
    found, facts = grouped(folder, data)
    assert facts["users"] == users
    assert {name: sum(sizes.values()) for name, sizes in facts["groups"].items()} == dict.fromkeys(found, users)
    return found


def write(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """Write ROWS in one of the ways that the item table can have; return the path and the keys next to it."""
    path, layout = folder / f"table.{kind.split()[0]}", {}
    if kind == "csv":
        path.write_text("\ufeff" + as_csv(ROWS))
    elif kind == "csv ;":
        layout = {"delimiter": ";", "header": list(ROWS[0]), "encoding": "utf-16"}
        path.write_text(as_csv(ROWS, ";", header=False), encoding="utf-16")
    elif kind == "tsv.gz":
        path.write_bytes(gzip.compress(as_csv(ROWS, "\t").encode()))
    elif kind == "jsonl":
        path.write_text(jsonl(ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.mkdir()
        for number in range(2):
            pq.write_table(pa.Table.from_pylist(ROWS[number::2]), path / f"part-{number}.parquet")
    return path, layout


@pytest.mark.parametrize("kind", ["csv", "csv ;", "tsv.gz", "jsonl", "json", "parquet", "folder"])
def test_every_format_of_tables_gives_the_same_groups(tmp_path: Path, kind: str):
    path, layout = write(tmp_path, kind)
    assert group(tmp_path, path, **layout) == EXPECTED
    about = read_metadata(tmp_path / "user_groups.parquet")[GROUPS]
    assert about[0] == {"column": "country", "cut": "values", "values": 2, "groups": ["DE", "FR", "unknown"]}
    assert about[1]["groups"] == ["7", "34", "unknown"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([34.0, 7.5, float("nan"), None]), ["34", "7.5", "unknown", "unknown"]),
        (pa.array([0.1, 0.1, 2, 2], pa.float32()), ["0.1", "0.1", "2", "2"]),
        (pa.array([Decimal("1.50"), Decimal("2.00"), None, Decimal("2.00")]), ["1.5", "2", "unknown", "2"]),
        (pa.array([True, False, None, True]), ["true", "false", "unknown", "true"]),
        (pa.array([b"a", b" a ", b"", b"NaN"]), ["a", "a", "unknown", "unknown"]),
        (pa.array(["x", None, "x", "y"]).dictionary_encode(), ["x", "unknown", "x", "y"]),
        (pa.array(["01067", "1067", "-1", "1"]), ["01067", "1067", "-1", "1"]),
        (pa.array(["7", "7.0", "-0", "0"]), ["7", "7", "0", "0"]),
        (pa.array(["other", "unknown", None, "a"]), ["other", "unknown", "unknown", "a"]),
        (pa.nulls(4), ["unknown"] * 4),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_values_of_every_type(tmp_path: Path, values: pa.Array, expected: list[str]):
    pq.write_table(pa.table({"user_id": ["u0", "u1", "u2", "u3"], "x": values}), tmp_path / "table.parquet")
    assert group(tmp_path, tmp_path / "table.parquet", groups="x") == {"x": expected}


def test_numbers_with_many_values_are_cut_at_their_quartiles():
    ages: list[str | None] = [str(age) for age in range(18, 43)]  # 25 values: the 7th, 13th and 19th end a quarter
    found = group_values([*ages, None])
    assert found.cut == "quartiles" and found.values == 25
    assert found.names == ["up to 24", "over 24 to 30", "over 30 to 36", "over 36", "unknown"]
    assert found.group.tolist() == [0] * 7 + [1] * 6 + [2] * 6 + [3] * 6 + [4]
    assert list(found.sizes().values()) == [7, 6, 6, 6, 1]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0] * 90 + list(range(1, 31)), ["up to 0", "over 0"]),
        ([99] * 90 + list(range(30)), ["up to 29", "over 29"]),
        ([n / 4 for n in range(-20, 20)], ["up to -2.75", "over -2.75 to -0.25", "over -0.25 to 2.25", "over 2.25"]),
    ],
)
def test_equal_numbers_are_in_one_group(values: list[float], names: list[str]):
    assert group_values([str(value) for value in values]).names == names


def test_few_numbers_are_a_group_each_in_ascending_order():
    assert group_values(["10", "9", "9", "2.5"]).names == ["2.5", "9", "10"]


def test_of_many_texts_the_most_frequent_are_groups():
    # Value n occurs n + 1 times; of equal frequency the first by name is kept.
    values = [f"c{n:02d}" for n in range(30) for _ in range(n + 1)] + ["b11"] * 12
    found = group_values(values)
    assert found.cut == "largest" and found.values == 31
    expected = [*(f"c{n:02d}" for n in range(29, 11, -1)), "b11", "other"]
    assert found.names == expected and len(expected) == MOST_VALUES
    assert found.sizes()["other"] == sum(range(1, 13)) and found.sizes()["b11"] == 12


def test_a_column_of_names_is_no_column_of_groups():
    with pytest.raises(ValueError, match=r"has 21 different texts for 41 users, as a column of ids or names has"):
        group_values([f"name {n}" for n in range(21)] + ["name 0"] * 20)
    group_values([f"name {n}" for n in range(21)] + ["name 0"] * 21)


def test_many_numbers_with_a_decimal_comma_are_refused():
    values = [f"{n},5" for n in range(20)] + ["7"]
    with pytest.raises(ValueError, match=r"21 numbers with a comma, such as '0,5', .* write them with a point"):
        group_values(values * 3)
    assert set(group_values(values[:20]).names) == set(values[:20])


def test_long_integers_are_codes_and_none_is_taken_for_another():
    codes = [str(10**17 + n) for n in range(3)]
    assert group_values(codes).names == codes
    with pytest.raises(ValueError, match="as a column of ids"):
        group_values([str(10**17 + n) for n in range(30)])
    assert group_values(["0.30000000000000004", "1e+20"]).names == ["0.30000000000000004", "1e+20"]


def test_equal_rows_of_a_user_count_once(tmp_path: Path):
    (tmp_path / "users.csv").write_text(as_csv([ROWS[0], ROWS[1], ROWS[0], ROWS[3], ROWS[3]]))
    assert group(tmp_path, tmp_path / "users.csv") == EXPECTED


def test_of_other_columns_nothing_is_read_or_written(tmp_path: Path):
    rows = [row | {"name": f"secret {n}", "address": "secret"} for n, row in enumerate(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    group(tmp_path, tmp_path / "table.parquet")
    written = b"".join(path.read_bytes() for path in tmp_path.glob("user*.parquet"))
    assert b"secret" not in written and b"elsewhere" not in written


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("user_id,age\nu0,3\n", r"users\.csv: has no column 'country' \(valid: age, user_id\)"),
        ("id,country,age\nu0,DE,3\n", r"users\.csv: has no column 'user_id'"),
        ("user_id,country,age\n", r"users\.csv: has no rows, only a header"),
        ("", r"users\.csv: is empty"),
        (
            "user_id,country,age\nu0,DE,3\n,FR,4\n",
            r"users\.csv, line 3: user_id = '' is empty; every row needs a user id",
        ),
        ("user_id,country,age\nu0,DE\n", r"users\.csv, line 2: has 2 values, the header has 3"),
        ("user_id;country;age\nu0;DE;3\n", r"set delimiter: \";\" next to path"),
        ('user_id,country,age\nu0,"DE,3\n', r"users\.csv, line 2"),
        (
            "user_id,country,age\n0,DE,3\n1,DE,3\n",
            r"users\.csv: none of its 2 rows has the id of a user .* like '0', those of the dataset like 'u0'",
        ),
        (
            "user_id,country,age\nu0,DE,3\nzz,DE,4\nu0,DE,\n",
            r"users\.csv, line 4: user 'u0' has age = None, but '3' in .*users\.csv, line 2; keep one row per user",
        ),
    ],
)
def test_a_bad_table_is_refused_with_its_place(tmp_path: Path, table: str, complaint: str):
    (tmp_path / "users.csv").write_text(table)
    with pytest.raises(UserError, match=complaint):
        group(tmp_path, tmp_path / "users.csv")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (pa.array([[1]] * 4), r"row 0: x = \[1\] is of type list<element: int64>, where text or a number is expected"),
        (pa.array([None, dt.date(2000, 1, 1), None, None]), r"row 1: x = datetime.date.* of a date the year"),
        (pa.array([1.0, 2.0, float("inf"), 3.0]), r"row 2: x = inf is not a finite number"),
        (pa.array([b"a", b"\xff", b"c", b"d"]), r"row 1: x = b'\\xff' is binary data"),
    ],
)
def test_values_that_are_no_groups_are_refused(tmp_path: Path, values: pa.Array, complaint: str):
    pq.write_table(pa.table({"user_id": ["u0", "u1", "u2", "u3"], "x": values}), tmp_path / "table.parquet")
    with pytest.raises(UserError, match=complaint):
        group(tmp_path, tmp_path / "table.parquet", groups="x")


def test_lists_of_json_are_refused(tmp_path: Path):
    (tmp_path / "users.jsonl").write_text(jsonl([{"user_id": "u0", "x": "a"}, {"user_id": "u1", "x": ["a", "b"]}]))
    with pytest.raises(UserError, match=r"users\.jsonl, line 2: x = '\[.*' is a list or an object"):
        group(tmp_path, tmp_path / "users.jsonl", groups="x")


def recbole(folder: Path, user_file: str, groups: Any = ("age", "country")) -> dict[str, list[str]]:
    shop = folder / "shop"
    shop.mkdir()
    pairs = "".join(f"u{user}\ti{item}\n" for user in range(4) for item in range(2))
    (shop / "shop.inter").write_text(f"user_id:token\titem_id:token\n{pairs}")
    (shop / "shop.user").write_text(user_file)
    return grouped(folder, {"source": "recbole", "folder": str(shop), "kcore": 0, "user_groups": list(groups)})[0]


USER_HEADER = "user_id:token\tage:float\tCOUNTRY:token\tnames:token_seq\n"


def test_the_user_file_of_recbole(tmp_path: Path):
    rows = ["u0\t34.0\tDE\ta b", "u1\t7\t FR \t", "x\t1\tIT\t", "u3\t\tDE\t", "\t5\tIT\t"]
    assert recbole(tmp_path, USER_HEADER + "\n".join(rows) + "\n") == EXPECTED


@pytest.mark.parametrize(
    ("table", "groups", "complaint"),
    [
        (
            USER_HEADER + "u0\t1\tDE\t\n",
            ["names"],
            r"shop\.user: column 'names' is of type token_seq; users are compared",
        ),
        (USER_HEADER + "u0\t1\tDE\t\n", ["gender"], r"shop\.user: has no column 'gender'"),
        (USER_HEADER, ["age"], r"shop\.user: has no users, only a header"),
        ("", ["age"], r"shop\.user: is empty"),
        (USER_HEADER + "\t1\tDE\t\n", ["age"], r"none of its 0 rows has the id of a user of the dataset"),
        (USER_HEADER + "u0\t1\n", ["age"], r"1 of 1 lines are malformed"),
        (
            USER_HEADER + "u0\t1\tDE\t\nu0\t2\tDE\t\n",
            ["age"],
            r"shop\.user, line 3: user 'u0' has age = '2', but '1' in",
        ),
    ],
)
def test_bad_user_files_of_recbole(tmp_path: Path, table: str, groups: list[str], complaint: str):
    with pytest.raises(UserError, match=complaint):
        recbole(tmp_path, table, groups)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({}, r"users\.columns\.groups: required"),
        ({"groups": []}, r"users\.columns\.groups = \[\]"),
        ({"groups": ["age", "age"]}, r"duplicate column 'age'"),
        ({"groups": ["age_chance", "age"]}, r"'age' and 'age_chance': .* rename the second column"),
        ({"groups": "user"}, r"'user' cannot be the name of a group"),
        ({"user_id": "age", "groups": "age"}, r"'age' is the column of the ids"),
        ({"groups": "age", "age": "x"}, r"users\.columns\.age: unknown key"),
    ],
)
def test_bad_settings_are_refused(columns: dict[str, Any], complaint: str):
    data = {"source": "files", "interactions": {"path": "a.csv"}, "users": {"path": "b.csv", "columns": columns}}
    with pytest.raises(UserError, match=complaint):
        parse_dataset("mine", data, "datasets.mine")


def test_the_groups_of_a_version(tmp_path: Path):
    rows = [
        {"user_id": f"u{n}", "country": f"c{n * n % 47}", "age": n * 7 % 60 if n % 9 else None}
        for n in range(0, 100, 2)
    ]
    (tmp_path / "users.jsonl").write_text(jsonl([*rows, *({**row, "user_id": f"x{row['user_id']}"} for row in rows)]))
    found = group(tmp_path, tmp_path / "users.jsonl", users=100)
    check_golden("user-groups", STAGES["user-groups"].version, found)
