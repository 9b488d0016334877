"""The Amazon 2014 formats: reviews, ratings, and metadata of Python literals that strangers wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
from oracles_sources import gz, run_prepare

from sources import amazon_2014
from sources.config import parse_dataset
from sources.prepare import prepare
from stages.errors import UserError
from stages.tables import ITEMS, read_table


def review(user: str, item: str, rating: float = 4.0, time: int = 1_400_000_000, **more: Any) -> str:
    return json.dumps({"reviewerID": user, "asin": item, "overall": rating, "unixReviewTime": time, **more})


def meta(item: str, **fields: Any) -> str:
    return repr({"asin": item, "title": f"Thing {item}", **fields})


def run(folder: Path, lines: list[str], metadata: list[str], **settings: Any) -> dict[str, Any]:
    kind = settings.get("interactions", "reviews")
    config = parse_dataset(
        "shop", {"source": "amazon-2014", "category": "Baby", **settings, "interactions": kind}, "shop"
    )
    names = {name: Path(path).name for name, path in config.prepare_inputs("shop").items()}
    inputs = {"reviews": folder / names["reviews"], "meta": gz(folder / names["meta"], metadata)}
    if kind == "ratings":
        inputs["reviews"].write_text("".join(line + "\n" for line in lines))
    else:
        gz(inputs["reviews"], lines)
    tables = {name: folder / f"{name}.parquet" for name in ("ratings", "items", "users")}
    return prepare(config.prepare_spec(), inputs, stats=folder / "stats.json", **tables)


def test_ratings_and_reviews_of_the_same_shop_are_the_same(tmp_path: Path):
    pairs = [(f"A{u}", f"B{i}", 1.0 + (u * i) % 5, 1_400_000_000 + 86_400 * i) for u in range(6) for i in range(7)]
    metadata = [meta(f"B{i}") for i in range(7)]
    by_reviews = run(tmp_path, [review(*row) for row in pairs], metadata)
    tables = [(tmp_path / f"{n}.parquet").read_bytes() for n in ("ratings", "items", "users")]
    by_ratings = run(tmp_path, [",".join(map(str, row)) for row in pairs], metadata, interactions="ratings")
    assert by_ratings == by_reviews
    assert tables == [(tmp_path / f"{n}.parquet").read_bytes() for n in ("ratings", "items", "users")]


def test_metadata_becomes_clean_text(tmp_path: Path):
    line = {
        "asin": "B1",
        "title": "Cr&egrave;me &amp; Sugar<br/>Set",
        "brand": 'O\'Neill "Co"',
        "categories": [["Baby", "Feeding"], ["Baby", "Gifts"]],
        "description": "<p>Soft.</p><script>alert(1)</script>\n  Warm\x00 &lt;3",
        "imUrl": "http://ecx.images-amazon.com/images/I/1.jpg",
        "related": {"also_bought": ["B2"]},
        "price": 3.5,
    }
    stats = run(tmp_path, [review("A", "B1")], [meta("B0"), repr(line)], kcore=0)
    (item,) = read_table(tmp_path / "items.parquet", ITEMS).to_pylist()
    assert item == {
        "item": 0,
        "item_id": "B1",
        "title": "Crème & Sugar Set",
        "brand": 'O\'Neill "Co"',
        "categories": ["Baby", "Feeding", "Gifts"],
        "description": "Soft. Warm <3",
        "image_urls": ["http://ecx.images-amazon.com/images/I/1.jpg"],
    }
    assert stats["items_with_image_reference"] == 1


@pytest.mark.parametrize(
    "bomb",
    [
        "__import__('os').system('touch pwned')",
        "[" * 100_000,
        "9" * 5000,
        "'cut off",
        "1 if True else 2",
    ],
)
def test_a_malformed_line_of_a_needed_item_is_an_error_and_is_never_run(tmp_path: Path, bomb: str, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = f"{{'asin': 'B1', 'title': {bomb}}}"
    with pytest.raises(UserError, match=r"meta_Baby\.json\.gz, line 2: metadata of item B1 is not a Python literal"):
        run(tmp_path, [review("A", "B1")], [meta("B0"), broken], kcore=0)
    assert not (tmp_path / "pwned").exists()
    # Nobody reviewed B1 here, so its line is not even parsed.
    run(tmp_path, [review("A", "B0")], [meta("B0"), broken, "no metadata at all"], kcore=0)
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["reading"] == {"metadata_lines_malformed": 1, "metadata_lines_repeated": 0}


def test_the_first_line_of_a_repeated_item_counts(tmp_path: Path):
    stats = run(tmp_path, [review("A", "B1")], [meta("B1", title="first"), meta("B1", title="second")], kcore=0)
    assert read_table(tmp_path / "items.parquet", ITEMS).column("title").to_pylist() == ["first"]
    assert stats["reading"]["metadata_lines_repeated"] == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", r"line 2: not a review in JSON"),
        ("[1]", r"line 2: not a review in JSON"),
        ('{"asin": "B1"}', r"line 2: the review has no 'reviewerID'"),
        (review("", "B1"), r"line 2: reviewerID '' or asin 'B1' is not an id"),
        (review("A", "B1", rating=float("nan")), r"line 2: overall = nan is not a finite number"),
        ('{"reviewerID": "A", "asin": "B1", "overall": null, "unixReviewTime": 1}', r"line 2: not a review in JSON"),
    ],
)
def test_malformed_reviews_name_file_and_line(tmp_path: Path, line: str, complaint: str):
    with pytest.raises(UserError, match=r"reviews_Baby_5\.json\.gz, " + complaint):
        run(tmp_path, [review("A", "B0"), line], [meta("B0")], kcore=0)


@pytest.mark.parametrize("line", ["A,B1,4.0", "A,B1,many,1400000000", "A,,4.0,1400000000", "A,B1,4.0,then"])
def test_malformed_ratings_name_file_and_line(tmp_path: Path, line: str):
    with pytest.raises(UserError, match=r"ratings_Baby\.csv, line 2"):
        run(tmp_path, ["A,B0,4.0,1400000000", line], [meta("B0")], interactions="ratings", kcore=0)


def test_an_empty_download_is_named(tmp_path: Path):
    for kind, name in (("ratings", "ratings_Baby.csv"), ("reviews", "reviews_Baby_5.json.gz")):
        with pytest.raises(UserError, match=f"{name}: is empty"):
            run(tmp_path, [], [meta("B0")], interactions=kind)


def test_other_counts_than_the_published_are_an_error(tmp_path: Path):
    lines = [review(f"A{u}", f"B{i}") for u in range(5) for i in range(5)]
    metadata = [meta(f"B{i}") for i in range(5)]
    assert run(tmp_path, lines, metadata, expected={"users": 5, "items": 5, "interactions": 25})["users"] == 5
    with pytest.raises(UserError, match=r"users 5 \(expected 19445\), items 5 \(expected 7050\)"):
        run(tmp_path, lines, metadata, expected={"users": 19_445, "items": 7_050})


def test_reviews_as_published(tmp_path: Path, real_data: Path):
    inputs = {"reviews": real_data / "amazon-2018" / "Magazine_Subscriptions_5.json.gz"}
    found = amazon_2014.Reader({"interactions": "reviews"}, inputs).interactions()
    assert len(found.item_ids) == 157 and len(found) > 2000
    assert found.rating is not None and set(found.rating.tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_the_files_source_and_this_one_share_no_entry(tmp_path: Path):
    # Both stand under the same contract, so a data set moved from one to the other keeps its numbers.
    (tmp_path / "r.csv").write_text(
        "user,item,rating,timestamp\n" + "".join(f"A{u},B{i},4,1\n" for u in range(5) for i in range(5))
    )
    theirs = run_prepare(
        tmp_path,
        {
            "source": "files",
            "interactions": {
                "path": str(tmp_path / "r.csv"),
                "columns": {"rating": "rating", "timestamp": "timestamp"},
            },
        },
    )
    ours = run(
        tmp_path,
        [review(f"A{u}", f"B{i}", time=1) for u in range(5) for i in range(5)],
        [meta(f"B{i}") for i in range(5)],
    )
    assert {k: ours[k] for k in ("users", "items", "interactions", "dropped")} == {
        k: theirs[k] for k in ("users", "items", "interactions", "dropped")
    }
