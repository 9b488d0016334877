"""The user's own tables: formats, times, ids, and the error for everything that can be wrong with them."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from oracles_sources import dataset, grid, jsonl, run_prepare

from cm3.common.errors import UserError
from cm3.common.tables import ITEMS, USERS, read_table
from cm3.datasets.reader import RATINGS
from cm3.datasets.registry import parse_dataset


def rows(path: Path, schema: pa.Schema) -> list[dict]:
    return read_table(path, schema).to_pylist()


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1600000000", 1_600_000_000),
        ("1600000000123", 1_600_000_000),
        ("1.6e9", 1_600_000_000),
        ("2020-09-16", 1_600_214_400),
        ("20200916", 1_600_214_400),
        ("2020-09-16 12:00:01", 1_600_257_601),
        ("2020-09-16T12:00:01.5", 1_600_257_601),
        ("2020-09-16T14:00:01+02:00", 1_600_257_601),
        ("1969-12-31T23:59:59.5", -1),
    ],
)
def test_times_become_unix_seconds(tmp_path: Path, written: str, seconds: int):
    dataset(tmp_path, f"user,item,timestamp\nu,i,{written}\n", kcore=0)()
    assert rows(tmp_path / "ratings.parquet", RATINGS)[0]["timestamp"] == seconds


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    """Files are read two rows, or two lines of some twenty bytes, at a time."""
    monkeypatch.setattr("cm3.datasets.files.tabular.PART_ROWS", 2)
    monkeypatch.setattr("cm3.datasets.files.tabular.PART_BYTES", 40)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_format_gives_the_same_tables(tmp_path: Path, suffix: str):
    records = [{"who": 100 + u, "what": f"i{i}", "when": 1_600_000_000 + i} for u in range(5) for i in range(5)]
    shop = [{"id": f"i{i}", "name": f'Item "{i}", red', "kind": "Toy"} for i in range(5)]
    paths = {}
    for name, table in (("interactions", records), ("items", shop)):
        path = paths[name] = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(table), path)
            continue
        if suffix.startswith("jsonl"):
            text = jsonl(table)
        else:
            mark = "," if suffix.startswith("csv") else "\t"
            quoted = [[f'"{str(v).replace(chr(34), chr(34) * 2)}"' for v in row.values()] for row in table]
            # Windows line ends and a byte order mark, as spreadsheets write them.
            text = "\ufeff" + "\r\n".join(mark.join(line) for line in [list(table[0]), *quoted]) + "\r\n"
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    run_prepare(
        tmp_path,
        {
            "source": "files",
            "interactions": {
                "path": str(paths["interactions"]),
                "columns": {"user": "who", "item": "what", "timestamp": "when"},
            },
            "items": {
                "path": str(paths["items"]),
                "columns": {"item_id": "id", "title": ["name", "kind"], "categories": "kind"},
            },
        },
    )
    assert [r["user_id"] for r in rows(tmp_path / "users.parquet", USERS)] == ["100", "101", "102", "103", "104"]
    found = rows(tmp_path / "items.parquet", ITEMS)
    assert found[3]["title"] == 'Item "3", red Toy' and found[3]["categories"] == ["Toy"]
    assert rows(tmp_path / "ratings.parquet", RATINGS)[7]["timestamp"] == 1_600_000_002


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"interactions\.csv: is empty"),
        ("user,item\n", r"interactions\.csv: has no rows"),
        (
            "user,item,rating\nu,i,4\nu,j\nu,k,5\n",
            r"interactions\.csv, line 3: has 2 values, the header has 3: 'u,j'",
        ),
        (
            "user,item,rating\n\nu,i,4\n\nu,j,nan\nu,k,\n",
            r"interactions\.csv, line 5: rating = 'nan' is not a finite number.*2 such rows",
        ),
        ("user,item,rating\nu,i,4\nu,j,good\n", r"line 3: rating = 'good' is not a finite number"),
        ("user,item,timestamp\nu,i,1600000000\nu,j,soon\n", r"line 3: timestamp = 'soon' is not a time"),
        ("user,item,timestamp\nu,i,2020-09-16\nu,j,2020-13-16\n", r"line 3: timestamp = '2020-13-16' is not a time"),
        ("user,item,timestamp\nu,i,1600000000000\nu,j,1600000000\n", r"line 3: .*seconds in a column of milliseconds"),
        ("user,item\nu,i\n,j\n", r"line 3: user = '' is empty"),
        ("user,item\nu,i\nu,\n", r"line 3: item = '' is empty"),
        ("usr,item\nu,i\n", r"no column 'user' \(did you mean 'usr'\?\)"),
        ("user,item,item\nu,i,i\n", r"line 1: duplicate column 'item' in the header"),
    ],
)
def test_malformed_interactions_name_file_and_line(tmp_path: Path, text: str, complaint: str):
    with pytest.raises(UserError, match=complaint):
        dataset(tmp_path, text, kcore=0)()
    assert not (tmp_path / "ratings.parquet").exists()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("times", "complaint"),
    [
        (
            ["1600000000"] * 8 + ["1600000000000"],
            "line 10: .*'1600000000000' looks like milliseconds in a column of Unix",
        ),
        (["1600000000000"] * 8 + ["1600000000"], "line 10: .*looks like Unix seconds in a column of milliseconds"),
        (["0"] * 4 + ["1600000000000"] * 4 + ["5"], "line 10: .*looks like Unix seconds in a column of milliseconds"),
        (["2020-09-16"] * 8 + ["1600000000"], "line 10: timestamp = '1600000000' is not a time"),
        (["1600000000"] * 8 + ["2020-09-16"], "line 10: timestamp = '2020-09-16' is not a time"),
        (["2020-09-16T00:00:01"] * 8 + ["2020-09-16T00:00:01Z"], "mixes times with and without time zone"),
        (["2020-09-16T00:00:01Z"] * 8 + ["2020-09-16T00:00:01"], "mixes times with and without time zone"),
        (["1600000000"] * 8 + ["1,2"], "line 10: has 4 values, the header has 3"),
        (
            ["0"] * 4 + ["20200229"] * 4 + ["20210229"],
            "line 10: .*'20210229' is not a date in a column of dates like 20200916",
        ),
        (["20200916"] * 8 + ["1600000000"], "line 10: .*'1600000000' is not a date in a column of dates like 20200916"),
        (["1600000000"] * 8 + ["4102444801"], "line 10: .*is not between 1970 and 2099"),
        (["1600000000000"] * 8 + ["1600000000000000"], "line 10: .*is not between 1970 and 2099"),
        (
            ["0"] * 8 + ["1600000000000000000000"],
            "line 10: .*is not between 1970 and 2099; give Unix seconds, milliseconds or",
        ),
        (["5"] * 8 + ["-1"], "line 10: .*'-1' is not between 1970 and 2099"),
        (["1969-12-31"] * 8 + ["2999-12-31"], "line 10: .*'2999-12-31' is after 2099"),
    ],
)
def test_all_parts_of_a_table_write_times_alike(tmp_path: Path, times: list[str], complaint: str):
    lines = [f"u,i{n},{time}\n" for n, time in enumerate(times)]
    with pytest.raises(UserError, match=complaint):
        dataset(tmp_path, "user,item,timestamp\n" + "".join(lines), kcore=0)()
    dataset(tmp_path, "user,item,timestamp\n" + "".join(lines[:-1]), kcore=0)()
    assert len(rows(tmp_path / "ratings.parquet", RATINGS)) == 8


def test_a_count_that_looks_like_a_date_here_and_there_is_none(tmp_path: Path):
    text = "user,item,timestamp\n" + "".join(f"u,i{n},{20200801 + n}\n" for n in range(60))
    dataset(tmp_path, text, kcore=0)()
    assert rows(tmp_path / "ratings.parquet", RATINGS)[7]["timestamp"] == 20200808
    path = tmp_path / "days.parquet"
    pq.write_table(pa.table({"user": ["u"] * 3, "item": list("abc"), "timestamp": [20200801, 0, 19991231]}), path)
    columns = {"user": "user", "item": "item", "timestamp": "timestamp"}
    run_prepare(tmp_path, {"source": "files", "kcore": 0, "interactions": {"path": str(path), "columns": columns}})
    assert [r["timestamp"] for r in rows(tmp_path / "ratings.parquet", RATINGS)] == [0, 946_598_400, 1_596_240_000]


@pytest.mark.parametrize("zone", [None, "UTC", "+02:00"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_parquet_times_are_read_in_every_unit(tmp_path: Path, unit: str, zone: str | None):
    stamp = 1_600_257_601_123_456_789 // 10 ** {"s": 9, "ms": 6, "us": 3, "ns": 0}[unit]
    times = pa.array([stamp], pa.timestamp(unit, zone))
    pq.write_table(pa.table({"user": ["u"], "item": ["i"], "timestamp": times}), tmp_path / "x.parquet")
    columns = {"user": "user", "item": "item", "timestamp": "timestamp"}
    path = str(tmp_path / "x.parquet")
    run_prepare(tmp_path, {"source": "files", "kcore": 0, "interactions": {"path": path, "columns": columns}})
    assert rows(tmp_path / "ratings.parquet", RATINGS)[0]["timestamp"] == 1_600_257_601


def test_half_a_character_costs_a_letter_of_a_text_and_is_refused_in_an_id(tmp_path: Path):
    items = [
        {"item_id": "a", "title": "Mug \ud83d", "categories": [["\udc00 Home"]], "image": ["\ud800.jpg", "a.jpg"]},
        {"item_id": "b", "title": "Cup \U0001f600"},
    ]
    dataset(tmp_path, "user,item\nu,a\nu,b\n", jsonl(items), kcore=0)()
    mug, cup = rows(tmp_path / "items.parquet", ITEMS)
    assert (mug["title"], mug["categories"], mug["image_urls"], cup["title"]) == (
        "Mug",
        ["Home"],
        ["a.jpg"],
        "Cup \U0001f600",
    )
    with pytest.raises(UserError, match=r"items\.jsonl, line 1: item_id = 'a\\udc00' has half of a character"):
        dataset(tmp_path, "user,item\nu,a\n", jsonl([{"item_id": "a\udc00", "title": "T"}]), kcore=0)()
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + jsonl([{"user": "u", "item": n} for n in ("i", "j", "k\ud83d", "\ud83d")]))
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 4: item = 'k\\ud83d' has half of a character"):
        run_prepare(tmp_path, {"source": "files", "kcore": 0, "interactions": {"path": str(path)}})


def test_lists_without_end_are_read_or_refused(tmp_path: Path):
    deep = "[" * 700 + '"Home"' + "]" * 700
    dataset(tmp_path, "user,item\nu,a\n", '{"item_id": "a", "categories": ' + deep + "}\n", kcore=0)()
    assert rows(tmp_path / "items.parquet", ITEMS)[0]["categories"] == ["Home"]
    with pytest.raises(UserError, match=r"items\.jsonl, line 1: not a JSON object"):
        dataset(tmp_path, "user,item\nu,a\n", '{"item_id": "a", "categories": ' + "[" * 100_000, kcore=0)()


def test_bytes_that_are_no_text_name_the_line(tmp_path: Path):
    run = dataset(tmp_path, "user,item\nu,i\n", kcore=0)
    (tmp_path / "interactions.csv").write_bytes(b"user,item\nu,i\nu,\xff\xfe\n")
    with pytest.raises(UserError, match=r"interactions\.csv, line 3: not UTF-8"):
        run()


def test_a_gzip_file_cut_short_is_named(tmp_path: Path):
    run = dataset(tmp_path, "user,item\nu,i\n", kcore=0)
    whole = gzip.compress(grid(100, 100).encode())
    (tmp_path / "interactions.csv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"interactions\.csv.*(damaged|[Tt]runcated|unexpected end)"):
        run()


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (pa.array([1.5, 2.5]), r"ids must be text or integers"),
        (pa.array(["u", None]), r"row 1: user = None is empty"),
    ],
)
def test_parquet_ids_must_be_ids(tmp_path: Path, value: pa.Array, complaint: str):
    pq.write_table(pa.table({"user": value, "item": ["i", "j"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=complaint):
        run_prepare(tmp_path, {"source": "files", "interactions": {"path": str(tmp_path / "x.parquet")}, "kcore": 0})


@pytest.mark.parametrize(
    ("items", "complaint"),
    [
        ('{"item_id": "i", "title": "T"}\nnonsense\n', r"items\.jsonl, line 2: not a JSON object"),
        ('{"item_id": "i", "title": "T"}\n[1]\n', r"items\.jsonl, line 2: not a JSON object"),
        (
            '{"item_id": "i", "title": "T"}\n\n{"item_id": "i", "title": "U"}\n',
            r"line 3: duplicate item id 'i', first at .*line 1",
        ),
        ('{"item_id": "", "title": "T"}\n', r"line 1: item_id is empty"),
        ('{"itemid": "i", "title": "T"}\n', r"line 1: has no 'item_id' \(did you mean 'itemid'\?\)"),
        ("", r"items\.jsonl: is empty"),
    ],
)
def test_malformed_items_name_file_and_line(tmp_path: Path, items: str, complaint: str):
    with pytest.raises(UserError, match=complaint):
        dataset(tmp_path, "user,item\nu,i\n", items, kcore=0)()


def test_a_mapped_item_column_that_no_row_has_is_an_error(tmp_path: Path):
    dataset(tmp_path, "user,item\nu,i\n", '{"item_id": "i", "title": "T"}\n', kcore=0)
    data = {
        "source": "files",
        "kcore": 0,
        "interactions": {"path": str(tmp_path / "interactions.csv")},
        "items": {"path": str(tmp_path / "items.jsonl"), "columns": {"title": "titel"}},
    }
    with pytest.raises(UserError, match=r"items\.jsonl: has no column 'titel' \(did you mean 'title'\?\)"):
        run_prepare(tmp_path, data)


def test_a_folder_of_parquet_parts_is_one_table(tmp_path: Path):
    pairs = pa.table({"user": [f"u{n % 4}" for n in range(24)], "item": [f"i{n % 6}" for n in range(24)]})
    shop = pa.table({"item_id": [f"i{n}" for n in range(6)], "title": [f"Title {n}" for n in range(6)]})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    pq.write_table(pairs, whole / "pairs.parquet")
    pq.write_table(shop, whole / "shop.parquet")
    for name, table in (("pairs", pairs), ("shop", shop)):
        for number, start in enumerate((0, 2, 5)):
            place = parts / name / ("" if number else "first") / f"part-{number:05}-of-3.snappy.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.slice(start, (2, 3, 100)[number]), place)
        pq.write_table(table.slice(0, 0), parts / name / "part-00003.parquet")  # Spark writes empty parts
        (parts / name / "_SUCCESS").touch()
        (parts / name / "_temporary.parquet").write_text("left by a killed job")
    paths = {folder: (folder / "pairs", folder / "shop") for folder in (whole, parts)}
    for folder, (interactions, items) in paths.items():
        suffix = ".parquet" if folder == whole else ""
        data = {
            "source": "files",
            "kcore": 2,
            "interactions": {"path": f"{interactions}{suffix}"},
            "items": {"path": f"{items}{suffix}", "columns": {"title": "title"}},
        }
        spec = parse_dataset("mine", data, "datasets.mine")
        assert len(spec.prepare_inputs("mine")) == (2 if suffix else 8)
        run_prepare(folder, data)
    for name, schema in (("ratings", RATINGS), ("items", ITEMS), ("users", USERS)):
        assert rows(whole / f"{name}.parquet", schema) == rows(parts / f"{name}.parquet", schema)
    pq.write_table(pa.table({"user": ["u"], "item": [None]}), parts / "pairs" / "part-00009.parquet")
    with pytest.raises(UserError, match=r"part-00009\.parquet, row 0: item"):
        run_prepare(parts, {"source": "files", "interactions": {"path": str(parts / "pairs")}})


def test_a_folder_without_parts_is_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"empty: is a folder, not a file; name a file, or of Parquet a folder with parts"
    ):
        run_prepare(tmp_path, {"source": "files", "interactions": {"path": str(tmp_path / "empty")}})
    with pytest.raises(UserError, match=r"unknown suffix in '.*nowhere', and no folder"):
        run_prepare(tmp_path, {"source": "files", "interactions": {"path": str(tmp_path / "nowhere")}})
