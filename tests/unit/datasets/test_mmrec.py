"""MMRec folders: ids, splits and texts are taken over exactly, whatever the layout; what is malformed is named."""

import csv
import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.common.tables import INTERACTIONS, ITEMS, USERS, read_table
from cm3.datasets.mmrec.published import FINGERPRINTS, published_files
from cm3.datasets.mmrec.reader import Reader
from cm3.datasets.reader import ROWS
from cm3.datasets.registry import parse_dataset
from cm3.datasets.splits import split_ratings

ROW = tuple[int, int, int]
# (user, item, label): every user has one interaction in valid and one in test.
PAIRS: list[ROW] = [(user, (user + step) % 6, max(0, step - 1)) for user in range(5) for step in range(4)]
HOSTILE = ["plain", "café 手", "nul\0here", "x" * 300, 'quo"te', "tab\there", "line\nend", "=1+1", "💥", " 7 "]


def write(
    folder: Path,
    pairs: Sequence[ROW] = PAIRS,
    *,
    columns: Sequence[str] = ("userID", "itemID", "rating", "timestamp", "x_label"),
    end: str = "\n",
    packed: bool = False,
    users: Sequence[str] | None = None,
    items: Sequence[str] | None = None,
) -> Path:
    """Write a folder as MMRec's preprocessing does; the mappings' rows are in reverse order."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(columns)]
    for row, (user, item, label) in enumerate(pairs):
        values = {
            "userID": user,
            "itemID": item,
            "rating": 1.5 + row % 3,
            "timestamp": 1_400_000_000 + row,
            "extra": 'é"x',
        }
        lines.append("\t".join(str((values | {"x_label": label})[name]) for name in columns))
    data = (end.join(lines) + end).encode()
    (folder / f"{folder.name}.inter{'.gz' * packed}").write_bytes(gzip.compress(data) if packed else data)
    for name, header, ids in (("u", ("user_id", "userID"), users), ("i", ("asin", "itemID"), items)):
        if ids is not None:
            with (folder / f"{name}_id_mapping.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, delimiter="\t", lineterminator=end)
                writer.writerow(header)
                writer.writerows(reversed([(text, number) for number, text in enumerate(ids)]))
    return folder


def config(folder: Path, **settings: Any) -> Any:
    return parse_dataset("shop", {"source": "mmrec", "folder": str(folder), **settings}, "datasets.shop")


def reader(folder: Path, **settings: Any) -> Reader:
    dataset = config(folder, **settings)
    return Reader(dataset.prepare_spec(), {n: Path(p) for n, p in dataset.prepare_inputs("shop").items()})


def interactions(folder: Path, **settings: Any) -> pa.Table:
    return pa.concat_tables(reader(folder, **settings).interactions())


def labelled_pairs(place: Path, data: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Prepare and split; return (user id, item id, label) of all interactions."""
    place.mkdir()
    run_prepare(place, data)
    spec = parse_dataset("mine", data, "datasets.mine").split_spec()
    split_ratings(place / "ratings.parquet", place / "interactions.parquet", spec["strategy"], spec["seed"])
    users, items = read_table(place / "users.parquet", USERS), read_table(place / "items.parquet", ITEMS)
    table = read_table(place / "interactions.parquet", INTERACTIONS)
    user_ids, item_ids = users.column("user_id").to_pylist(), items.column("item_id").to_pylist()
    return {(user_ids[row["user"]], item_ids[row["item"]], row["split"]) for row in table.to_pylist()}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "columns",
    [
        ("userID", "itemID", "rating", "timestamp", "x_label"),
        ("userID", "itemID", "x_label"),
        ("x_label", "extra", "itemID", "userID"),
    ],
)
def test_every_layout_reads_the_same(tmp_path: Path, end: str, packed: bool, columns: Sequence[str]) -> None:
    folder = write(tmp_path / "shop", columns=columns, end=end, packed=packed)
    table = interactions(folder)
    assert table.schema == ROWS
    found = zip(*(table.column(name).to_pylist() for name in ("user", "item", "split")), strict=True)
    assert [(int(user), int(item), label) for user, item, label in found] == PAIRS
    if "timestamp" in columns:
        assert table.column("timestamp").to_pylist() == [1_400_000_000 + row for row in range(len(PAIRS))]
        assert table.column("rating").to_pylist() == [1.5 + row % 3 for row in range(len(PAIRS))]
    else:
        assert table.column("timestamp").null_count == table.column("rating").null_count == len(PAIRS)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_a_file_of_many_blocks_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    folder = write(tmp_path / "shop", end="\r\n")
    whole = interactions(folder)
    monkeypatch.setattr("cm3.datasets.files.lines.BLOCK_BYTES", block)
    assert interactions(folder).equals(whole)
    with (folder / "shop.inter").open("a") as file:
        file.write("0\tx\t1.0\t5\t0\r\n")
    with pytest.raises(UserError, match=f"line {len(PAIRS) + 2}: itemID = 'x' is not a number"):
        interactions(folder)


