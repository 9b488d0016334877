"""RecBole's atomic files: typed headers, published splits, items with sequences; what is malformed is named."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.common.tables import INTERACTIONS, ITEMS, USERS, read_table
from cm3.datasets.recbole.reader import Reader
from cm3.datasets.registry import parse_dataset
from cm3.datasets.splits import split_ratings

TYPED = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ITEM_HEADER = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
PAIRS = [(user, (user + step) % 5) for user in range(5) for step in range(4)]


def lines_of(pairs: list[tuple[int, int]]) -> list[str]:
    return [f"u{user}\ti{item}\t{1 + (user + item) % 5}.0\t{1_400_000_000 + 10 * user + item}" for user, item in pairs]


def write(folder: Path, header: str = TYPED, rows: list[str] | None = None, items: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = lines_of(PAIRS) if rows is None else rows
    (folder / f"{folder.name}.inter").write_text("\n".join([header, *rows]) + "\n", newline="")
    if items is not None:
        (folder / f"{folder.name}.item").write_text(items, newline="")
    return folder


def config(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"source": "recbole", "folder": str(folder), **settings}


def reader(folder: Path, **settings: Any) -> Reader:
    dataset = parse_dataset("shop", config(folder, **settings), "datasets.shop")
    return Reader(dataset.prepare_spec(), {n: Path(p) for n, p in dataset.prepare_inputs("shop").items()})


def interactions(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    return pa.concat_tables(reader(folder, **settings).interactions()).to_pylist()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "header", [TYPED, "USER\tITEM\tRATING\tTIMESTAMP", "\ufeffuser_id:token\titem_id:token\trating:float\ttimestamp"]
)
def test_interactions_of_typed_and_bare_headers(tmp_path: Path, header: str, end: str):
    folder = write(tmp_path / "shop", header.replace("\n", end), [line + end[:-1] for line in lines_of(PAIRS)])
    found = interactions(folder)
    assert [(row["user"], row["item"]) for row in found] == [(f"u{u}", f"i{i}") for u, i in PAIRS]
    assert found[0] == {"user": "u0", "item": "i0", "rating": 1.0, "timestamp": 1_400_000_000, "split": None}


@pytest.mark.parametrize(
    ("old", "new"),
    [(":token", ": token"), (":token", ":TOKEN"), ("\t", " \t"), ("timestamp:float", "timestamp:float\t\t")],
    ids=["space", "upper case", "space before the separator", "empty columns"],
)
def test_headers_of_strangers(tmp_path: Path, old: str, new: str):
    rows = [line + "\t" * new.count("\t\t") + "\t" * new.count("\t\t") for line in lines_of(PAIRS)]
    folder = write(tmp_path / "shop", TYPED.replace(old, new), rows)
    assert [(row["user"], row["item"]) for row in interactions(folder)] == [(f"u{u}", f"i{i}") for u, i in PAIRS]


def test_lines_of_white_space_are_no_rows(tmp_path: Path):
    folder = write(tmp_path / "shop", rows=["", *lines_of(PAIRS), "   ", " \r"])
    assert len(interactions(folder)) == len(PAIRS)


@pytest.mark.parametrize("missing", ["NaN", "nan", "None", "null", "<NA>"])
def test_texts_of_missing_ids_are_left_out_as_by_recbole(tmp_path: Path, missing: str):
    rows = [f"{missing}\ti1\t3.0\t1400000000", f"u1\t{missing}\t3.0\t1400000000", *lines_of(PAIRS)]
    read = reader(write(tmp_path / "shop", rows=rows))
    assert sum(len(table) for table in read.interactions()) == len(PAIRS)
    assert read.notes == {"left out: interaction without user or item": 2}


def test_items_in_another_encoding_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = write(tmp_path / "shop")
    (folder / "shop.item").write_bytes("item_id:token\ttitle:token_seq\ni0\tCafé\n".encode("latin-1"))
    assert reader(folder).items({"i0"})["i0"].title == "Caf\ufffd"
    assert "shop.item, line 2: not UTF-8 text; characters were replaced" in caplog.text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text.replace("\t", ","), r"has one column, .* set field_separator: \",\""),
        (lambda text: text.replace("\n", "\r"), "its lines end with a carriage return alone"),
    ],
)
def test_other_separators_and_line_ends_are_named(tmp_path: Path, change: Callable[[str], str], complaint: str):
    folder = write(tmp_path / "shop")
    path = folder / "shop.inter"
    path.write_text(change(path.read_text()), newline="")
    with pytest.raises(UserError, match=complaint):
        interactions(folder)
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(UserError, match=r"shop\.inter: is UTF-16 text; save it as UTF-8"):
        interactions(folder)
    path.rename(folder / "shop.inter.gz")
    with pytest.raises(UserError, match=r"has no shop\.inter; the folder has shop\.inter\.gz"):
        reader(folder)


def test_users_and_items_alone_are_enough(tmp_path: Path):
    folder = write(tmp_path / "shop", "timestep:float\titem_id:token\tuser_id:token", ["0\t07\t1", "1\t7\t1.0"])
    assert interactions(folder) == [
        {"user": "1", "item": "07", "rating": None, "timestamp": None, "split": None},
        {"user": "1.0", "item": "7", "rating": None, "timestamp": None, "split": None},
    ]


def test_other_names_and_separators(tmp_path: Path):
    folder = write(tmp_path / "shop", "uid:token,sku:token,stars:float,when:float", ["a,b,3,1400000000000"])
    (folder / "shop.item").write_text("sku:token,label:token_seq,tags:token_seq\nb,One  two,red|blue|red\n")
    settings: dict[str, Any] = {
        "field_separator": ",",
        "seq_separator": "|",
        "columns": {"user": "UID", "item": "sku", "rating": "stars", "timestamp": "when"},
        "items": {"title": "label", "categories": "tags"},
    }
    assert interactions(folder, **settings) == [
        {"user": "a", "item": "b", "rating": 3.0, "timestamp": 1_400_000_000, "split": None}
    ]
    item = reader(folder, **settings).items({"b"})["b"]
    assert (item.title, list(item.categories)) == ("One two", ["red", "blue"])


def test_items_have_titles_and_categories(tmp_path: Path):
    rows = ["i0\tToy Story\t1995\tAnimation Children's Comedy", "i1\tGoldenEye &amp; Co\t1995\t", "i9\t\t\tDrama"]
    stats = run_prepare(
        tmp_path, config(write(tmp_path / "shop", items="\n".join([ITEM_HEADER, *rows]) + "\n"), kcore=2)
    )
    items = {row["item_id"]: row for row in read_table(tmp_path / "items.parquet", ITEMS).to_pylist()}
    assert stats["items"] == 5 and stats["unknown_items"]["items"] == 3
    assert (items["i0"]["title"], items["i0"]["categories"]) == ("Toy Story", ["Animation", "Children's", "Comedy"])
    assert (items["i1"]["title"], items["i1"]["categories"]) == ("GoldenEye & Co", [])
    assert items["i2"]["title"] == ""


@pytest.mark.parametrize(
    ("cell", "title"),
    [
        ('"Two\nlines, ""quoted"""', 'Two lines, "quoted"'),
        ('"Weird" Al', '"Weird" Al'),
        ('12" LP', '12" LP'),
        ('"not closed', '"not closed'),
    ],
)
def test_quotes_as_pandas_writes_them_and_as_people_do(tmp_path: Path, cell: str, title: str):
    folder = write(tmp_path / "shop", items=f"item_id:token\ttitle:token_seq\ni0\t{cell}\ni1\tplain\n")
    found = reader(folder).items({"i0", "i1"})
    assert {name: item.title for name, item in found.items()} == {"i0": title, "i1": "plain"}


