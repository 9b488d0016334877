"""What strangers may have done to the Amazon files: nothing is run, nothing stops, every line is accounted for."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from amazon_shop import MANY, TABLES, THINGS, items_of, pack, review, review_2023, run, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.common.errors import UserError
from cm3.common.tables import ITEMS, USERS, read_table
from cm3.datasets.amazon.metadata import Metadata
from cm3.datasets.reader import Item

BOMBS = {
    "code": "{'asin': 'B1', 'title': __import__('os').system('touch pwned')}",
    "nesting": "{'asin': 'B1', 'title': " + "[" * 5000 + "]" * 5000 + "}",
    "unbalanced": "{'asin': 'B1', 'title': " + "[" * 100_000,
    "digits": "{'asin': 'B1', 'title': 'x', 'price': " + "9" * 1_000_000 + "}",
    "cut": "{'asin': 'B1', 'title': 'cut off}",
    "choice": "{'asin': 'B1', 'title': 1 if True else 2}",
    "json nesting": '{"asin": "B1", "title": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}",
    "json digits": '{"asin": "B1", "title": "x", "price": ' + "9" * 1_000_000 + "}",
    "set": "{'asin': 'B1', 'title': {'x'}, 'brand': b'bytes', 'price': 1j, 'imUrl': {1: 2}}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_line_costs_a_text_and_is_never_run(tmp_path: Path, bomb: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    stats = run(
        tmp_path,
        "amazon-2014",
        {"reviews": MANY, "meta": [*THINGS[:1], *THINGS[2:], BOMBS[bomb]]},
        interactions="reviews",
    )
    assert stats["items"] == 20
    title = items_of(tmp_path)["B1"]["title"]
    assert title == ("x" if "digits" in bomb and not stats["reading"]["metadata lines unreadable"] else "")
    assert stats["reading"]["metadata lines unreadable"] == (bomb != "set") - (title == "x")
    assert not (tmp_path / "pwned").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"published", "stats.json", *(f"{t}.parquet" for t in TABLES)}


def test_lines_that_name_no_item_are_counted_and_too_many_are_an_error(tmp_path: Path):
    meta = [*THINGS * 10, "no metadata at all"]
    stats = run(tmp_path, "amazon-2014", {"reviews": MANY, "meta": meta}, interactions="reviews")
    assert stats["reading"]["metadata lines left out: no asin"] == 1
    with pytest.raises(UserError, match=r"meta_Baby\.json\.gz: 9 of 29 lines are malformed.*line 21: no asin"):
        run(tmp_path, "amazon-2014", {"reviews": MANY, "meta": [*THINGS, *["<html>"] * 9]}, interactions="reviews")


def test_an_id_within_a_text_is_not_the_lines_id(tmp_path: Path):
    lines = [
        "{'title': \"what is 'asin': 'B2' about\", 'asin': 'B1'}",
        '{"title": "\\"asin\\": \\"B3\\"", "asin":"B2"}',
        "{ 'asin'  :  'B3', 'title': 'spaced' }",
        '{"asin": "B\\u0034", "title": "escaped"}',
    ]
    reviews = [review("A", f"B{n}") for n in (1, 2, 3, 4)]
    run(
        tmp_path,
        "amazon-2014",
        {"reviews": reviews, "meta": lines},
        interactions="reviews",
        kcore=0,
        unknown_items="error",
    )
    titles = {item_id: row["title"] for item_id, row in items_of(tmp_path).items()}
    assert titles == {"B1": "what is 'asin': 'B2' about", "B2": '"asin": "B3"', "B3": "spaced", "B4": "escaped"}


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text("'\":,{ asinB\\2", max_size=24), max_size=3), st.sampled_from(["B1", "B2"]))
def test_whatever_texts_say_the_id_is_the_records(texts: list[str], item_id: str):
    mentioned = ["'asin': 'B2'", '"asin": "B2"', '"asin":"B2"']
    record = {**dict(zip("xyz", texts, strict=False)), "asin": item_id, **dict(zip("abc", mentioned, strict=True))}
    metadata = Metadata(Path(), "asin", lambda _: Item(), 0.0)
    for line in (json.dumps(record), json.dumps(record, separators=(",", ":")), repr(record), f" {record}"):
        assert metadata.item_id(line.encode()) == item_id
        assert metadata.item_id(line.encode(), {item_id.encode()}) == item_id


@pytest.mark.parametrize("deep", (900, 950, 1000, 1020))
def test_lists_nested_as_deep_as_json_may_be_cost_a_text_at_most(tmp_path: Path, deep: int):
    lines = [*THINGS[2:], THINGS[0], '{"asin": "B1", "title": ' + "[" * deep + '"Deep"' + "]" * deep + "}"]
    run(tmp_path, "amazon-2018", {"5core": MANY, "meta": lines})
    assert items_of(tmp_path)["B1"]["title"] in ("Deep", "")


def test_half_a_character_costs_a_letter(tmp_path: Path):
    half = "\ud83d"
    fields = {
        "title": f"Mug {half}",
        "brand": f"{half}Acme",
        "categories": [["Home", half]],
        "description": half + half,
    }
    more = {
        "details": {f"Colour{half}": f"red{half}", half: "x", "Weight": 3},
        "image": [f"http://h/{half}.jpg", "http://h/a.jpg"],
    }
    hex_digits = "{'asin': 'B3', 'title': 'Hex', 'details': {'Weight': 0x" + "f" * 9000 + "}}"
    for dump in (json.dumps, repr):
        meta = [dump({"asin": "B1", **fields, **more}), dump({"asin": f"B{half}"}), THINGS[2], hex_digits]
        stats = run(
            tmp_path,
            "amazon-2018",
            {"5core": [review("A", f"B{n}") for n in (1, 2, 3)], "meta": meta},
            kcore=0,
            malformed=0.5,
        )
        item = items_of(tmp_path)["B1"]
        assert (item["title"], item["brand"], item["categories"], item["description"]) == ("Mug", "Acme", ["Home"], "")
        assert (item["details"], item["image_urls"]) == (["Colour: red", "Weight: 3"], ["http://h/a.jpg"])
        assert stats["reading"]["metadata lines left out: no asin"] == 1
        assert (items_of(tmp_path)["B3"]["title"], items_of(tmp_path)["B3"]["details"]) == ("Hex", [])
    meta = [dump({"asin": "B1", "imUrl": f"http://h/{half}.jpg"}) for dump in (json.dumps, repr)]
    run(tmp_path, "amazon-2014", {"reviews": [review("A", "B1")], "meta": meta}, interactions="reviews", kcore=0)
    assert items_of(tmp_path)["B1"]["image_urls"] == []
    images = {"images": [{"large": f"http://h/{half}.jpg", "thumb": "http://h/a.jpg"}]}
    meta = [json.dumps({"parent_asin": "B1", **images})]
    run(tmp_path, "amazon-2023", {"reviews": [review_2023("A", "B1")], "meta": meta}, interactions="reviews", kcore=0)
    assert items_of(tmp_path)["B1"]["image_urls"] == ["http://h/a.jpg"]


def test_repeated_metadata_is_merged_first_come_first_served(tmp_path: Path):
    lines = [
        {"asin": "B1", "title": "", "brand": "first", "price": "$3"},
        {"asin": "B1", "title": "title", "brand": "second", "description": ["text"], "image": []},
        {"asin": "B1", "title": "other", "image": ["http://h/a.jpg"], "price": "$4"},
    ]
    stats = run(
        tmp_path, "amazon-2018", {"5core": [review("A", "B1")], "meta": [json.dumps(x) for x in lines]}, kcore=0
    )
    item = items_of(tmp_path)["B1"]
    assert (item["title"], item["brand"], item["price"], item["description"]) == ("title", "first", 3, "text")
    assert item["image_urls"] == ["http://h/a.jpg"]
    assert stats["reading"]["metadata lines repeated"] == 2
    assert stats["reading"]["metadata lines in conflict with an earlier one"] == 2


SPOILT = {
    "not JSON": ["{", "<html>", "9" * 100_000 + "x", "[" * 5000],
    "not a JSON object": ["[1]", "7"],
    "reviewerID is no id": ['{"asin": "B1"}', review("", "B1"), review(7, "B1"), review("\ud800", "B1")],
    "asin is no id": [review("A", None), review("A", ["B1"])],
    "overall is no finite number": [
        review("A", "B1", rating=r) for r in (float("nan"), float("inf"), None, "good", True, 1e300, 10**300)
    ],
    "unixReviewTime is no time": [review("A", "B1", time=t) for t in (0, -5, None, "then", 10**30, "nan", 10**20)],
}


@pytest.mark.parametrize("reason", SPOILT)
def test_spoilt_reviews_are_left_out_and_counted(tmp_path: Path, reason: str):
    spoilt = SPOILT[reason]
    run(tmp_path / "clean", "amazon-2014", {"reviews": MANY, "meta": THINGS}, interactions="reviews")
    lines = [*MANY[:150], *spoilt, "", "   ", *MANY[150:]]
    stats = run(
        tmp_path / "spoilt", "amazon-2014", {"reviews": lines, "meta": THINGS}, interactions="reviews", malformed=0.05
    )
    assert stats["reading"][f"left out: {reason}"] == len(spoilt)
    assert tables(tmp_path / "spoilt") == tables(tmp_path / "clean")
    with pytest.raises(
        UserError, match=rf"reviews_Baby_5\.json\.gz: {len(spoilt)} of \d+ lines are malformed.*line 151: {reason}"
    ):
        run(tmp_path / "x", "amazon-2014", {"reviews": lines, "meta": THINGS}, interactions="reviews", malformed=0.0)
    assert not list((tmp_path / "x").glob("*.parquet"))


@pytest.mark.parametrize("time", [2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63)])
def test_a_time_that_no_column_holds_is_left_out_and_counted(tmp_path: Path, time: int):
    lines = [*MANY[:150], review("A", "B1", time=time), *MANY[150:]]
    stats = run(tmp_path, "amazon-2014", {"reviews": lines, "meta": THINGS}, interactions="reviews")
    assert stats["reading"]["left out: unixReviewTime is no time"] == 1
    assert stats["raw"]["interactions"] == len(MANY)


def test_spoilt_ratings_are_left_out_and_counted(tmp_path: Path):
    good = [f"A{u},B{i},4.0,{1_400_000_000 + i}" for u in range(20) for i in range(20)]
    spoilt = [
        "A,B1,4.0",
        "A,B1,many,1400000000",
        ",B1,4.0,1400000000",
        "A,,4,1400000000",
        "A,B1,4.0,then",
        "A,B1,nan,1400000000",
        "A,B1,4.0,0",
        "A,B1,4,1400000000,more",
        'A"x,"B1,4',
    ]
    run(tmp_path / "clean", "amazon-2014", {"ratings": good, "meta": THINGS})
    lines = [*good[:100], *spoilt, *good[100:]]
    stats = run(tmp_path / "spoilt", "amazon-2014", {"ratings": lines, "meta": THINGS}, malformed=0.05)
    left_out = {k: v for k, v in stats["reading"].items() if k.startswith("left out")}
    assert left_out == {
        "left out: 3 values, not 4": 2,
        "left out: 5 values, not 4": 1,
        "left out: an id is empty": 2,
        "left out: rating is no finite number": 2,
        "left out: timestamp is no time": 2,
    }
    assert tables(tmp_path / "spoilt") == tables(tmp_path / "clean")
    with pytest.raises(UserError, match=r"ratings_Baby\.csv: 9 of 409 lines are malformed.*line 101"):
        run(tmp_path / "x", "amazon-2014", {"ratings": lines, "meta": THINGS})


def test_bytes_that_are_no_utf8_cost_a_letter(tmp_path: Path):
    lines: list[Any] = [*MANY, b'{"reviewerID": "caf\xe9", "asin": "B1", "overall": 5, "unixReviewTime": 1400000000}']
    meta: list[Any] = [*THINGS[2:], THINGS[0], b"{'asin': 'B1', 'title': 'Caf\xe9'}"]
    run(tmp_path / "a", "amazon-2014", {"reviews": lines, "meta": meta}, interactions="reviews", kcore=0)
    assert items_of(tmp_path / "a")["B1"]["title"] == "Caf\ufffd"
    users = read_table(tmp_path / "a" / "users.parquet", USERS).column("user_id").to_pylist()
    assert "caf\ufffd" in users and len(users) == 21
    ratings: list[Any] = ["A,B1,4,1400000000", b"caf\xe9,B1,4,1400000000"]
    run(tmp_path / "b", "amazon-2014", {"ratings": ratings, "meta": meta}, kcore=0)
    assert read_table(tmp_path / "b" / "users.parquet", USERS).column("user_id").to_pylist() == ["A", "caf\ufffd"]


def test_hostile_ids_are_only_texts(tmp_path: Path):
    hostile = ["../../x", "x" * 300, "nul\0byte", "ünï ✓", "a,b", "'; drop table raw; --", "/etc/passwd", " "]
    reviews = [review(user, item) for user in hostile for item in hostile]
    meta = [json.dumps({"asin": item, "title": f"Thing {n}"}) for n, item in enumerate(hostile)]
    stats = run(tmp_path, "amazon-2018", {"5core": reviews, "meta": meta})
    assert (stats["users"], stats["items"], stats["interactions"]) == (8, 8, 64)
    assert read_table(tmp_path / "items.parquet", ITEMS).column("item_id").to_pylist() == sorted(hostile)
    assert {n: items_of(tmp_path)[item]["title"] for n, item in enumerate(hostile)} == {
        n: f"Thing {n}" for n in range(8)
    }
    assert {path.name for path in tmp_path.iterdir()} == {"published", "stats.json", *(f"{t}.parquet" for t in TABLES)}


@pytest.mark.parametrize("cut", [1, 30, 500])
def test_a_truncated_or_corrupt_gzip_is_an_error(tmp_path: Path, cut: int):
    run(tmp_path, "amazon-2014", {"reviews": MANY * 20, "meta": THINGS}, interactions="reviews")
    whole = (tmp_path / "published/categoryFiles/reviews_Baby_5.json.gz").read_bytes()
    for data in (whole[:-cut], whole[: len(whole) // 2] + b"\0" * 9 + whole[len(whole) // 2 + 9 :]):
        (tmp_path / "published/categoryFiles/reviews_Baby_5.json.gz").write_bytes(data)
        with pytest.raises(UserError, match=r"reviews_Baby_5\.json\.gz.*(damaged gzip|malformed)"):
            run(tmp_path, "amazon-2014", {}, interactions="reviews")


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cm3.datasets.files.lines.UNPACKED_FREE", 1 << 20)
    bomb = tmp_path / "published/categoryFiles/reviews_Baby_5.json.gz"
    pack(tmp_path / "published/categoryFiles/meta_Baby.json.gz", list(THINGS))
    for data in (b"\0" * (1 << 26), b"{}\n" * (1 << 24)):
        bomb.write_bytes(gzip.compress(data))
        with pytest.raises(UserError, match=r"times its size|10000 of 10000 lines are malformed"):
            run(tmp_path, "amazon-2014", {}, interactions="reviews")
    monkeypatch.setattr("cm3.datasets.files.lines.LONGEST_LINE", 1 << 20)
    monkeypatch.setattr("cm3.datasets.files.lines.UNPACKED_FREE", 1 << 30)
    bomb.write_bytes(gzip.compress(b'{"a": "' + b"x" * (1 << 25)))
    with pytest.raises(UserError, match="line 1: is longer than"):
        run(tmp_path, "amazon-2014", {}, interactions="reviews")


@pytest.mark.parametrize("seed", range(6))
def test_no_spoilt_byte_stops_a_reader(tmp_path: Path, seed: int):
    # Whatever happens to a few bytes of a few lines: the rest is read, and every line is accounted for.
    rng = random.Random(seed)
    host = {"amazon-2014": "reviews", "amazon-2018": "5core", "amazon-2023": "reviews"}
    for source, kind in host.items():
        if source == "amazon-2023":
            lines = [review_2023(f"A{u}", f"B{i}") for u in range(20) for i in range(20)]
            meta = [json.dumps({"parent_asin": f"B{i}", "title": "T", "details": {"a": [1]}}) for i in range(20)]
        else:
            lines, meta = (
                list(MANY),
                [*THINGS[:10], *(json.dumps({"asin": f"B{i}", "rank": ["#1 in A"]}) for i in range(10, 20))],
            )
        spoilt = [_spoil(line.encode(), rng) if rng.random() < 0.2 else line.encode() for line in lines]
        bad_meta = [_spoil(line.encode(), rng) if rng.random() < 0.3 else line.encode() for line in meta]
        stats = run(
            tmp_path / source, source, {kind: spoilt, "meta": bad_meta}, interactions=kind, malformed=1.0, kcore=0
        )
        counted = sum(count for name, count in stats["reading"].items() if name.startswith("left out"))
        # A new line end may make two lines of one.
        written = sum(len([part for part in line.split(b"\n") if part.strip()]) for line in spoilt)
        assert stats["raw"]["interactions"] + counted == written
        assert stats["interactions"] + sum(stats["dropped"].values()) == stats["raw"]["interactions"]


def _spoil(line: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(line))
        what = rng.choice(
            [bytes([rng.randrange(256)]), b"", b"\\", b'"', b"'", b"{", b"[", b"\x00", b"1e999", b"\xed\xa0\x80"]
        )
        line = line[:place] + what + line[place + rng.randint(0, 3) :]
    return line