def test_milliseconds_become_seconds_and_empty_cells_are_unknown(tmp_path: Path) -> None:
    folder = write(tmp_path / "shop")
    lines = (folder / "shop.inter").read_text().splitlines()
    lines[1:3] = ["0\t0\t\t1400000000999\t0", "0\t1\t2.5\t\t0"]
    (folder / "shop.inter").write_text(
        "\ufeff" + "\n".join([*lines[:2], "", *lines[2:]])
    )  # a BOM, a blank line, no last end
    table = interactions(folder)
    assert table.column("timestamp").to_pylist()[:3] == [1_400_000_000, None, 1_400_000_002]
    assert table.column("rating").to_pylist()[:3] == [None, 2.5, 3.5] and len(table) == len(PAIRS)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_original_ids_come_back_whatever_they_hold(tmp_path: Path, end: str) -> None:
    pairs = [(user, item, label) for user in range(4) for item, label in ((user, 0), (user + 3, 0), (7, 1), (9, 2))]
    users = ["Ünsal", "\0", "u" * 300, "a\tb"]
    folder = write(tmp_path / "shop", pairs, end=end, users=users, items=HOSTILE)
    table = interactions(folder)
    found = zip(table.column("user").to_pylist(), table.column("item").to_pylist(), strict=True)
    assert list(found) == [(users[user], HOSTILE[item]) for user, item, _ in pairs]
    assert sorted(name for part in reader(folder).known_items() or [] for name in part) == sorted(HOSTILE)


def test_prepare_and_split_keep_the_published_labels(tmp_path: Path) -> None:
    users, items = [f"u{n}" for n in range(5)], [f"i{9 - n}" for n in range(8)]
    folder = write(tmp_path / "shop", users=users, items=items)
    names = ("train", "valid", "test")
    expected = {(users[u], items[i], names[label]) for u, i, label in PAIRS}
    data = {"source": "mmrec", "folder": str(folder)}
    assert labelled_pairs(tmp_path / "a", data) == expected
    assert read_table(tmp_path / "a/items.parquet", ITEMS).column("item_id").to_pylist() == sorted(items[:6])
    # Items 6 and 7 stand in the mapping only.
    assert labelled_pairs(tmp_path / "b", data | {"cold_items": "keep"}) == expected
    assert read_table(tmp_path / "b/items.parquet", ITEMS).column("item_id").to_pylist() == sorted(items)


def test_texts_come_from_further_columns_and_from_meta(tmp_path: Path) -> None:
    folder = write(tmp_path / "shop")
    (folder / "i_id_mapping.csv").write_text(
        "asin\titemID\ttitle\n" + "".join(f"A{n}\t{n}\tmug {n}\n" for n in range(6))
    )
    assert reader(folder).items({"A2", "B"})["A2"].title == "mug 2"
    header = ["itemID", "asin", "title", "price", "imUrl", "brand", "categories", "description"]
    with (folder / "meta-shop.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerow(
            [2, "A2", "Big <b>mug</b>", 3.5, "http://x/2.jpg", "Acme", "[['Home', 'Mugs'], ['Gifts']]", "two\nlines"]
        )
        writer.writerow([3, "A3", "", "", "", "", "[['broken", ""])
        writer.writerow([4, "A4", "Mug", "", "", "", "[['Home \\ud83d'], '\\udc00']", ""])
    found = reader(folder).items({"A2", "A3", "A4"})
    assert list(found["A4"].categories) == ["Home"]
    assert (found["A2"].title, found["A2"].brand, found["A2"].description) == ("Big mug", "Acme", "two lines")
    assert list(found["A2"].categories) == ["Home", "Mugs", "Gifts"] and found["A2"].image_urls == ["http://x/2.jpg"]
    (folder / "i_id_mapping.csv").unlink()
    assert list(reader(folder).known_items() or []) == [["2", "3", "4"]]
    assert reader(folder).items({"2"})["2"].brand == "Acme"
    assert run_prepare(tmp_path, {"source": "mmrec", "folder": str(folder)})["interactions"] == len(PAIRS)
    assert list(found["A3"].categories) == ["[['broken"] and found["A3"].image_urls == []


