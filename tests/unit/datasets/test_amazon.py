"""The Amazon formats of three generations, as published and as strangers may have spoilt them."""

import json
from pathlib import Path
from typing import Any

import pytest
from amazon_shop import MANY, THINGS, items_of, literal, review, review_2023, run, tables
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.common.tables import USERS, read_table
from cm3.datasets.amazon.fields import price, rank
from cm3.datasets.reader import RATINGS


def test_ratings_and_reviews_of_the_same_shop_are_the_same(tmp_path: Path):
    pairs = [(f"A{u}", f"B{i}", 1.0 + (u * i) % 5, 1_400_000_000 + 86_400 * i) for u in range(6) for i in range(7)]
    comma = {"user, item": [",".join(map(str, row)) for row in pairs]}
    comma["item, user"] = [",".join(map(str, (i, u, *rest))) for u, i, *rest in pairs]
    reviews = [review(*row) for row in pairs]
    found = {}
    for name, source, kind, lines, meta in (
        ("2014 reviews", "amazon-2014", "reviews", reviews, literal),
        ("2014 ratings", "amazon-2014", "ratings", comma["user, item"], literal),
        ("2018 5core", "amazon-2018", "5core", reviews, lambda i: json.dumps({"asin": i, "title": f"Thing {i}"})),
        ("2018 reviews", "amazon-2018", "reviews", reviews, literal),
        ("2018 ratings", "amazon-2018", "ratings", comma["item, user"], literal),
    ):
        folder = tmp_path / name
        run(folder, source, {kind: lines, "meta": [meta(f"B{i}") for i in range(7)]}, interactions=kind)
        found[name] = tables(folder)
    assert all(table == found["2014 reviews"] for table in found.values())
    header = "user_id,parent_asin,rating,timestamp"
    run(
        tmp_path / "2023",
        "amazon-2023",
        {
            "5core": [header, *(f"{u},{i},{r},{t * 1000 + 999}" for u, i, r, t in pairs)],
            "meta": [json.dumps({"parent_asin": f"B{i}", "title": f"Thing B{i}"}) for i in range(7)],
        },
    )
    run(
        tmp_path / "2023 reviews",
        "amazon-2023",
        {
            "reviews": [review_2023(u, i, r, t * 1000) for u, i, r, t in pairs],
            "meta": [json.dumps({"parent_asin": f"B{i}", "title": f"Thing B{i}"}) for i in range(7)],
        },
        interactions="reviews",
    )
    assert tables(tmp_path / "2023") == tables(tmp_path / "2023 reviews") == found["2014 reviews"]


def test_a_published_split_is_kept(tmp_path: Path):
    rows = {"train": ["u,a", "u,b", "v,a"], "valid": ["u,c"], "test": ["u,d", "v,d"]}
    files: dict[str, list[str]] = {
        f"5core-timestamp.{part}": [
            "user_id,parent_asin,rating,timestamp,history",
            *(f"{row},5.0,{1_600_000_000_000 + n},a b c" for n, row in enumerate(lines)),
        ]
        for part, lines in rows.items()
    }
    files["meta"] = [json.dumps({"parent_asin": i}) for i in "abcd"]
    stats = run(tmp_path, "amazon-2023", files, interactions="5core-timestamp")
    assert (stats["kcore"], stats["has_published_split"]) == (0, True)
    found = read_table(tmp_path / "ratings.parquet", RATINGS).to_pylist()
    users = read_table(tmp_path / "users.parquet", USERS).column("user_id").to_pylist()
    labels = {f"{users[row['user']]},{'abcd'[row['item']]}": row["published"] for row in found}
    assert labels == {row: n for n, part in enumerate(rows.values()) for row in part}


def test_metadata_of_2014_becomes_clean_text(tmp_path: Path):
    line = {
        "asin": "B1",
        "title": "Cr&egrave;me &amp; Sugar<br/>Set",
        "brand": 'O\'Neill "Co"',
        "categories": [["Baby", "Feeding"], ["Baby", "Gifts"]],
        "description": "<p>Soft.</p><script>alert(1)</script>\n  Warm\x00 &lt;3",
        "imUrl": "http://ecx.images-amazon.com/images/I/1.jpg",
        "related": {"also_bought": ["B000000002", "B000000003"], "bought_together": []},
        "price": 3.5,
        "salesRank": {"Baby": 1234, "Toys": 5},
    }
    stats = run(
        tmp_path,
        "amazon-2014",
        {"reviews": [review("A", "B1")], "meta": [literal("B0"), repr(line)]},
        kcore=0,
        interactions="reviews",
    )
    assert items_of(tmp_path)["B1"] == {
        "item": 0,
        "item_id": "B1",
        "title": "Crème & Sugar Set",
        "brand": 'O\'Neill "Co"',
        "categories": ["Baby", "Feeding", "Gifts"],
        "description": "Soft. Warm <3",
        "features": [],
        "details": [],
        "price": 3.5,
        "sales_rank": 1234,
        "image_urls": ["http://ecx.images-amazon.com/images/I/1.jpg"],
    }
    assert stats["items_with_image_reference"] == 1
    assert stats["items_missing"]["features"] == 1 and stats["items_missing"]["price"] == 0