def test_images_are_paths_or_urls(tmp_path: Path):
    folder = write(tmp_path / "shop", items="ITEM\tIMAGE\ni0\ta b.jpg\ni1\t\n")
    found = reader(folder, images={"folder": str(tmp_path)}).items({"i0", "i1"})
    assert [list(found[name].image_urls) for name in ("i0", "i1")] == [["a b.jpg"], []]


def test_rows_without_ids_are_left_out_and_counted(tmp_path: Path):
    folder = write(tmp_path / "shop", "user_id:token\titem_id:token\ttimestamp:float", ["1\t\t0", "\t1\t1", "1\t1\t"])
    (folder / "shop.item").write_text("item_id:token\tprice:float\n\t0\n1\t1\n")
    found = reader(folder)
    rows = pa.concat_tables(found.interactions()).to_pylist()
    assert [(row["user"], row["item"], row["timestamp"]) for row in rows] == [("1", "1", None)]
    assert list(found.known_items() or []) == [["1"]]
    assert found.notes == {"left out: interaction without user or item": 2, "left out: item without id": 1}


def parts(folder: Path, names: tuple[str, ...] = ("train", "valid", "test")) -> Path:
    folder.mkdir(parents=True)
    for label, name in enumerate(names):
        rows = lines_of([(user, item) for step, (user, item) in enumerate(PAIRS) if max(0, step % 4 - 1) == label])
        (folder / f"{folder.name}.{name}.inter").write_text("\n".join([TYPED, *rows]) + "\n")
    return folder


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("part1", "part2", "part3")])
def test_a_published_split_is_used_as_it_is(tmp_path: Path, names: tuple[str, ...]):
    settings = {} if names[0] == "train" else {"benchmark": list(names)}
    data = config(parts(tmp_path / "shop", names), **settings)
    dataset = parse_dataset("shop", data, "datasets.shop")
    assert dataset.split_spec()["strategy"] == "published" and dataset.prepare_spec()["kcore"] == 0
    run_prepare(tmp_path, data)
    split_ratings(tmp_path / "ratings.parquet", tmp_path / "interactions.parquet", "published", 1)
    users, items = read_table(tmp_path / "users.parquet", USERS), read_table(tmp_path / "items.parquet", ITEMS)
    table = read_table(tmp_path / "interactions.parquet", INTERACTIONS).to_pylist()
    found = {
        (users["user_id"][r["user"]].as_py(), items["item_id"][r["item"]].as_py(), r["split"]): None for r in table
    }
    labels = ("train", "train", "valid", "test")
    assert set(found) == {(f"u{u}", f"i{i}", labels[step % 4]) for step, (u, i) in enumerate(PAIRS)}