FAULTS = [
    ("0\t1\t1.0\t5\t3", r"line 3: x_label = '3' is not 0 \(train\)"),
    ("0\t1\t1.0\t5\t-1", "line 3: x_label = '-1' is not 0"),
    ("0\t1\t1.0\t5\t", "line 3: x_label = '' is not 0"),
    ("0\t1\t1.0\t5\t0.5", "line 3: x_label = '0.5' is not 0"),
    ("0\t1\tnan\t5\t0", "line 3: rating = 'nan' is not a finite number"),
    ("0\t1\tinf\t5\t0", "line 3: rating = 'inf' is not a finite number"),
    ("0\t1\tgood\t5\t0", "line 3: rating = 'good' is not a number"),
    ("0\t1\t1.0\t2014-05-01\t0", "line 3: timestamp = '2014-05-01' is not a number"),
    ("A1\t1\t1.0\t5\t0", "line 3: userID = 'A1' is not a number"),
    ("0\t1\0\t1.0\t5\t0", r"line 3: itemID = '1\\x00' is not a number"),
    ("0\t\t1.0\t5\t0", "line 3: itemID = '' is empty"),
    ("-3\t1\t1.0\t5\t0", "line 3: userID = '-3' is negative"),
    ("0\t3000000000\t1.0\t5\t0", "line 3: itemID = '3000000000' is too large"),
    ("0\t99999999999999999999\t1.0\t5\t0", "line 3: itemID = '99999999999999999999' is not a number"),
    ("0\t1\t1.0\t5", "line 3: has 4 values, the header has 5"),
    ("0\t1\t1.0\t5\t0\t0", "line 3: has 6 values, the header has 5"),
    ("0\t77\t1.0\t5\t0", r"line 3: itemID = '77' is not in .*i_id_mapping\.csv"),
    ("77\t1\t1.0\t5\t0", r"line 3: userID = '77' is not in .*u_id_mapping\.csv"),
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(("line", "complaint"), FAULTS)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, complaint: str, end: str) -> None:
    folder = write(tmp_path / "shop", users=list("abcde"), items=list("uvwxyz"))
    lines = (folder / "shop.inter").read_text().splitlines()
    lines[2] = line
    (folder / "shop.inter").write_text(end.join(lines) + end, newline="")
    with pytest.raises(UserError, match=complaint) as error:
        interactions(folder)
    assert str(folder / "shop.inter") in str(error.value)


def test_a_pair_under_two_labels_is_a_leak_and_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "shop", [*PAIRS, (2, 2, 2), (2, 2, 0)])
    with pytest.raises(UserError, match=r"1 pairs .* userID 2, itemID 2 in train and test"):
        interactions(folder)
    # Within one part a repeat is a repeat, as everywhere.
    folder = write(tmp_path / "again", [*PAIRS, (2, 2, 0)])
    stats = run_prepare(tmp_path, {"source": "mmrec", "folder": str(folder)})
    assert stats["interactions"] == len(PAIRS)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("i_id_mapping.csv", "asin\titem\nA\t0\n", "no column 'itemID'"),
        ("i_id_mapping.csv", "asin\titemID\nA\t0\nB\t0\n", "line 3: duplicate itemID 0"),
        ("i_id_mapping.csv", "asin\titemID\nA\t0\nA\t1\n", "line 3: duplicate id 'A'"),
        ("i_id_mapping.csv", "asin\titemID\nA\tone\n", "line 2: itemID = 'one' is not a number"),
        ("i_id_mapping.csv", "asin\titemID\nA\n", "line 2: has 1 values, the header has 2"),
        ("i_id_mapping.csv", "asin\titemID\n\t0\n", "line 2: has no id next to itemID"),
        ("u_id_mapping.csv", "user_id\tuserID\n", "has no ids"),
        ("shop.inter", "", "has no interactions"),
        ("shop.inter", "userID\titemID\tx_label\n", "has no interactions"),
        ("shop.inter", "user\titem\n0\t1\n", "no column 'userID'"),
        ("shop.inter", "userID\titemID\titemID\n0\t1\t1\n", "duplicate column 'itemID' in the header"),
        ("shop.inter", "userID,itemID\n0,1\n", "separated by tabs"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    folder = write(tmp_path / "shop")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        interactions(folder)


def test_without_labels_the_split_is_random_and_published_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "shop", columns=("userID", "itemID"), end="\r\n")
    dataset = config(folder)
    assert not dataset.has_labels()
    assert dataset.split_spec()["strategy"] == "random" and dataset.prepare_spec()["kcore"] == 5
    with pytest.raises(UserError, match="have no published split"):
        config(folder, split={"strategy": "published"})
    dataset = config(write(tmp_path / "labelled", packed=True))
    assert dataset.split_spec()["strategy"] == "published" and dataset.prepare_spec()["kcore"] == 0
    assert config(tmp_path / "labelled", split={"strategy": "random"}).split_spec()["strategy"] == "random"


