"""The prepare stage: duplicates, unknown and cold items, k-core, order of rows."""

import random
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from oracles_sources import dataset, grid, jsonl, run_prepare

from cm3.common.errors import UserError
from cm3.common.files import read_json
from cm3.common.tables import ITEMS, USERS, read_table
from cm3.datasets.interactions_db import InteractionsDatabase
from cm3.datasets.reader import RATINGS, ROWS


def rows(path: Path, schema: pa.Schema) -> list[dict]:
    return read_table(path, schema).to_pylist()


def test_tables_hold_what_the_files_say(tmp_path: Path):
    items = [
        {
            "item_id": "b",
            "title": "Tea &amp; <b>Cups</b>",
            "brand": "Acme",
            "categories": ["Home", "Tea", "Home"],
            "description": ["One.", " Two\n\tlines. "],
            "image": "images/b.jpg",
        },
        {"item_id": "a", "title": "Size < 10 cm and > 5 cm", "brand": None, "categories": [], "description": ""},
    ]
    text = "user,item,rating,timestamp\nzoe,b,4.5,1600000100\nzoe,a,3,1600000000\nann,b,1,1600000050\n"
    stats = dataset(tmp_path, text, jsonl(items), kcore=0)()
    assert rows(tmp_path / "users.parquet", USERS) == [{"user": 0, "user_id": "ann"}, {"user": 1, "user_id": "zoe"}]
    nothing = {"features": [], "details": [], "price": None, "sales_rank": None}
    assert rows(tmp_path / "items.parquet", ITEMS) == [
        {
            "item": 0,
            "item_id": "a",
            "title": "Size < 10 cm and > 5 cm",
            "brand": "",
            "categories": [],
            "description": "",
            **nothing,
            "image_urls": [],
        },
        {
            "item": 1,
            "item_id": "b",
            "title": "Tea & Cups",
            "brand": "Acme",
            "categories": ["Home", "Tea"],
            "description": "One. Two lines.",
            **nothing,
            "image_urls": ["images/b.jpg"],
        },
    ]
    assert rows(tmp_path / "ratings.parquet", RATINGS) == [
        {"user": 0, "item": 1, "rating": 1.0, "timestamp": 1_600_000_050, "published": None},
        {"user": 1, "item": 0, "rating": 3.0, "timestamp": 1_600_000_000, "published": None},
        {"user": 1, "item": 1, "rating": 4.5, "timestamp": 1_600_000_100, "published": None},
    ]
    assert (stats["users"], stats["items"], stats["interactions"], stats["density"]) == (2, 2, 3, 0.75)
    assert (stats["items_with_description"], stats["items_with_image_reference"]) == (1, 1)
    assert read_json(tmp_path / "stats.json") == stats


def test_the_order_of_lines_does_not_matter(tmp_path: Path):
    header, *lines = grid(7, 6).strip().split("\n")
    lines += ["u0,i0,1,1600000000", "u0,i0,5,1600000000", "u1,i1,2,7"]  # repeats in conflict
    outputs = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        random.Random(seed).shuffle(lines)
        dataset(folder, "\n".join([header, *lines]))()
        outputs.append([(folder / f"{n}.parquet").read_bytes() for n in ("ratings", "items", "users")])
    assert outputs[0] == outputs[1]


def test_repeats_go_before_the_k_core_and_the_first_in_time_rated_best_stays(tmp_path: Path):
    text = (
        "user,item,rating,timestamp\nu,i,1,30\nu,i,2,10\nu,i,3,10\nu,j,4,5\n"
        "v,i,5,1\nv,j,5,2\nw,i,5,1\nw,i,5,2\nw,i,5,3\n"
    )
    stats = dataset(tmp_path, text, kcore=2)()
    # Without its repeats w has one interaction left and leaves the 2-core.
    assert stats["dropped"] == {"repeated_rows": 1, "repeated_pairs": 3, "unknown_items": 0, "kcore": 1}
    assert stats["before_kcore"] == {"users": 3, "items": 2, "interactions": 5}
    kept = rows(tmp_path / "ratings.parquet", RATINGS)
    assert [(r["user"], r["item"], r["rating"], r["timestamp"]) for r in kept if r["user"] == 0] == [
        (0, 1, 4.0, 5),
        (0, 0, 3.0, 10),
    ]


def test_rating_and_time_may_be_absent(tmp_path: Path):
    stats = dataset(tmp_path, "user,item\n" + "".join(f"u{u},i{i}\n" for u in range(5) for i in range(5)))()
    assert not stats["has_ratings"] and not stats["has_timestamps"]
    table = read_table(tmp_path / "ratings.parquet", RATINGS)
    assert table.column("rating").null_count == table.column("timestamp").null_count == 25


