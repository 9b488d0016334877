"""Types of the user's own tables: Parquet and JSON Lines of other programs are read as what they are, or refused by row."""

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from oracles_sources import dataset, run_prepare

from cm3.common.errors import UserError
from cm3.common.tables import ITEMS, USERS, read_table
from cm3.datasets.reader import RATINGS

COLUMNS = {"user": "user", "item": "item", "rating": "rating", "timestamp": "time"}
PLAIN: dict[str, Any] = {"user": ["u", "v"], "item": ["i", "j"], "rating": [4.0, 5.0], "time": [1_600_000_000] * 2}


def prepare(folder: Path, changed: dict[str, Any], items: pa.Table | None = None, **columns: Any) -> None:
    """Prepare a table of two interactions, with other columns in place of the plain ones."""
    path = folder / "pairs.parquet"
    pq.write_table(pa.table(PLAIN | changed), path)
    data = {"source": "files", "kcore": 0, "interactions": {"path": str(path), "columns": COLUMNS}}
    if items is not None:
        pq.write_table(items, folder / "shop.parquet")
        data["items"] = {"path": str(folder / "shop.parquet"), "columns": columns}
    run_prepare(folder, data)


def column(folder: Path, name: str, schema: pa.Schema, column: str) -> list[Any]:
    found: list[Any] = read_table(folder / f"{name}.parquet", schema).column(column).to_pylist()
    return found


@pytest.mark.parametrize(
    "users",
    [
        pa.array(["1", "2"], pa.string_view()),
        pa.array([b"1", b"2"]),
        pa.array([b"1", b"2"]).dictionary_encode(),
        pa.array([1.0, 2.0]),
        pa.array([Decimal("1.00"), Decimal("2.00")]),
        pa.array([1, 2], pa.uint64()),
    ],
    ids=lambda column: str(column.type),
)
def test_users_of_every_type_have_the_same_ids(tmp_path: Path, users: pa.Array):
    prepare(tmp_path, {"user": users})
    assert column(tmp_path, "users", USERS, "user_id") == ["1", "2"]


@pytest.mark.parametrize(
    "changed",
    [
        {"rating": pa.array([b"4", b"5"]), "time": pa.array([b"2020-09-13 12:26:40"] * 2)},
        {"rating": pa.array([4, 5]).cast(pa.decimal128(21, 2)), "time": pa.array([1_600_000_000.5] * 2)},
        {"rating": pa.array(["4", "5"]).dictionary_encode(), "time": pa.array([1_600_000_000_000] * 2, pa.uint64())},
        {
            "rating": pa.array(np.asarray([4, 5], np.float16)),
            "time": pa.array(["2020-09-13T12:26:40.123456789Z"] * 2, pa.string_view()),
        },
    ],
)
def test_ratings_and_times_of_every_type_are_the_same(tmp_path: Path, changed: dict[str, pa.Array]):
    prepare(tmp_path, changed)
    assert column(tmp_path, "ratings", RATINGS, "rating") == [4, 5]
    assert column(tmp_path, "ratings", RATINGS, "timestamp") == [1_600_000_000] * 2


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"user": pa.array([1.0, None])}, r"row 1: user = None is empty; every interaction needs a user and an item"),
        ({"user": pa.array([1.0, float("nan")])}, r"row 1: user = nan is a missing value"),
        ({"item": pa.array(["i", "nan"])}, r"row 1: item = 'nan' is the text of a missing value"),
        ({"item": pa.array(["i", " "])}, r"row 1: item = ' ' is empty"),
        ({"user": pa.array([1.0, 2.5])}, r"row 1: user = 2\.5 is not a whole number.*ids must be text or integers"),
        ({"user": pa.array([{"id": "u"}, None])}, r"row 0: user = {'id': 'u'} is of type struct<id: string>"),
        ({"user": pa.array([True, False])}, r"row 0: user = True is of type bool"),
        ({"user": pa.array([b"u", b"\xff"])}, r"row 1: user = b'\\xff' is binary data, not UTF-8 text"),
        ({"rating": pa.array([4.0, 1e300])}, r"row 1: rating = 1e\+300 is not a finite number"),
        ({"rating": pa.array([{"stars": 4}] * 2)}, r"row 0: rating = {'stars': 4} is not a finite number"),
        ({"time": pa.array([True, False])}, r"row 0: time = True is not a time"),
        ({"time": pa.array([dt.date(2020, 1, 1), None])}, r"row 1: time = None is empty; a time is needed"),
    ],
)
def test_what_cannot_be_read_names_row_and_value(tmp_path: Path, changed: dict[str, pa.Array], complaint: str):
    with pytest.raises(UserError, match=rf"pairs\.parquet, {complaint}"):
        prepare(tmp_path, changed)


def test_texts_without_a_mark_are_decoded(tmp_path: Path):
    items = pa.table(
        {
            "item_id": pa.array([b"i", b"j"]),
            "title": pa.array(["café".encode(), None]),
            "tags": pa.array([[b"red", b"cup"], None]),
        }
    )
    prepare(tmp_path, {}, items, title="title", categories="tags")
    assert column(tmp_path, "items", ITEMS, "title") == ["café", ""]
    assert column(tmp_path, "items", ITEMS, "categories") == [["red", "cup"], []]