def test_a_folder_that_is_not_there_is_named_when_it_is_needed(tmp_path: Path) -> None:
    dataset = config(tmp_path / "later")
    assert dataset.has_labels()
    for ask in (dataset.prepare_inputs, lambda name: dataset.published_vectors(name, "text")):
        with pytest.raises(UserError, match=r"later: no such folder; set the dataset's folder"):
            ask("shop")
    folder = write(tmp_path / "shop")
    with pytest.raises(
        UserError, match=r"has no other\.inter and no other\.inter\.gz; set name, the folder has shop\.inter"
    ):
        config(folder, name="other").prepare_inputs("shop")
    renamed = folder.rename(tmp_path / "moved")
    assert config(renamed, name="shop").prepare_inputs("x") == {"interactions": str(renamed / "shop.inter")}


def test_features_come_with_the_file_that_tells_their_rows(tmp_path: Path) -> None:
    folder = write(tmp_path / "shop")
    np.save(folder / "text_feat.npy", np.zeros((6, 2)))
    vectors = {"vectors": str(folder / "text_feat.npy")}
    assert config(folder).published_vectors("shop", "text") == vectors | {"ids": str(folder / "shop.inter")}
    assert config(folder).published_vectors("shop", "image") == {}
    write(folder, items=list("uvwxyz"))
    assert config(folder).published_vectors("shop", "text")["ids"] == str(folder / "i_id_mapping.csv")


def test_images_need_a_place(tmp_path: Path) -> None:
    assert config(tmp_path).images_spec() == {"find": "none"}
    with pytest.raises(UserError, match=r"images\.folder needs images\.pattern"):
        config(tmp_path, images={"folder": "covers"})
    with pytest.raises(UserError, match="images needs a folder, or hosts"):
        config(tmp_path, images={})
    assert config(tmp_path, images={"folder": "covers", "pattern": "{item_id}.jpg"}).image_folder() == "covers"


def test_the_published_clothing_data(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "mmrec/clothing.inter.gz"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    data = {"source": "mmrec", "folder": str(source.parent), "name": "clothing"}
    expected = {"users": 39_387, "items": 23_033, "interactions": 278_677}
    found = labelled_pairs(tmp_path / "out", data | {"expected": expected})
    names = dict(zip("012", ("train", "valid", "test"), strict=True))
    with gzip.open(source, "rt", newline="") as file:
        rows = [line.split() for line in file][1:]
    assert found == {(user, item, names[label]) for user, item, label in rows} and len(rows) == 278_677


def test_published_files_are_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    folder = write(tmp_path / "baby", items=[f"B{n}" for n in range(6)])
    inter = folder / "baby.inter"
    np.save(folder / "text_feat.npy", np.zeros((6, 2), np.float32))
    spec = config(folder)
    inputs = {name: Path(path) for name, path in spec.prepare_inputs("shop").items()}
    assert spec.published_files(inputs) == dict.fromkeys(("baby.inter", "i_id_mapping.csv", "text_feat.npy"), False)
    assert "baby.inter: is not the file that MMRec's authors publish" in caplog.text
    fingerprint = (inter.stat().st_size, hashlib.sha256(inter.read_bytes()).hexdigest()[:12])
    monkeypatch.setitem(FINGERPRINTS["baby"], "baby.inter", fingerprint)
    with caplog.at_level("INFO"):
        assert spec.published_files(inputs)["baby.inter"]
    assert "baby.inter: is the file that MMRec's authors publish" in caplog.text
    inter.write_bytes(inter.read_bytes().replace(b"\t0\n", b"\t1\n", 1))
    assert not spec.published_files(inputs)["baby.inter"]
    other = config(write(tmp_path / "shop"))
    assert other.published_files({"interactions": tmp_path / "shop/shop.inter"}) == {}


def test_the_published_mapping_of_baby_has_its_fingerprint(real_data: Path, tmp_path: Path):
    folder = write(tmp_path / "baby")
    (folder / "i_id_mapping.csv").write_bytes((real_data / "odd/mmrec_baby_i_id_mapping.csv").read_bytes())
    assert published_files(folder / "baby.inter") == {"baby.inter": False, "i_id_mapping.csv": True}