def test_metadata_of_2018_in_both_schemas(tmp_path: Path):
    host = "https://images-na.ssl-images-amazon.com/images/I"
    old = {
        "asin": "B1",
        "title": '<span class="a-size-medium a-color-secondary"',
        "brand": "by Acme",
        "category": ["Gifts", "Gifts &amp; Co"],
        "description": ["One.", "", "<b>Two.</b>", "One."],
        "feature": ["soft", "soft", "warm"],
        "price": "$1,250.00",
        "rank": [">#2,893,775 in Toys & Games (See Top 100 in Toys & Games)", ">#6 in Gift Cards"],
        "details": {"\n  Weight:  \n": "3 ounces", "Empty": "", "Number": 4},
        "image": [f"{host}/51a._SX38_SY50_CR,0,0,38,50_.jpg"],
    }
    new = {
        "asin": "B2",
        "title": "Card var aPageStart = (new Date()).getTime();",
        "price": ".a-box-inner{background-color:#fff}",
        "rank": "742 in Magazine Subscriptions (",
        "imageURL": [f"{host}/61b._SS40_.jpg", f"{host}/62c._SS40_.jpg"],
        "imageURLHighRes": [f"{host}/61b.jpg", f"{host}/62c.jpg"],
    }
    lines = [review("A", "B1"), review("A", "B2", style={"Size:": " S"}, image=["x"])]
    run(tmp_path, "amazon-2018", {"5core": lines, "meta": [json.dumps(old), json.dumps(new)]}, kcore=0)
    found = items_of(tmp_path)
    first, second = found["B1"], found["B2"]
    assert (first["title"], first["brand"], first["categories"]) == ("", "Acme", ["Gifts", "Gifts & Co"])
    assert (first["description"], first["features"]) == ("One. Two.", ["soft", "warm"])
    assert (first["price"], first["sales_rank"], first["details"]) == (
        1250,
        2_893_775,
        ["Weight: 3 ounces", "Number: 4"],
    )
    assert first["image_urls"] == [f"{host}/51a.jpg", f"{host}/51a._SX38_SY50_CR,0,0,38,50_.jpg"]
    assert (second["title"], second["price"], second["sales_rank"]) == ("Card", None, 742)
    assert second["image_urls"] == [f"{host}/{name}.jpg" for name in ("61b", "62c", "61b._SS40_", "62c._SS40_")]


def test_metadata_of_2023(tmp_path: Path):
    line = {
        "parent_asin": "B1",
        "main_category": "AMAZON FASHION",
        "title": "Bag",
        "store": None,
        "categories": [],
        "description": ["One", "Two"],
        "features": ["Canvas"],
        "price": "from 14.99",
        "details": json.dumps({"Brand": "Acme"}),
        "images": [
            {"variant": "PT01", "thumb": "http://h/t2.jpg", "large": "http://h/l2.jpg", "hi_res": None},
            {"variant": "MAIN", "thumb": "http://h/t1.jpg", "large": "http://h/l1.jpg", "hi_res": "http://h/h1.jpg"},
        ],
    }
    columns = {**line, "parent_asin": "B2", "images": {"large": ["http://h/l.jpg", None], "variant": ["MAIN", "PT01"]}}
    thumbs = {**line, "parent_asin": "B3", "images": [{"variant": "MAIN", "thumb": "http://h/t.jpg"}], "price": None}
    reviews = [review_2023("U", f"B{n}") for n in (1, 2, 3)]
    meta = [json.dumps(one) for one in (line, columns, thumbs)]
    run(tmp_path, "amazon-2023", {"reviews": reviews, "meta": meta}, interactions="reviews", kcore=0)
    found = items_of(tmp_path)
    assert (found["B1"]["brand"], found["B1"]["categories"]) == ("Acme", ["AMAZON FASHION"])
    assert (found["B1"]["description"], found["B1"]["features"]) == ("One Two", ["Canvas"])
    assert found["B1"]["price"] == pytest.approx(14.99) and found["B3"]["price"] is None
    assert found["B1"]["image_urls"] == ["http://h/l1.jpg", "http://h/h1.jpg", "http://h/l2.jpg"]
    assert found["B2"]["image_urls"] == ["http://h/l.jpg"] and found["B3"]["image_urls"] == ["http://h/t.jpg"]
    times = read_table(tmp_path / "ratings.parquet", RATINGS).column("timestamp").to_pylist()
    assert set(times) == {1_600_000_000}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$1,250.00", 1250),
        ("$9.99 - $19.99", 9.99),
        ("from 14.99", 14.99),
        (7, 7),
        (".a{b:1}", None),
        ("", None),
        (None, None),
        (True, None),
        (float("nan"), None),
        (10**400, None),
        ("9" * 400, None),
        (-1, None),
    ],
)
def test_prices(text: Any, value: float | None):
    assert price(text) == value


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("742 in Magazines (", 742),
        (["#1,019 in Toys", "#2 in Games"], 1019),
        ({"Baby": 5}, 5),
        ({}, None),
        ("none", None),
        (10**12, None),
        ("9" * 30 + " in Toys", None),
        ({"Baby": "x"}, None),
        (0, None),
        (["see", "12 in A"], 12),
    ],
)
def test_sales_ranks(text: Any, place: int | None):
    assert rank(text) == place