IMAGE = b"\x89PNG\r\n" + bytes(5000)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"title": pa.array([None, {"en": "Cup"}])}, r"row 1: title = {'en': 'Cup'} is of type struct<en: string>"),
        ({"title": pa.array([[("en", "Cup")]] * 2, pa.map_(pa.string(), pa.string()))}, r"row 0: title = .*map<"),
        ({"title": pa.array([[{"en": "Cup"}], None])}, r"row 0: title = .* is of type list<"),
        ({"image": pa.array([{"bytes": IMAGE, "path": "i.png"}] * 2)}, r"row 0: image = {'bytes': .*struct<bytes"),
        ({"image": pa.array([IMAGE] * 2)}, r"row 0: image = .* is binary data, not UTF-8 text"),
        ({"image": pa.array([[IMAGE], None])}, r"row 0: image = .* is binary data, not UTF-8 text"),
        ({"item_id": pa.array(["i", None])}, r"row 1: item_id is empty; every item needs an id"),
        ({"item_id": pa.array([1.0, 1.5])}, r"row 1: item_id = 1\.5 is not a whole number"),
        ({"item_id": pa.array([True, False])}, r"row 0: item_id = True is a truth value"),
    ],
)
def test_objects_and_images_are_no_text(tmp_path: Path, changed: dict[str, pa.Array], complaint: str):
    items = pa.table({"item_id": ["i", "j"], "title": ["Cup", "Mug"], "image": ["i.png", "j.png"]} | changed)
    with pytest.raises(UserError, match=rf"shop\.parquet, {complaint}") as error:
        prepare(tmp_path, {}, items, title="title", image="image")
    assert len(str(error.value)) < 500


def test_text_that_is_not_utf8_names_the_row(tmp_path: Path):
    offsets = pa.py_buffer(np.asarray([0, 1, 2], np.int32))
    latin = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xe9")])
    with pytest.raises(UserError, match=r"pairs\.parquet, row 1: user = b'\\xe9' is binary data"):
        prepare(tmp_path, {"user": latin})
    with pytest.raises(UserError, match=r"shop\.parquet, row 1: title cannot be read .*utf-8"):
        prepare(tmp_path, {}, pa.table({"item_id": ["i", "j"], "title": latin}), title="title")


def test_a_column_twice_in_parquet_is_refused_if_it_is_read(tmp_path: Path):
    arrays = [pa.array(["u"]), pa.array(["i"]), pa.array([1]), pa.array([2])]
    data = {"source": "files", "kcore": 0, "interactions": {"path": str(tmp_path / "x.parquet")}}
    pq.write_table(pa.Table.from_arrays(arrays, names=["user", "item", "note", "note"]), tmp_path / "x.parquet")
    run_prepare(tmp_path, data)
    pq.write_table(pa.Table.from_arrays(arrays, names=["user", "item", "user", "note"]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: duplicate column 'user'"):
        run_prepare(tmp_path, data)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, "user = None is empty"),
        (float("nan"), "user = None is empty"),
        ("NaN", "user = None is empty"),
        (1.5, r"user = 1\.5 is not a whole number"),
        (True, "user = True is a truth value"),
        (["u"], r"user = \['u'\] is a list; ids must be text or integers"),
        ({"$oid": "5f"}, r"user = {'\$oid': '5f'} is an object"),
    ],
)
def test_a_json_value_that_is_no_id_names_the_line(tmp_path: Path, value: Any, complaint: str):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"user": user, "item": "i"}) + "\n" for user in ("u", value)))
    with pytest.raises(UserError, match=rf"pairs\.jsonl, line 2: {complaint}"):
        run_prepare(tmp_path, {"source": "files", "kcore": 0, "interactions": {"path": str(path)}})


def test_json_numbers_are_one_id_however_they_are_written(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    lines = [f'{{"user": {user}, "item": "i{n}"}}\n' for n, user in enumerate(("7", "7.0", '"7"', "7e0", 2**70))]
    path.write_text("".join(lines))
    run_prepare(tmp_path, {"source": "files", "kcore": 0, "interactions": {"path": str(path)}})
    assert column(tmp_path, "users", USERS, "user_id") == [str(2**70), "7"]


@pytest.mark.parametrize(
    ("title", "complaint"),
    [({"en": "Cup"}, "title = {'en': 'Cup'} is an object, not a text"), ([{"en": "Cup"}], "title = .* is an object")],
)
def test_a_json_object_is_no_text(tmp_path: Path, title: Any, complaint: str):
    run = dataset(tmp_path, "user,item\nu,i\n", json.dumps({"item_id": "i", "title": title}) + "\n", kcore=0)
    with pytest.raises(UserError, match=rf"items\.jsonl, line 1: {complaint}"):
        run()


@pytest.mark.parametrize(("pairs", "items"), [("5.0", "5"), ("5", "5.0")])
@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_float_ids_next_to_integer_ids_are_an_error(tmp_path: Path, pairs: str, items: str, policy: str):
    shop = f'{{"item_id": "{items}", "title": "T"}}\n{{"item_id": "i", "title": "T"}}\n'
    run = dataset(tmp_path, f"user,item\nu,{pairs}\nu,i\n", shop, kcore=0, unknown_items=policy)
    with pytest.raises(UserError, match=rf"such as '{pairs}' in the interactions and '{items}' in the item table"):
        run()


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv.gz", "pairs.jsonl", "pairs.parquet"])
def test_a_folder_or_a_dangling_link_in_place_of_a_table_is_named(tmp_path: Path, name: str):
    path = tmp_path / name
    path.mkdir()
    data = {"source": "files", "kcore": 0, "interactions": {"path": str(path)}}
    with pytest.raises(UserError, match="is a folder, not a file"):
        run_prepare(tmp_path, data)
    path.rmdir()
    path.symlink_to("nowhere")
    with pytest.raises(UserError, match="a link to a file that does not exist"):
        run_prepare(tmp_path, data)
