"""The reviews stage: the text of each interaction that is kept, for Amazon's generations and for own tables."""

import json
from pathlib import Path
from typing import Any

import pytest
from amazon_shop import CATEGORY, literal, pack, review, review_2023
from golden import check_golden
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.common.keys import key_of
from cm3.common.stages import STAGES
from cm3.common.tables import ITEMS, REVIEWS, USERS, read_table
from cm3.datasets.registry import parse_dataset
from cm3.datasets.reviews import collect_reviews

PAIRS = [(user, (user + step) % 4) for user in range(4) for step in range(3)]


def collect(folder: Path, data: dict[str, Any]) -> dict[tuple[str, str], str]:
    """Prepare a data set and collect its reviews; return the text by (user id, item id)."""
    run_prepare(folder, data)
    spec = parse_dataset("mine", data, "datasets.mine")
    inputs = {name: Path(path) for name, path in spec.review_inputs("mine").items()}
    tables = {name: folder / f"{name}.parquet" for name in ("ratings", "users", "items")}
    collect_reviews(spec.reviews_spec(), inputs, tables, folder / "reviews.parquet")
    users = read_table(folder / "users.parquet", USERS).column("user_id").to_pylist()
    items = read_table(folder / "items.parquet", ITEMS).column("item_id").to_pylist()
    rows = read_table(folder / "reviews.parquet", REVIEWS).to_pylist()
    assert [(row["user"], row["item"]) for row in rows] == sorted({(row["user"], row["item"]) for row in rows})
    return {(users[row["user"]], items[row["item"]]): row["text"] for row in rows}


def published(folder: Path, source: str, files: dict[str, list[Any]], **settings: Any) -> dict[str, Any]:
    """Write the files of a category by kind; return its config."""
    data = {
        "source": source,
        "category": CATEGORY[source],
        "folder": str(folder / "published"),
        "kcore": 2,
        "malformed": 0.5,
        **settings,
    }
    paths = parse_dataset("shop", data, "datasets.shop").files()
    for kind, lines in files.items():
        pack(folder / "published" / paths[kind], lines)
    return data


@pytest.mark.parametrize("source", ["amazon-2014", "amazon-2018"])
@pytest.mark.parametrize("interactions", ["ratings", "reviews"])
def test_headlines_and_bodies_of_2014_and_2018(tmp_path: Path, source: str, interactions: str):
    times = {pair: 1_400_000_000 + number for number, pair in enumerate(PAIRS)}
    texts = {"summary": "Good &amp; cheap", "reviewText": "<b>Soft</b>\n and warm"}
    lines = [review(f"A{u}", f"B{i}", time=times[u, i], **texts) for u, i in PAIRS[:-2]]
    lines += [review("A3", "B1", time=times[3, 0]), "no json", review("stranger", "B1", reviewText="of another shop")]
    columns = ("A{u}", "B{i}") if source == "amazon-2014" else ("B{i}", "A{u}")
    ratings = [",".join(columns).format(u=u, i=i) + f",4.0,{times[u, i]}" for u, i in PAIRS]
    files = {"ratings": ratings, "reviews": lines, "meta": [json.dumps({"asin": f"B{i}"}) for i in range(4)]}
    found = collect(tmp_path, published(tmp_path, source, files, interactions=interactions))
    expected = {(f"A{u}", f"B{i}"): "Good & cheap\nSoft and warm" for u, i in PAIRS[:-2]}
    assert found == {pair: text for pair, text in expected.items() if pair in found} and len(found) >= 9


def test_texts_of_2023_go_with_its_published_split(tmp_path: Path):
    header = "user_id,parent_asin,rating,timestamp"
    rows = [f"A{u},B{i},4.0,{1_600_000_000_000 + n}" for n, (u, i) in enumerate(PAIRS)]
    texts = [json.loads(review_2023(f"A{u}", f"B{i}")) | {"title": "T", "text": f"{u}{i}"} for u, i in PAIRS]
    files = {
        **{f"5core-timestamp.{part}": [header, *rows[n::3]] for n, part in enumerate(("train", "valid", "test"))},
        "reviews": [json.dumps(row) for row in texts],
        "meta": [json.dumps({"parent_asin": f"B{i}"}) for i in range(4)],
    }
    found = collect(tmp_path, published(tmp_path, "amazon-2023", files, interactions="5core-timestamp"))
    assert found == {(f"A{u}", f"B{i}"): f"T\n{u}{i}" for u, i in PAIRS}


def test_of_several_reviews_the_one_that_is_kept_as_interaction(tmp_path: Path):
    lines = [review(f"A{u}", f"B{i}", 3.0, 1_400_000_100, reviewText="first") for u, i in PAIRS]
    lines += [review("A0", "B0", 5.0, 1_400_000_200, reviewText="later")]
    lines += [review("A0", "B0", 5.0, 1_400_000_100, reviewText="better"), review("A0", "B0", 1.0, 1_300_000_000)]
    lines += [review("A0", "B1", 3.0, 1_400_000_100, reviewText="equal")]
    files = {"reviews": lines, "meta": [literal(f"B{i}") for i in range(4)]}
    found = collect(tmp_path, published(tmp_path, "amazon-2014", files, interactions="reviews"))
    assert [found["A0", f"B{i}"] for i in range(3)] == ["better", "equal", "first"]


def own(folder: Path, lines: list[str], **columns: str) -> dict[str, Any]:
    (folder / "pairs.csv").write_text("\n".join(["user,item,when,words", *lines]) + "\n")
    interactions = {"path": str(folder / "pairs.csv"), "columns": {"timestamp": "when", **columns}}
    return {"source": "files", "kcore": 0, "interactions": interactions}


def test_a_column_of_own_reviews(tmp_path: Path):
    lines = ["u1,i1,2020-01-02,fine", 'u1,i2,2020-01-02,"two, ""words"""', "u2,i1,2020-01-03,", "u1,i1,2020-01-01,old"]
    data = own(tmp_path, lines, review="words")
    assert collect(tmp_path, data) == {("u1", "i1"): "old", ("u1", "i2"): 'two, "words"'}
    check_golden("reviews", STAGES["reviews"].version, read_table(tmp_path / "reviews.parquet", REVIEWS).to_pylist())


def test_reviews_change_no_key_of_the_tables(tmp_path: Path):
    with_reviews = parse_dataset("mine", own(tmp_path, [], review="words"), "datasets.mine")
    without = parse_dataset("mine", own(tmp_path, []), "datasets.mine")
    assert key_of(with_reviews.prepare_spec()) == key_of(without.prepare_spec())
    assert "review" not in without.prepare_spec()["interactions"]["columns"]
    assert without.review_inputs("mine") == {} and with_reviews.review_inputs("mine")


def test_what_has_no_texts_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"pairs\.csv: none of 1 interactions has the text of a review"):
        collect(tmp_path, own(tmp_path, ["u1,i1,2020-01-02,"], review="words"))
    with pytest.raises(UserError, match=r"pairs\.csv: has no column 'text'"):
        collect(tmp_path, own(tmp_path, ["u1,i1,2020-01-02,a"], review="text"))