@pytest.mark.parametrize(
    ("kind", "file"), [("ratings", r"ratings_Baby\.csv"), ("reviews", r"reviews_Baby_5\.json\.gz")]
)
def test_an_empty_file_is_named(tmp_path: Path, kind: str, file: str):
    with pytest.raises(UserError, match=f"{file}: is empty"):
        run(tmp_path, "amazon-2014", {kind: [], "meta": THINGS}, interactions=kind)


def test_other_counts_than_the_published_are_an_error(tmp_path: Path):
    files = {"reviews": MANY, "meta": THINGS}
    right = {"users": 20, "items": 20, "interactions": 400}
    assert run(tmp_path, "amazon-2014", files, interactions="reviews", expected=right)["users"] == 20
    with pytest.raises(UserError, match=r"users 20 \(expected 19445\), items 20 \(expected 7050\)"):
        run(tmp_path, "amazon-2014", files, interactions="reviews", expected={"users": 19_445, "items": 7_050})


def test_items_without_metadata_count_as_published(tmp_path: Path):
    stats = run(tmp_path, "amazon-2014", {"reviews": MANY, "meta": THINGS[:15]}, interactions="reviews")
    assert (stats["items"], stats["unknown_items"]["items"], stats["items_missing"]["any text"]) == (20, 5, 5)
    dropped = run(
        tmp_path, "amazon-2014", {"reviews": MANY, "meta": THINGS[:15]}, interactions="reviews", unknown_items="drop"
    )
    assert (dropped["items"], dropped["dropped"]["unknown_items"]) == (15, 100)


@pytest.mark.parametrize(
    ("category", "reviews", "items", "unknown", "known_or_bought", "with_image"),
    [("Gift_Cards", 2972, 148, 0, 1547, 116), ("Magazine_Subscriptions", 2375, 157, 6, 2326, 130)],
)
def test_the_files_of_2018_as_published(
    tmp_path: Path,
    real_data: Path,
    category: str,
    reviews: int,
    items: int,
    unknown: int,
    known_or_bought: int,
    with_image: int,
):
    data = {"source": "amazon-2018", "category": category, "folder": str(real_data / "amazon-2018"), "kcore": 0}
    stats = run_prepare(tmp_path, data)
    assert (stats["raw"]["interactions"], stats["items"]) == (reviews, items)
    assert (stats["unknown_items"]["items"], stats["reading"]["metadata lines unreadable"]) == (unknown, 0)
    rows = items_of(tmp_path).values()
    assert not any(mark in row["title"] for row in rows for mark in ("<", "class=", "getTime"))
    assert stats["items_with_text"] == items - unknown
    assert stats["items_with_image_reference"] == with_image
    assert run_prepare(tmp_path / "all", {**data, "cold_items": "keep"})["items"] == known_or_bought


def test_the_files_source_and_this_one_share_one_contract(tmp_path: Path):
    # So a data set moved from one to the other keeps its numbers.
    lines = [f"A{u},B{i},4,1" for u in range(5) for i in range(5)]
    (tmp_path / "r.csv").write_text("\n".join(["user,item,rating,timestamp", *lines]) + "\n")
    columns = {"rating": "rating", "timestamp": "timestamp"}
    data = {"source": "files", "interactions": {"path": str(tmp_path / "r.csv"), "columns": columns}}
    theirs = run_prepare(tmp_path, data)
    ours = run(tmp_path / "b", "amazon-2014", {"ratings": lines, "meta": THINGS[:5]})
    for name in ("users", "items", "interactions", "dropped"):
        assert ours[name] == theirs[name]
