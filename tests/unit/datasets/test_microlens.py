"""MicroLens: pairs with and without times, titles in both ways that they are published, covers, faults counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from oracles_sources import run_prepare

from cm3.common.errors import UserError
from cm3.common.tables import ITEMS, read_table
from cm3.datasets.microlens.reader import Reader
from cm3.datasets.reader import ROWS
from cm3.datasets.registry import parse_dataset

ROWS_CSV = [(user, 1 + (user + step) % 6, 1_583_378_629_552 + 1000 * step) for user in range(1, 7) for step in range(5)]
TITLES = {1: "Plain", 2: "a, b, c", 3: 'say "hi"', 4: "手作りの café", 5: "", 6: 'six\nlines, "two"'}


def write(folder: Path, size: str = "50k", end: str = "\n") -> Path:
    """Write a local copy: 50k with quoted titles under a header, 100k with bare ones and categories."""
    folder.mkdir(exist_ok=True)
    stem = f"MicroLens-{size}"
    lines = ["user,item,timestamp", *(f"{u},{i},{t}" for u, i, t in ROWS_CSV), ""]
    (folder / f"{stem}_pairs.csv").write_text(end.join(lines), newline="")
    users = {user: [item for u, item, _ in ROWS_CSV if u == user] for user, _, _ in ROWS_CSV}
    histories = [f"{user}\t{' '.join(map(str, items))}" for user, items in users.items()]
    (folder / f"{stem}_pairs.tsv").write_text(end.join([*histories, ""]), newline="")
    if size == "50k":
        quoted = {number: '"' + title.replace('"', '""') + '"' for number, title in TITLES.items()}
        titles = ["item,title", *(f"{number},{title}" for number, title in quoted.items()), ""]
        (folder / f"{stem}_titles.csv").write_text(end.join(titles), encoding="utf-8", newline="")
    else:
        titles = [f"{number},{title.replace(chr(10), ' ')}" for number, title in TITLES.items()]
        (folder / f"{stem}_title_en.csv").write_text(end.join([*titles, ""]), encoding="utf-8", newline="")
        (folder / "tags_to_summary.csv").write_text("".join(f"{number},Food & Drink\n" for number in (1, 4)))
    return folder


def data(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"source": "microlens", "folder": str(folder), **settings}


def reader(folder: Path, **settings: Any) -> Reader:
    dataset = parse_dataset("videos", data(folder, **settings), "datasets.videos")
    inputs = {name: Path(path) for name, path in dataset.prepare_inputs("videos").items()}
    return Reader(dataset.prepare_spec(), inputs)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("size", ["50k", "100k"])
def test_pairs_with_times_in_milliseconds(tmp_path: Path, size: str, end: str) -> None:
    table = pa.concat_tables(reader(write(tmp_path, size, end), size=size).interactions())
    assert table.schema == ROWS and table.column("rating").null_count == table.column("split").null_count == len(table)
    found = zip(*(table.column(name).to_pylist() for name in ("user", "item", "timestamp")), strict=True)
    assert list(found) == [(str(user), str(item), time // 1000) for user, item, time in ROWS_CSV]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_histories_are_the_same_pairs_without_times(tmp_path: Path, end: str) -> None:
    table = pa.concat_tables(reader(write(tmp_path, end=end), interactions="tsv").interactions())
    found = zip(table.column("user").to_pylist(), table.column("item").to_pylist(), strict=True)
    assert list(found) == [(str(user), str(item)) for user, item, _ in ROWS_CSV]
    assert table.column("timestamp").null_count == len(table)


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_file_of_many_blocks_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    videos = reader(write(tmp_path, end="\r\n"), interactions=kind)
    whole = pa.concat_tables(videos.interactions())
    monkeypatch.setattr("cm3.datasets.files.lines.BLOCK_BYTES", 16)
    assert pa.concat_tables(videos.interactions()).equals(whole)
    assert videos.notes == {}


@pytest.mark.parametrize("size", ["50k", "100k"])
def test_titles_with_commas_and_quotes(tmp_path: Path, size: str) -> None:
    videos = reader(write(tmp_path, size), size=size)
    assert [name for part in videos.known_items() for name in part] == [str(number) for number in TITLES]
    items = videos.items({*map(str, TITLES), "99"})
    assert {number: items[str(number)].title for number in TITLES} == {
        n: " ".join(t.split()) for n, t in TITLES.items()
    }
    categories = {number: list(items[str(number)].categories) for number in (1, 2, 4)}
    assert categories == (
        {1: ["Food & Drink"], 2: [], 4: ["Food & Drink"]} if size == "100k" else {1: [], 2: [], 4: []}
    )
    cover = f"https://recsys.westlake.edu.cn/MicroLens-{size}-Dataset/MicroLens-{size}_covers/99.jpg"
    assert items["99"].title == "" and list(items["99"].image_urls) == [cover]
    assert videos.notes == {}


def test_the_prepare_stage_takes_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw")
    (folder / "MicroLens-50k_titles.csv").write_text("item,title\n1,one\n")
    stats = run_prepare(tmp_path, data(folder))
    assert (stats["users"], stats["items"], stats["interactions"]) == (6, 6, 30)
    items = read_table(tmp_path / "items.parquet", ITEMS)
    assert items.column("title").to_pylist() == ["one", "", "", "", "", ""]
    assert all(items.column("image_urls").to_pylist()), "a video without a title has a cover"


@pytest.mark.parametrize(
    ("name", "kind", "line", "reason"),
    [
        ("pairs.csv", "csv", "1,2", "is not user,item,timestamp"),
        ("pairs.csv", "csv", "1,2,3,4", "is not user,item,timestamp"),
        ("pairs.csv", "csv", "1,two,1583378629552", "a value is not a number"),
        ("pairs.csv", "csv", "1,2,nan", "a value is not a number"),
        ("pairs.csv", "csv", "1,-2,1583378629552", "a value is not a number"),
        ("pairs.csv", "csv", "1,2\0,1583378629552", "a value is not a number"),
        ("pairs.csv", "csv", "1,2,0", "the time is not in milliseconds"),
        ("pairs.csv", "csv", "1,2,9999999999999999", "the time is not in milliseconds"),
        ("pairs.tsv", "tsv", "1 2 3", "is not a user, a tab and videos with blanks between"),
        ("pairs.tsv", "tsv", "1\t2 three", "is not a user, a tab and videos with blanks between"),
        ("pairs.tsv", "tsv", "1\t", "is not a user, a tab and videos with blanks between"),
    ],
)
def test_malformed_lines_are_left_out_and_counted(tmp_path: Path, name: str, kind: str, line: str, reason: str) -> None:
    path = write(tmp_path) / f"MicroLens-50k_{name}"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:2], line, "", *rows[2:]]))
    videos = reader(tmp_path, interactions=kind, malformed=0.5)
    assert sum(map(len, videos.interactions())) == len(ROWS_CSV)
    assert videos.notes == {f"left out: {reason}": 1}
    with pytest.raises(UserError, match=r"line 3: .*malformed|malformed.*line 3"):
        list(reader(tmp_path, interactions=kind, malformed=0.001).interactions())


def test_lines_that_are_no_titles_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path) / "MicroLens-50k_titles.csv"
    path.write_text(path.read_text() + "not a title\n7,seven\n")
    videos = reader(tmp_path, malformed=0.5)
    assert videos.items({"7"})["7"].title == "seven"
    assert videos.notes == {"titles: left out: is not an id, a comma and a text": 1}
    path.write_text("<html>\n<body>404</body>\n")
    with pytest.raises(UserError, match="is an HTML page"):
        list(reader(tmp_path).known_items())


def test_where_the_files_come_from() -> None:
    small = parse_dataset("videos", {"source": "microlens"}, "datasets.videos")
    root = "https://recsys.westlake.edu.cn/MicroLens-50k-Dataset/MicroLens-50k"
    assert small.downloads("videos")["raw/videos/MicroLens-50k_pairs.csv"]["urls"] == [f"{root}_pairs.csv"]
    assert set(small.prepare_inputs("videos").values()) <= set(small.downloads("videos"))
    assert small.images_spec()["hosts"] == ["recsys.westlake.edu.cn"]
    assert small.published_vectors("videos", "image") == {}
    large = parse_dataset("videos", {"source": "microlens", "size": "100k"}, "datasets.videos")
    assert {*large.prepare_inputs("videos"), "tsv"} == {"csv", "titles", "categories", "tsv"}
    for modality in ("text", "image", "video"):
        assert large.published_vectors("videos", modality)["vectors"] in large.downloads("videos")
    assert large.published_vectors("videos", "audio") == {}
    with pytest.raises(UserError, match="have no published split"):
        parse_dataset("videos", {"source": "microlens", "split": {"strategy": "published"}}, "datasets.videos")


def test_a_local_copy_may_lack_categories_and_hold_covers_and_features(tmp_path: Path) -> None:
    (write(tmp_path, "100k") / "tags_to_summary.csv").unlink()
    np.save(tmp_path / "MicroLens-100k_image_features_CLIPRN50.npy", np.zeros((6, 4), np.float32))
    images = {"folder": "covers", "pattern": "{item_id}.jpg"}
    dataset = parse_dataset("videos", data(tmp_path, size="100k", images=images), "datasets.videos")
    assert set(dataset.prepare_inputs("videos")) == {"csv", "titles"} and dataset.downloads("videos") == {}
    vectors = dataset.published_vectors("videos", "image")
    assert vectors == {"vectors": str(tmp_path / "MicroLens-100k_image_features_CLIPRN50.npy")}
    assert dataset.images_spec()["find"] == "folder" and dataset.image_folder() == "covers"