def test_a_pair_in_two_parts_is_a_leak(tmp_path: Path):
    folder = parts(tmp_path / "shop")
    train, test = folder / "shop.train.inter", folder / "shop.test.inter"
    test.write_text(test.read_text() + train.read_text().splitlines()[1] + "\n")
    with pytest.raises(UserError, match=r"1 pairs .* user u0, item i0 in train and test"):
        interactions(folder)


@pytest.mark.parametrize(
    ("header", "row", "complaint"),
    [
        (
            "uid:token\titem_id:token",
            "a\tb",
            r"line 1: has no column 'user_id'.* must name the columns, such as user_id",
        ),
        (
            "user_id:token\titem_id:tokn",
            "a\tb",
            r"line 1: 'item_id:tokn': unknown type; the types are token, token_seq",
        ),
        ("user_id:token\tuser_id:token\titem_id", "a\ta\tb", r"line 1: duplicate column 'user_id'"),
        (
            TYPED,
            "a\tb\t3",
            r"line 22: has 3 values, the header has 4; the separator is '\\t' .field_separator.: 'a\\tb",
        ),
        (TYPED, "a\tb\tgood\t1400000000", r"line 22: rating = 'good' is not a finite number"),
        (TYPED, "a\tb\t3\tyesterday", r"line 22: timestamp = 'yesterday' is not a time"),
        ("user_id:token,item_id:token", "a,b", r"line 1: has one column, .* set field_separator: \",\""),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, header: str, row: str, complaint: str):
    rows = [*lines_of(PAIRS), row] if header == TYPED else [row]
    with pytest.raises(UserError, match=r"shop\.inter, " + complaint):
        interactions(write(tmp_path / "shop", header, rows))


def test_few_malformed_lines_are_skipped_and_counted(tmp_path: Path):
    rows = [*lines_of(PAIRS) * 6, "a\tb"]
    found = reader(write(tmp_path / "shop", rows=rows, items="item_id:token\ttitle:token\ni0\tA\ni1\n"), malformed=0.5)
    assert sum(map(len, found.interactions())) == 120 and list(found.known_items() or []) == [["i0"]]
    assert sorted(found.notes.values()) == [1, 1]


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        reader(tmp_path / "nowhere")
    folder = write(tmp_path / "shop")
    with pytest.raises(UserError, match=r"has no mine\.inter; set name or benchmark, the folder has shop\.inter"):
        reader(folder, name="mine")
    with pytest.raises(UserError, match=r"has no shop\.a\.inter"):
        reader(folder, benchmark=["a", "b", "c"])
    with pytest.raises(UserError, match=r"shop\.inter: has no column 'usr' \(did you mean 'user_id'\?\)"):
        interactions(folder, columns={"user": "usr"})
    write(folder, items="item_id:token\ttitle:token\ni0\tA\ni0\tB\n")
    with pytest.raises(UserError, match=r"shop\.item, line 3: duplicate item id 'i0'"):
        list(reader(folder).known_items() or [])
    write(folder, items="item_id:token\ttitle:token\n")
    with pytest.raises(UserError, match=r"shop\.item: has no items, only a header"):
        list(reader(folder).known_items() or [])
    write(folder, rows=[])
    with pytest.raises(UserError, match=r"shop\.inter: has no interactions"):
        interactions(folder)


@pytest.fixture
def strangers(real_data: Path, tmp_path: Path) -> Iterator[Path]:
    """RecBole's own examples in one folder a data set."""
    for name, files in {
        "test": ("test.inter",),
        "ml-100k": ("ml-100k.item",),
        "nan": ("nan.inter", "nan.item"),
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            shutil.copy(real_data / "odd" / f"recbole_{file}", tmp_path / name / file)
    yield tmp_path


def test_recbole_files_of_others(strangers: Path):
    shutil.copy(strangers / "test/test.inter", strangers / "ml-100k/ml-100k.inter")
    stats = run_prepare(strangers, config(strangers / "ml-100k", kcore=5))
    items = {row["item_id"]: row for row in read_table(strangers / "items.parquet", ITEMS).to_pylist()}
    assert stats["reading"] == {"left out: has 5 values, the header has 4; the separator is '\\t' (field_separator)": 1}
    assert stats["items"] == len(items) > 10 and items["1"]["title"] == "Toy Story"
    assert items["1"]["categories"] == ["Animation", "Children's", "Comedy"]
    stats = run_prepare(strangers, config(strangers / "nan", kcore=0))
    assert stats["interactions"] == 1 and sum(stats["reading"].values()) == 5