def test_unknown_items_follow_the_policy(tmp_path: Path):
    table = jsonl([{"item_id": f"i{i}", "title": f"Thing {i}"} for i in range(6)])
    text = grid(8, 30)
    dropped = dataset(tmp_path, text, table)()
    assert (dropped["items"], dropped["interactions"], dropped["dropped"]["unknown_items"]) == (6, 48, 192)
    assert dropped["unknown_items"]["items"] == 24 and dropped["unknown_items"]["interactions"] == 192
    assert dropped["unknown_items"]["first"] == sorted(f"i{i}" for i in range(6, 30))[:20]
    kept = dataset(tmp_path, text, table, unknown_items="keep")()
    assert (kept["items"], kept["items_with_text"], kept["dropped"]["unknown_items"]) == (30, 6, 0)
    by_id = {row["item_id"]: row["title"] for row in rows(tmp_path / "items.parquet", ITEMS)}
    assert by_id["i3"] == "Thing 3" and by_id["i29"] == ""
    with pytest.raises(
        UserError, match=r"24 items with 192 interactions are not in the item table: i10, i11, .*unknown_items: drop"
    ):
        dataset(tmp_path, text, table, unknown_items="error")()


def test_an_item_table_with_other_ids_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="none of the 40 interactions has an item"):
        dataset(tmp_path, grid(8, 5), jsonl([{"item_id": "B0001", "title": "T"}]))()


def test_cold_items_can_be_kept(tmp_path: Path):
    table = jsonl([{"item_id": f"i{i}", "title": f"Thing {i}"} for i in range(9)])
    assert dataset(tmp_path, grid(6, 5), table)()["items"] == 5
    stats = dataset(tmp_path, grid(6, 5), table, cold_items="keep")()
    assert (stats["items"], stats["items_without_interaction"], stats["items_with_title"]) == (9, 4, 9)
    assert stats["interactions_per_item"]["min"] == 6
    assert len(np.unique(read_table(tmp_path / "ratings.parquet", RATINGS).column("item").to_numpy())) == 5


def test_cold_items_are_those_of_the_item_table(tmp_path: Path):
    table = jsonl([{"item_id": f"i{i}", "title": f"Thing {i}"} for i in (0, 1, 9)])
    # "rare" is in neither: the item table lacks it, and the k-core drops it.
    text = grid(6, 5) + "u0,rare,5,1600000000\n"
    stats = dataset(tmp_path, text, table, cold_items="keep", unknown_items="keep")()
    assert (stats["items"], stats["items_without_interaction"]) == (6, 1)
    found = rows(tmp_path / "items.parquet", ITEMS)
    assert [row["item_id"] for row in found] == ["i0", "i1", "i2", "i3", "i4", "i9"]


def test_a_k_core_that_leaves_nothing_names_one_that_does(tmp_path: Path):
    with pytest.raises(UserError, match=r"the 5-core of 21 interactions \(3 users, 7 items\) is empty; set kcore to 3"):
        dataset(tmp_path, grid(3, 7))()


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"absent\.csv: no such file"):
        run_prepare(tmp_path, {"source": "files", "interactions": {"path": str(tmp_path / "absent.csv")}})


def test_the_fashion_shop(tmp_path: Path, hm: Path):
    data = {
        "source": "files",
        "interactions": {
            "path": str(hm / "interactions.tsv.gz"),
            "columns": {"user": "user_id", "item": "item_id", "timestamp": "date"},
        },
        "items": {
            "path": str(hm / "items.jsonl"),
            "columns": {
                "title": ["title"],
                "categories": ["type", "group", "colour", "department", "section"],
                "description": "description",
                "image": "image",
            },
        },
        "images": {"folder": str(hm)},
    }
    stats = run_prepare(tmp_path, data)
    assert (stats["users"], stats["items"], stats["interactions"]) == (9316, 2407, 66542)
    assert stats["items_with_text"] == stats["items_with_image_reference"] == 2407
    first = rows(tmp_path / "items.parquet", ITEMS)[0]
    assert first["item_id"] == "0111565" and first["categories"][:2] == ["Underwear Tights", "Socks & Tights"]


def test_a_full_disk_in_the_database_is_one_line(tmp_path: Path):
    ids = [f"user {n} {n * 7919 % 100003}" for n in range(250_000)]
    rows_ = {f.name: ids if pa.types.is_string(f.type) else pa.nulls(len(ids), f.type) for f in ROWS}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(UserError, match="no space left on the disk"), InteractionsDatabase(tmp_path) as base:
            base.add(pa.table(rows_, schema=ROWS))
            base.encode()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
